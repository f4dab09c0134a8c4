"""A study as notebooks use it: the models, data and reports of one run."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from transformers.utils.logging import disable_progress_bar

from kdlib import config, device, distributed
from kdlib.data.corpus import Corpus
from kdlib.data.tasks import Task
from kdlib.models.encoder import Encoder
from kdlib.progress import clock
from kdlib.pruning.selection import Selection
from kdlib.study.arms import arms
from kdlib.study.compute import spread
from kdlib.study.model_card import write_card
from kdlib.study.plan import Graph
from kdlib.study.run import find_run
from kdlib.study.stage import Context, Watch
from kdlib.study.stages import Trained

NOTEBOOKS = {  # the stages in order, each with the notebook that runs it
    "probe": "01_probe_the_teacher",
    "prune": "02_prune_the_vocabulary",
    "condition": "02b_condition_the_teacher",
    "distill": "03_distill_a_student",
    "benchmark": "04_benchmark_students",
    "task": "04b_distil_a_task",
    "ablations": "05_ablations",
    "figures": "06_figures",
}
STAGES = list(NOTEBOOKS)
OnPoint = Callable[[pd.DataFrame], None]


class Study:
    """The data, models and reports of a run; each is read or computed when it is first asked for.

    Args:
        run_dir: the run folder; None: `runs/<profile>`.
        profile: a profile by name, or a YAML file.
        overrides: `"distill.epochs=3 seed=1"`, a list of such assignments, or a dict of dotted keys.
        base: the study that this one is a variant of; then run_dir and profile are its own.

    Raises:
        UserError: where a parameter is wrong, or the folder cannot be used.

    Example:
        >>> import tempfile
        >>> from kdlib import Study
        >>> study = Study(tempfile.mkdtemp(), "smoke", "distill.epochs=2")
        >>> study.profile.distill.epochs
        2.0
        >>> [task.name for task in study.tasks]
        ['topic', 'entities']
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        profile: str = "workshop",
        overrides: Any = (),
        base: "Study | None" = None,
    ):
        disable_progress_bar()  # loading and saving take a second; long work has its own progress bar
        if base is None:
            self.run = find_run(run_dir, profile, overrides)
            self.profile = self.run.profile
            where, precision = device.pick_device(self.profile.device), self.profile.distill.precision
            self.context = Context(self.run.path, where, precision)
        else:
            self.run, self.context = base.run, base.context
            self.profile = config.changed(base.profile, config.parse_overrides(overrides), "variant")
        self.graph = Graph(self.profile, self.context, links=base is None, student="student" if base is None else "")
        self.graph.check()
        if base is None and (self.profile.compute.jobs > 1 or self.profile.compute.address):
            self.context.ahead = lambda stage, units: spread(
                self.run.path, self.profile.compute, stage, units, Study, self.context.bf16("auto")
            )

    def variant(self, overrides: Any) -> "Study":
        """This study with some parameters changed, in the same run folder. Unchanged stages are shared."""
        return Study(overrides=overrides, base=self)

    # -- what is read

    @property
    def corpus(self) -> Corpus:
        """The corpus: training, held-out and test documents."""
        return self.graph.corpus.get()

    @property
    def tasks(self) -> list[Task]:
        """The labelled tasks."""
        return self.graph.tasks.get()

    @property
    def parallel(self) -> dict[str, list[str]]:
        """The parallel sentences by language."""
        return self.graph.parallel.get()

    @property
    def teacher(self) -> Encoder:
        """The teacher."""
        return self.graph.teacher.get()

    # -- what is computed

    @property
    def selection(self) -> Selection:
        """The tokens that pruning keeps."""
        return self.graph.prune.selection

    @property
    def pruned(self) -> Encoder:
        """The pruned teacher."""
        return self.graph.prune.get()

    @property
    def source(self) -> Encoder:
        """The encoder that the student learns from: the pruned teacher, or the conditioned one with `condition.use`."""
        return self.graph.distill.teacher

    @property
    def student(self) -> Encoder:
        """The student."""
        return self.distill().encoder

    def condition(self, on_point: OnPoint | None = None) -> Trained:
        """The conditioned teacher, its training curve and facts. `on_point`: see `stage.Watch`."""
        return self.graph.condition.get(Watch(on_point))

    def distill(self, on_point: OnPoint | None = None, should_stop: Callable[[], bool] | None = None) -> Trained:
        """The student, the curve of its training and the facts.

        Args:
            on_point: called with the curve so far, and at the end with all of it.
            should_stop: asked after every step.

        Raises:
            Stopped: after a stop that was asked for; the next call resumes.
        """
        trained = self.graph.distill.get(Watch(on_point, should_stop))
        if on_point:
            on_point(trained.curve)
        return trained

    def undistilled(self, init: config.Init | None = None) -> Encoder:
        """The student before distillation; `init` replaces the student's own start."""
        return self.graph.distill.start(init)

    def ablation_rows(self, wanted: Sequence[str] = (), on_arm: Any = None) -> list[dict]:
        """Rows of the ablations; see `AblationReport.rows`. Raises UserError for an unknown arm."""
        arms(self.profile, wanted)
        return self.report("ablations").rows(wanted, on_arm)

    def write_cards(self) -> None:
        """Rewrite the model cards of all students that are there with the current numbers."""
        for name, graph in {"student": self.graph, **self.graph.others}.items():
            if (self.run.path / graph.link).is_dir():
                facts = graph.distill.settings.card
                write_card(self.run.path / graph.link, facts, self.run.path, self.run.results(), name)

    def report(self, stage: str) -> Any:
        """The report of a stage; its methods give the rows that the notebook records."""
        return self.graph.reports[stage]


def distill_run(out: Path, profile: str, overrides: list[str]) -> str | None:
    """Distil the student of a run outside the notebooks; they find it afterwards.

    Under torchrun or `accelerate launch` the processes work together, in a folder that all of them see.

    Returns:
        One line about the student; None in all processes but the first.

    Raises:
        UserError: for bad input.
    """
    distributed.join(device.pick_device(config.load_profile(profile, overrides).device))
    study = Study(out, profile, overrides)
    with study.run.lock() if distributed.rank() == 0 else nullcontext():
        trained = study.distill()
    if distributed.rank():
        return None
    loss = trained.curve.query("split == 'heldout'")["loss"].iloc[-1]
    trained_for = clock(trained.facts["training_seconds"])
    return f"{study.run.path / 'student'}: held-out loss {loss:.4f}, trained {trained_for}"
