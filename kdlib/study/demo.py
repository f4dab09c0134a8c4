"""Teacher and student of a finished run, loaded to try them on sentences."""

from dataclasses import dataclass
from pathlib import Path

from kdlib.data.corpus import draw, load_corpus, sentences
from kdlib.data.tasks import Task, load_task
from kdlib.device import pick_device
from kdlib.errors import UserError
from kdlib.models.encoder import Encoder
from kdlib.models.loading import load_encoder, load_teacher, prefix_of
from kdlib.study.export import student_folder
from kdlib.study.run import Run, project_folder

SENTENCES = 300  # to search: the teacher reads them in a few seconds


@dataclass
class Demo:
    """A run's models by name, its probed tasks, and held-out sentences to search."""

    run: Run
    encoders: dict[str, Encoder]
    tasks: list[Task]
    sentences: list[str]


def newest_run(root: Path) -> Path:
    """The folder of the run in `root` whose student is the newest. Raises UserError where no run has a student."""
    made = [file for file in root.glob("*/student/made.json") if (file.parents[1] / "profile.yaml").is_file()]
    if not made:
        raise UserError(f"{root}: no run with a student; make one with kdlib run --profile smoke")
    return max(made, key=lambda file: file.stat().st_mtime).parents[1]


def load_demo(run_dir: str | Path | None = None) -> Demo:
    """Load what a demo needs. Nothing is trained.

    Args:
        run_dir: the run; None: the newest of `runs/`, in the current folder or beside the notebooks.

    Raises:
        UserError: where there is no run, or its student is absent or damaged.
    """
    base = project_folder()
    folder = base / run_dir if run_dir else newest_run(base / "runs")
    student = student_folder(folder)
    run = Run(folder)
    profile, device, cache = run.profile, pick_device(run.profile.device), run.path / "cache"
    prefix, length = prefix_of(profile.teacher), profile.teacher.max_length
    corpus = load_corpus(profile.corpus, profile.language, profile.seed, cache)
    return Demo(
        run,
        {
            "teacher": load_teacher(profile.teacher, device, cache_root=cache),
            "student": load_encoder(student, "student", prefix, length, device=device),
        },
        [load_task(spec, corpus) for spec in profile.tasks if spec.probe],
        list(draw(sentences(corpus.heldout), SENTENCES, 1.0, profile.seed)),
    )
