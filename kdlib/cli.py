"""The command line: a function for each command."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from kdlib.errors import UserError

# Each command imports what it needs, so that `--help` and the error of a wrong parameter come without torch.
Profile = Annotated[str, typer.Option("--profile", help="smoke, workshop, full, paper, or a YAML file")]
Out = Annotated[Path | None, typer.Option("--out", help="run folder; default runs/<profile>")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a parameter, such as distill.epochs=3; repeatable")
]
RunFolder = Annotated[Path, typer.Option("--run", help="the folder of a run")]


class Commands(TyperGroup):
    """The commands. One that fails prints one line and exits with code 2, or with 130 after Ctrl-C."""

    def invoke(self, ctx: typer.Context) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - typer's click
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(str(error), 2)
        except ModuleNotFoundError as error:
            if not error.name or error.name.startswith("kdlib"):
                raise
            _fail(f"this command needs the package {error.name}: pip install 'kdlib[notebooks]'", 2)
        except KeyboardInterrupt:
            _fail("stopped; the same command resumes", 130)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="From a multilingual teacher to a small single-language encoder, measured.",
)


def _fail(message: str, code: int) -> NoReturn:
    print(f"kdlib: {message}", file=sys.stderr)
    raise SystemExit(code)


def _checked(profile: str, overrides: list[str] | None, out: Path | None) -> tuple[list[str], Path]:
    """The overrides and the run folder. A wrong parameter is refused before slow imports."""
    from kdlib import config

    config.load_profile(profile, list(overrides or []))
    return list(overrides or []), out or Path("runs") / Path(profile).stem


@app.command()
def run(
    profile: Profile = "workshop",
    out: Out = None,
    set_: Overrides = None,
    start: Annotated[str | None, typer.Option("--from", help="run this stage and those after it, even if done")] = None,
    only: Annotated[list[str] | None, typer.Option(help="run this stage only, even if done; repeatable")] = None,
    arms: Annotated[
        list[str] | None, typer.Option(help="run this ablation family, or family/arm, only; repeatable")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="compute so many arms, tasks or seeds at a time")] = None,
) -> None:
    """Run the notebooks of a study. Finished stages are kept: after a stop, the same command resumes."""
    set_ = [*(set_ or []), *([] if jobs is None else [f"compute.jobs={jobs}"])]
    overrides, folder = _checked(profile, set_, out)
    from kdlib.study.kernel import kernel

    with kernel(preload="kdlib.study.study") as shared:  # it loads the libraries at the same time as this process
        from kdlib.study import runner

        try:
            runner.run_study(folder, profile, overrides, list(only or []), start, list(arms or []), shared=shared)
        except runner.NotebookError as error:
            _fail(str(error), 2 if error.user else 1)


@app.command()
def plan(profile: Profile = "workshop", set_: Overrides = None) -> None:
    """Print what a study will take on this machine: its stages and arms, time and gigabytes. Nothing is computed."""
    overrides, _ = _checked(profile, set_, None)
    from kdlib.study.cost import print_plan

    print_plan(profile, overrides)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="a YAML file: profile, only, set, and languages: code -> parameters")],
    out: Annotated[Path, typer.Option(help="folder of the runs, one a language")] = Path("runs/sweep"),
) -> None:
    """Run one profile for several languages. Finished stages are kept: after a stop, the same command resumes."""
    from kdlib.study.sweep import run_sweep

    table, failed = run_sweep(file, out)
    typer.echo(table.round(3).to_string())
    typer.echo(out / "languages.csv")
    if failed:
        _fail(f"{len(failed)} of the languages failed: {'; '.join(failed)}", 2)


@app.command()
def distill(profile: Profile = "workshop", out: Out = None, set_: Overrides = None) -> None:
    """Distil a run's student outside the notebooks; they find it afterwards.

    On several GPUs: torchrun --nproc_per_node 8 -m kdlib distill --out runs/x
    """
    overrides, folder = _checked(profile, set_, out)
    from kdlib.study.study import distill_run

    if said := distill_run(folder, profile, overrides):
        typer.echo(said)


@app.command()
def export(
    run_dir: RunFolder = Path("runs/workshop"),
    int8: Annotated[bool, typer.Option(help="also write 8-bit weights")] = True,
    task: Annotated[str | None, typer.Option(help="export the model of this task instead of the student")] = None,
) -> None:
    """Write a run's student as ONNX files, which run without torch, and measure them beside it.

    The files and the numbers are in <run>/student/onnx, or in <run>/tasks/<task>/onnx; needs the packages of
    `pip install 'kdlib[onnx]'`.
    """
    from kdlib.study.export import export_run, export_task_run

    if task is not None:
        typer.echo(export_task_run(run_dir, task, int8).to_string())
        typer.echo(run_dir / "tasks" / task / "onnx")
        return

    typer.echo(export_run(run_dir, int8).to_string())
    typer.echo(run_dir / "student" / "onnx")


@app.command()
def predict(
    file: Annotated[Path, typer.Argument(help="a text a line, or a table: csv, tsv, jsonl, parquet")],
    task: Annotated[str, typer.Option(help="the task, as the profile names it")],
    run_dir: RunFolder = Path("runs/workshop"),
    text: Annotated[str, typer.Option(help="column of the text in a table")] = "text",
    second: Annotated[str, typer.Option(help="column of the second text, for a task of pairs")] = "second",
) -> None:
    """Label the texts of a file with a run's model of a task; prints them with label and score, tab-separated."""
    from kdlib.study.task_students import predict as predict_file
    from kdlib.study.task_students import task_folder

    found = predict_file(task_folder(run_dir, task), file, text, second)
    typer.echo(found.to_csv(sep="\t", index=False), nl=False)


@app.command()
def page(
    run_dir: RunFolder = Path("runs/workshop"),
    out: Annotated[Path, typer.Option("--out", help="the folder of the page")] = Path("page"),
) -> None:
    """Write a static page that runs a run's student in the browser, on a phone too, without a server-side.

    Any web server can give the folder out. Needs npm once, and the packages of `pip install 'kdlib[onnx]'`.
    """
    from kdlib.study.page import make_page

    typer.echo(f"{out}: {make_page(run_dir, out):.0f} MB")
    typer.echo(f"to look at it: {sys.executable} -m http.server -b 127.0.0.1 -d {out}, and open http://127.0.0.1:8000")


@app.command()
def parameters(profile: Profile = "workshop") -> None:
    """Print every parameter of a profile, with its value, as YAML."""
    import yaml

    from kdlib import config

    values = config.load_profile(profile).model_dump()
    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


@app.command()
def figures(
    run_dir: RunFolder = Path("runs/workshop"),
    to: Annotated[Path, typer.Option(help="where the README looks for its figures")] = Path("figures"),
) -> None:
    """Copy the figures of a finished run to where the README shows them."""
    from kdlib.study.run import Run, copy_figures

    for path in copy_figures(Run(run_dir), to):
        typer.echo(path)


@app.command()
def keep(
    run_dir: RunFolder = Path("runs/workshop"),
    to: Annotated[Path, typer.Option(help="the folder of results that README and docs are written from")] = Path(
        "results"
    ),
) -> None:
    """Copy the results of a finished run, without its models, to results/<profile>."""
    from kdlib.study.published import keep
    from kdlib.study.run import Run

    typer.echo(keep(Run(run_dir), to))


@app.command()
def readme(
    run_dir: RunFolder = Path("results/full"),
    files: Annotated[list[Path] | None, typer.Option("--file", help="a file with marked parts; repeatable")] = None,
) -> None:
    """Rewrite the numbers in README.md and docs/results.md from the results of a run."""
    from kdlib.study.published import fill
    from kdlib.study.run import Run

    found = Run(run_dir)
    for file in files or [Path("README.md"), Path("docs/results.md")]:
        typer.echo(f"{file}: {'rewritten' if fill(file, found) else 'is up to date'}")


@app.command()
def reset(
    folder: Annotated[Path, typer.Option(help="a checkout of the project, or an unpacked offline bundle")] = Path("."),
) -> None:
    """Restore the original notebooks and remove own runs. What was there is moved aside, not deleted."""
    from kdlib.study import reset as reset_module

    aside = reset_module.reset(folder)
    typer.echo("the original notebooks are restored" + (f"; what was there is in {aside}" if aside else ""))


@app.command()
def mteb(
    run_dir: RunFolder = Path("runs/workshop"),
    task: Annotated[list[str] | None, typer.Option(help="a task by its name in mteb; repeatable; default: all")] = None,
) -> None:
    """Run the library mteb's tasks for the run's language on teacher, student and static vectors.

    Needs a model hub for the data, and the packages of `pip install 'kdlib[mteb]'`. The scores are added to results.csv
    and to the student's card.
    """
    from kdlib.study.export import student_folder
    from kdlib.study.field_benchmark import library, run_mteb
    from kdlib.study.study import Study

    library()
    student_folder(run_dir)
    study = Study(run_dir, str(run_dir / "profile.yaml"))
    with study.run.lock():
        typer.echo(run_mteb(study, task or []).to_string(float_format="{:.3f}".format))


@app.command()
def push(
    to: Annotated[str, typer.Option(help="a model repository of the hub, owner/name; created if absent")],
    run_dir: RunFolder = Path("runs/workshop"),
    public: Annotated[bool, typer.Option("--public", help="make a new repository public; without: private")] = False,
) -> None:
    """Upload a run's student, with its model card, to the model hub. No other command uploads anything."""
    from kdlib.data import hub
    from kdlib.study.export import student_folder
    from kdlib.study.model_card import write_card
    from kdlib.study.plan import card_facts
    from kdlib.study.run import Run

    student = student_folder(run_dir)
    found = Run(run_dir)
    write_card(student, card_facts(found.profile), found.path, found.results())
    typer.echo(hub.push(student, to, public))
