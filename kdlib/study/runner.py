"""Run the notebooks in order, headlessly, with progress.

After a failure the partial notebook stays, with a plain message.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import papermill
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kdlib import progress
from kdlib.errors import UserError
from kdlib.progress import clock
from kdlib.study.arms import arms as check_arms
from kdlib.study.compute import progress_folder
from kdlib.study.kernel import ARGUMENTS, START_SECONDS, empty, kernel
from kdlib.study.run import Run
from kdlib.study.stage import contents
from kdlib.study.study import NOTEBOOKS, STAGES, Study
from kdlib.viz import tables

USER_ERRORS = ("UserError", "OSError", "PermissionError")  # errors of a cell that the user can fix, such as a full disk
PLAIN_SECONDS = 20  # how often a line is printed where there is no terminal


class NotebookError(Exception):
    """A notebook stopped: which, in which cell, and why. `user`: the user can fix the error."""

    def __init__(self, message: str, user: bool):
        super().__init__(message)
        self.user = user


def notebook_folder() -> Path:
    """The folder of the notebooks: beside the package in a checkout, or under the current folder."""
    for folder in (Path(__file__).parents[2] / "notebooks", Path.cwd() / "notebooks"):
        if (folder / f"{NOTEBOOKS['probe']}.ipynb").is_file():
            return folder
    raise UserError(
        "the notebooks were not found: run kdlib in a checkout of the project or in an unpacked offline bundle, "
        "or install it from a checkout (pip install -e .)"
    )


def wanted_stages(only: list[str], start: str | None) -> list[str]:
    """The stages to run. Raises UserError for an unknown one, with the known ones."""
    for name in [*only, *([start] if start else [])]:
        if name not in STAGES:
            raise UserError(f"unknown stage {name!r}; the stages are {', '.join(STAGES)}")
    if only:
        return [stage for stage in STAGES if stage in only]
    return STAGES[STAGES.index(start) :] if start else STAGES


def run_study(
    out: Path,
    profile: str,
    overrides: list[str],
    only: Sequence[str] = (),
    start: str | None = None,
    arms: Sequence[str] = (),
    console: Console | None = None,
    shared: AsyncKernelManager | None = None,
    again: bool = True,
) -> None:
    """Run the notebooks of a study. A stage that finished with the same parameters is skipped.

    Args:
        out: the run folder.
        profile: a name, or a YAML file.
        overrides: assignments such as "distill.epochs=3".
        only: run these stages, also finished ones.
        start: run this stage and later ones, also finished ones.
        arms: run only these ablations, "family" or "family/arm"; the stage then counts as unfinished.
        console: where to print.
        shared: a kernel to run notebooks in; None: a new one.
        again: whether stages that `only` or `start` name are run although they finished before.

    Raises:
        UserError: for bad input, before anything runs.
        NotebookError: when a notebook stops.
    """
    console = console or Console()
    stages = wanted_stages(list(only), start)
    study = Study(out, profile, overrides)
    reports = study.graph.reports  # reads corpus, tasks and sentences, so that their errors are reported first
    check_arms(study.profile, arms)
    source = notebook_folder()
    target = study.run.folder("notebooks")
    begun = time.time()
    with study.run.lock(), nullcontext(shared) if shared else kernel() as shared:
        for stage in stages:
            report = reports[stage]
            key, data = report.key, contents(report)
            if not (again and (only or start)) and study.run.done(stage, key) and report.intact():
                console.print(f"[dim]{NOTEBOOKS[stage]}: done before[/dim]")
                continue
            if changed := study.run.changed(stage, data):
                console.print(f"{NOTEBOOKS[stage]}: again, because the data changed ({', '.join(changed)})")
            started = time.time()
            name = f"{NOTEBOOKS[stage]}.ipynb"
            parameters = {"profile": profile, "run_dir": str(study.run.path), "overrides": overrides}
            some = stage == "ablations" and bool(arms)
            execute(source / name, target / name, parameters | ({"arms": list(arms)} if some else {}), console, shared)
            seconds = time.time() - started
            if not some:
                study.run.mark(stage, key, seconds, data)
            console.print(f"{NOTEBOOKS[stage]}: done in {clock(seconds)}")
    if not only:
        summary(study.run, time.time() - begun, console)


def execute(
    source: Path, target: Path, parameters: dict[str, Any], console: Console, shared: AsyncKernelManager | None = None
) -> None:
    """Run one notebook by papermill. The output is saved after every cell.

    Args:
        source: the notebook.
        target: the executed notebook.
        parameters: of its `parameters` cell.
        console: where to print.
        shared: a kernel from `kernel`, which is emptied first; None: a kernel for this notebook.
    """
    if shared is None:
        with kernel() as shared:
            return execute(source, target, parameters, console, shared)
    try:
        if shared.has_kernel:
            empty(shared)
        workers = progress_folder(Path(parameters.get("run_dir", "")))
        with _report(source.stem, Path(os.environ[progress.FILE]), console, workers) as _Engine.report:
            papermill.execute_notebook(
                source, target, parameters, engine_name="kdlib", kernel_name="python3", km=shared,
                progress_bar=False, start_timeout=START_SECONDS, extra_arguments=ARGUMENTS,
            )  # fmt: skip
    except PapermillExecutionError as error:
        user = error.ename in USER_ERRORS
        reason = error.evalue if user else f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        user, reason = False, "its kernel died (killed, or out of memory)"
    except CellTimeoutError:
        user, reason = False, "a cell took too long"
    except RuntimeError as error:  # raised by the kernel's client
        user, reason = False, f"its kernel did not start ({error})"
    except OSError as error:
        user, reason = True, f"the notebook could not be written ({error.strerror or error})"
    else:
        return
    where = f"notebook {source.stem}, cell {_Engine.report.cell if _Engine.report else 0}"
    raise NotebookError(f"{where}: {reason} (partial notebook: {target}; the same command resumes here)", user)


class _Engine(NBClientEngine):
    """papermill's own engine, telling the report which cell runs."""

    report: "_Report | None" = None

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        start, total = nb_man.cell_start, len(nb_man.nb.cells)

        def cell_start(cell, cell_index=None, **options):
            if cls.report and cell_index is not None:
                cls.report.enter(cell_index, total)
            return start(cell, cell_index, **options)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


papermill_engines.register("kdlib", _Engine)


class _Report:
    """What the terminal shows: stage, cell, step within the cell and of each worker, time left of the step."""

    def __init__(self, name: str, file: Path, console: Console, workers: Path):
        self.name, self.file, self.console, self.cell, self.total = name, file, console, 0, 0
        self.workers = workers
        self.stopped = threading.Event()
        self.bar = Progress(
            SpinnerColumn(), TextColumn("[bold]{task.fields[stage]}[/bold] cell {task.completed}/{task.total}"),
            BarColumn(20), TextColumn("{task.fields[step]}"), TimeElapsedColumn(), console=console, transient=True,
        )  # fmt: skip
        self.row = self.bar.add_task("", stage=name, step="", total=None)

    def enter(self, cell: int, total: int) -> None:
        self.cell, self.total = cell + 1, total
        self.file.unlink(missing_ok=True)
        self.bar.update(self.row, completed=self.cell, total=total, step="")

    def step(self) -> str:
        files = [self.file, *sorted(self.workers.glob("*.json"))]
        return " | ".join(filter(None, map(self._step, files)))

    def _step(self, file: Path) -> str:
        try:
            at = json.loads(file.read_text())
        except (OSError, ValueError):
            return ""
        left = f", {clock(at['left'])} left" if at["left"] is not None else ""
        return f"{at['label']} {at['done']}/{at['total']}{left}{', ' + at['note'] if at['note'] else ''}"

    def watch(self) -> None:
        said = time.time()
        while not self.stopped.wait(0.5):
            step = self.step()
            self.bar.update(self.row, step=step)
            if not self.console.is_terminal and time.time() - said > PLAIN_SECONDS:
                said = time.time()
                self.console.print(f"{self.name}: cell {self.cell}/{self.total} {step}", soft_wrap=True)


@contextmanager
def _report(name: str, file: Path, console: Console, workers: Path) -> Iterator[_Report]:
    report = _Report(name, file, console, workers)
    thread = threading.Thread(target=report.watch, daemon=True)
    if console.is_terminal:
        report.bar.start()
    thread.start()
    try:
        yield report
    finally:
        report.stopped.set()
        thread.join()
        report.bar.stop()


def summary(run: Run, seconds: float, console: Console) -> None:
    """Where everything is, and the headline: size, speed and accuracy of the student against the teacher."""
    shown = {"student": "student", "table": run.results_file.name, "figures": "figures", "notebooks": "notebooks"}
    console.print()
    for name, file in shown.items():
        path = run.path / file
        if path.exists():
            console.print(f"{name:>10}  {path}", soft_wrap=True)
    try:
        headline = tables.headline(run.results())
    except UserError:
        return
    table = Table(title=f"teacher and students ({run.profile.name}, {clock(seconds)})", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for measure in headline.columns:
        table.add_column(str(measure), justify="right")
    for model, values in headline.iterrows():
        table.add_row(str(model), *("" if pd.isna(value) else f"{value:,.1f}" for value in values))
    console.print(table)
