"""Export a run's student as ONNX files, and measure them."""

from pathlib import Path

import pandas as pd

from kdlib.data.corpus import load_corpus, sentences
from kdlib.data.tasks import Task, load_task
from kdlib.errors import UserError
from kdlib.evaluation.metrics import headline
from kdlib.evaluation.speed import export_rows
from kdlib.files import flaw, new_file
from kdlib.models.loading import load_encoder, prefix_of
from kdlib.models.onnx import FILES, FOLDER, export_student
from kdlib.study.plan import card_facts
from kdlib.study.run import Run
from kdlib.study.task_students import export_task_student, task_folder, write_task_card

TEXTS = 200  # held-out sentences for similarity and times
SHOWN = {"megabytes": "MB", "similarity": "similarity", "latency_ms": "ms a text", "sentences_per_second": "texts/s"}


def student_folder(run: Path) -> Path:
    """The folder of a run's student. Raises UserError where there is none, or a damaged one."""
    student = run / "student"
    if not student.is_dir():
        raise UserError(f"{student}: no student here; distil one first (notebook 03, or kdlib run)")
    if fault := flaw(student):
        raise UserError(f"{student}: {fault}; distil it again")
    return student


def export_run(folder: Path, int8: bool = True, runs: int = 30) -> pd.DataFrame:
    """Write the ONNX files of a run's student into `student/onnx`, and measure them beside torch.

    All rows of the measurement are kept there in `numbers.csv`, see `speed.export_rows`.

    Args:
        folder: of the run.
        int8: also write 8-bit weights.
        runs: texts that are timed one at a time.

    Returns:
        A table to show, a row for torch and for each file: size, the headline score of a linear probe on the first
        probed task with its 95% interval, similarity to torch, and times on the CPU.

    Raises:
        UserError: where there is no student or a damaged one, and without the optional packages.
    """
    student = student_folder(folder)
    run = Run(folder)
    profile = run.profile
    probed = [task for task in profile.tasks if task.probe] or profile.tasks
    if not probed:
        raise UserError(f"{folder}: its profile has no task; at least one is needed")
    with run.lock():
        teacher, spec = profile.teacher, profile.benchmark
        encoder = load_encoder(student, "student", prefix_of(teacher), teacher.max_length)
        export_student(encoder, student, int8)
        corpus = load_corpus(profile.corpus, profile.target, profile.seed, run.path / "cache")
        task = load_task(probed[0], corpus).small(spec.probe_rows, spec.probe_test_rows)
        texts = sentences(corpus.heldout)[:TEXTS]
        kinds = [kind for kind in FILES if int8 or "int8" not in kind]
        rows = export_rows(encoder, student, task, texts, runs, kinds=kinds)
        with new_file(student / FOLDER / "numbers.csv") as path:
            pd.DataFrame(rows).to_csv(path, index=False)
    return _shown(rows, task)


def export_task_run(folder: Path, name: str, int8: bool = True) -> pd.DataFrame:
    """Write the ONNX files of a run's model of a task, and score them beside torch; see `export_run`."""
    made = task_folder(folder, name)
    run = Run(folder)
    spec = next((task for task in run.profile.tasks if task.name == name), None)
    if spec is None:
        raise UserError(f"{folder}: its profile has no task {name!r}")
    with run.lock():
        corpus = load_corpus(run.profile.corpus, run.profile.target, run.profile.seed, run.path / "cache")
        task = load_task(spec, corpus)
        task = task.small(None, run.profile.benchmark.finetune_test_rows)
        rows = export_task_student(made, task, int8, run.profile.benchmark.bootstrap)
        write_task_card(made, name, card_facts(run.profile))
    return _shown(rows, task)


def _shown(rows: list[dict], task: Task) -> pd.DataFrame:
    """The table to show: a line for each method."""
    name, shown = headline(task.kind), {}
    for row in rows:
        cells = shown.setdefault(row["method"], {})
        if row["metric"] == name:
            cells[f"{name}, {task.name}"] = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        elif row["metric"] in SHOWN and "x" not in row:
            cells[SHOWN[row["metric"]]] = f"{row['value']:.3g}"
    return pd.DataFrame.from_dict(shown, orient="index")
