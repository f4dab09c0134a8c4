"""The command line: `kdlib run`, `distill`, `parameters`, `figures`, `reset`, `push`."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kdlib.errors import UserError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="From a multilingual teacher to a small single-language encoder, measured.",
)


def _fail(message: str, code: int) -> NoReturn:
    print(f"kdlib: {message}", file=sys.stderr)
    raise SystemExit(code)


@app.command()
def run(
    profile: Annotated[str, typer.Option(help="smoke, workshop, paper, or a YAML file")] = "workshop",
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/<profile>")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override a parameter, such as distill.epochs=3; repeatable")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="run this stage and those after it, even if done")] = None,
    only: Annotated[list[str] | None, typer.Option(help="run this stage only, even if done; repeatable")] = None,
    arms: Annotated[
        list[str] | None, typer.Option(help="run this ablation family, or family/arm, only; repeatable")
    ] = None,
) -> None:
    """Run the notebooks of a study. Finished stages are kept: the same command again goes on where it stopped."""
    from kdlib import config
    from kdlib.study.kernel import kernel

    overrides, out = list(set_ or []), out or Path("runs") / Path(profile).stem
    try:
        config.load_profile(profile, overrides)  # a slip in a parameter is told at once
    except UserError as error:
        _fail(str(error), 2)
    with kernel(preload="kdlib.study.study") as shared:  # loads the libraries while this process does, too
        from kdlib.study import runner

        try:
            runner.run_study(out, profile, overrides, list(only or []), start, list(arms or []), shared=shared)
        except UserError as error:
            _fail(str(error), 2)
        except runner.NotebookError as error:
            _fail(str(error), 2 if error.user else 1)
        except KeyboardInterrupt:
            _fail("stopped; the same command again goes on from the notebook that was running", 130)


@app.command()
def distill(
    profile: Annotated[str, typer.Option(help="smoke, workshop, paper, or a YAML file")] = "workshop",
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/<profile>")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override a parameter, such as distill.epochs=3; repeatable")
    ] = None,
) -> None:
    """Make a run's student outside the notebooks, which then find it.

    On several GPUs: torchrun --nproc_per_node 8 -m kdlib distill --out runs/x
    """
    from kdlib.study import runner

    try:
        runner.distill(out or Path("runs") / Path(profile).stem, profile, list(set_ or []))
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped; the same command again goes on from the last checkpoint", 130)


@app.command()
def parameters(
    profile: Annotated[str, typer.Option(help="smoke, workshop, paper, or a YAML file")] = "workshop",
) -> None:
    """Print every parameter of a profile, with its value, as YAML."""
    import yaml

    from kdlib import config

    try:
        typer.echo(
            yaml.safe_dump(config.load_profile(profile).model_dump(), sort_keys=False, allow_unicode=True), nl=False
        )
    except UserError as error:
        _fail(str(error), 2)


@app.command()
def figures(
    run_dir: Annotated[Path, typer.Option("--run", help="a finished run")] = Path("runs/workshop"),
    to: Annotated[Path, typer.Option(help="where the README looks for its figures")] = Path("figures"),
) -> None:
    """Copy the figures of a finished run to where the README shows them."""
    from kdlib.study import runner
    from kdlib.study.run import Run

    try:
        for path in runner.refresh_figures(Run(run_dir), to):
            typer.echo(path)
    except UserError as error:
        _fail(str(error), 2)


@app.command()
def reset(
    folder: Annotated[Path, typer.Option(help="a checkout of the project, or an unpacked offline bundle")] = Path("."),
) -> None:
    """Back to the start: notebooks as they were handed out, no own runs. What was there is set aside, not lost."""
    from kdlib.study import reset as reset_module

    try:
        aside = reset_module.reset(folder)
    except UserError as error:
        _fail(str(error), 2)
    typer.echo("the notebooks are as they were handed out" + (f"; what was there lies in {aside}" if aside else ""))


@app.command()
def push(
    to: Annotated[str, typer.Option(help="a model repository of the hub, owner/name; made if absent")],
    run_dir: Annotated[Path, typer.Option("--run", help="a run with a student")] = Path("runs/workshop"),
    public: Annotated[bool, typer.Option("--public", help="make a new repository public; without: private")] = False,
) -> None:
    """Upload a run's student, with its model card, to the model hub. Nothing else of the kit ever uploads anything."""
    from kdlib.data import hub
    from kdlib.files import flaw
    from kdlib.study.model_card import write_card
    from kdlib.study.plan import card_facts
    from kdlib.study.run import Run

    student = run_dir / "student"
    try:
        if not student.is_dir():
            raise UserError(f"{student}: no student here; distil one first (notebook 03, or kdlib run)")
        if fault := flaw(student):
            raise UserError(f"{student}: {fault}; distil it again")
        run = Run(run_dir)
        write_card(student, card_facts(run.profile), run.path, run.results())
        typer.echo(hub.push(student, to, public))
    except UserError as error:
        _fail(str(error), 2)
