"""Quality per minute: how much of the teacher a student keeps after how long, for several ways to train it.

Every way starts with the same teacher, the same pruned vocabulary, the same texts and the same number of threads. The
clock of a way includes the teacher's passes; evaluations stop the clock. Run alone: python -m benchmarks.quality. It
draws docs/quality.png and writes docs/quality.md.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.common import HERE, WORK, keep_memory, machine, main, row, seconds, versions
from kdlib.config import Distill, Student
from kdlib.data.corpus import load_parallel, sentences, windows
from kdlib.distillation.distill import Stopped, distill
from kdlib.distillation.student_init import build_student, layer_map
from kdlib.distillation.tokenized_corpus import TokenizedCorpus, prepare, training_size
from kdlib.evaluation.baselines import majority
from kdlib.evaluation.probing import linear_probe, retrieval, similarity, task_vectors, train_targets
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.study.study import Study
from kdlib.viz import style
from kdlib.viz.style import PALETTE

PAGE, PICTURE = (HERE.parent / "docs" / name for name in ("quality.md", "quality.png"))
SEEDS = (0, 1)
LIMIT = 2.5  # minutes for the ways without cached states
MOMENTS = 7  # evaluations of a training, ever further apart
LEVELS = (0.90, 0.95, 0.98)  # shares of the teacher's score above chance
TASKS = ("topic", "entities")  # embedded tasks on which the teacher is well above the baselines
ROWS = 500  # training rows of a probe, and test rows


class Way(NamedTuple):
    """A way to train a student. live: the teacher runs at every step; minutes: when to stop at the latest."""

    student: Student
    spec: Distill
    live: bool = False
    minutes: float = 60


def ways(spec: Distill, limit: float) -> dict[str, Way]:
    """The kit's way now and with alternate layers, the paper's loop, and masked language modelling alone.

    The paper's loop has its scripts' settings (random start, TinyBERT's objectives, 5e-5, 3 passes), but batches of
    1,024 tokens for 32 texts without padding to 128, and the pruned vocabulary.
    """
    spread = spec.model_copy(update={"layers": "alternate"})
    paper = dict(objectives={"tinybert_hidden": 1.0, "tinybert_attention": 1.0}, learning_rate=5e-5, beta2=0.999)
    paper |= dict(epochs=3.0, warmup=0.1, batch_tokens=1024, layers="alternate", freeze_embeddings=False)
    blank = dict(objectives={"mlm": 1.0}, learning_rate=5e-4, beta2=0.98, epochs=10.0, freeze_embeddings=False)
    return {
        "kit": Way(Student(layers=4, init="late"), spec.model_copy(update={"layers": "late"})),
        "kit, alternate layers": Way(Student(layers=4, init="alternate"), spread),
        "the paper's loop": Way(Student(layers=4, init="random"), spec.model_copy(update=paper), True, limit),
        "MLM alone": Way(Student(layers=4, init="random"), spec.model_copy(update=blank), True, limit),
    }


class Judge:
    """Compares an encoder with the teacher: probes above chance, similarity, and retrieval of translations."""

    def __init__(self, study: Study, rows: int):
        self.teacher = study.source
        self.tasks = [task.small(rows, rows) for task in study.tasks if task.name in TASKS]
        self.heldout = sentences(study.corpus.heldout)[:200]
        pairs = load_parallel(study.profile.parallel, study.profile.target, 200)
        self.pairs = {code: pairs[code] for code in ("tgl", "eng")}
        self.chance = {task.name: majority(task)[0].value for task in self.tasks}
        self.target = text_vectors(self.teacher, self.heldout)[:, 0]
        self.english = text_vectors(self.teacher, self.pairs["eng"])[:, 0]
        self.best = self.scores(self.teacher)

    def scores(self, encoder: Encoder) -> dict[str, float]:
        """The probes' scores, similarity to the teacher, and accuracy of finding the English translation."""
        found = {}
        for task in self.tasks:
            train, test, places = task_vectors(encoder, task)
            targets = train_targets(encoder, task)
            found[task.name] = linear_probe(task, train[:, 0], targets, test[:, 0], places)[0].value
        own = text_vectors(encoder, self.pairs["tgl"])[:, 0]
        return found | {
            "similarity": similarity(text_vectors(encoder, self.heldout)[:, 0], self.target),
            "retrieval": float(retrieval(own, self.english, centred=True).mean()),
        }

    def kept(self, scores: dict[str, float]) -> float:
        """The mean share of the teacher's score above chance, over the tasks."""
        return float(np.mean([(scores[t] - c) / (self.best[t] - c) for t, c in self.chance.items()]))


def train(
    study: Study, way: Way, texts: TokenizedCorpus, heldout: TokenizedCorpus, seed: int, spent: float, judge: Judge
) -> list[dict]:
    """Train once; a row for each moment. spent: seconds of the teacher's passes before the training."""
    source = study.source
    student = build_student(source.model, way.student, seed)
    steps = training_size(texts, way.spec, seed)[0]
    moments = set(np.geomspace(max(1, steps / 60), steps, MOMENTS).round().astype(int)[:-1])
    rows: list[dict] = []
    clock = {"start": time.perf_counter() - spent, "step": 0.0}

    def look() -> None:
        begun = time.perf_counter()
        mode = student.training
        scores = judge.scores(replace(source, model=student.eval(), name="student", head=None, vector_cache=None))
        student.train(mode)
        rows.append({"seconds": begun - clock["start"], "step": clock["step"], "kept": judge.kept(scores), **scores})
        clock["start"] += time.perf_counter() - begun

    def should_stop() -> bool:
        clock["step"] += 1
        over = time.perf_counter() - clock["start"] > way.minutes * 60
        if clock["step"] in moments or over:
            look()
        return over

    look()
    with tempfile.TemporaryDirectory() as work:
        try:
            outcome = distill(source, student, texts, heldout, way.spec, Path(work), seed, should_stop=should_stop)
            look()
            loss = outcome.curve.query("split == 'heldout'")["loss"].iloc[-1]
        except Stopped:
            loss = float("nan")
    return [{**found, "heldout_loss": loss if found is rows[-1] else float("nan")} for found in rows]


def seconds_to(curve: pd.DataFrame, level: float) -> float | None:
    """Seconds until the share kept first reaches `level`, between two moments by interpolation; None if never."""
    share = np.maximum.accumulate(curve["kept"].to_numpy())
    return float(np.interp(level, share, curve["seconds"])) if share[-1] >= level else None


def measure(quick: bool = False) -> list[dict]:
    keep_memory()
    study = Study(WORK / "study", "workshop")
    spec, source = study.profile.distill, study.source
    every, held = windows(study.corpus.train, spec.windows), sentences(study.corpus.heldout)[:100]
    some = np.random.default_rng(0).permutation(len(every))[: 60 if quick else spec.max_texts]
    texts = [every[i] for i in some]
    judge, found = Judge(study, 30 if quick else ROWS), []
    with tempfile.TemporaryDirectory() as cache:
        layers = sorted({layer for rule in ("late", "alternate") for layer in layer_map(rule, 4, source.layers)})
        both = spec.model_copy(update={"layers": layers})  # those of both layer maps, in one pass
        made: list[TokenizedCorpus] = []
        making = seconds(lambda: made.append(prepare(source, texts, both, Path(cache), len(layers))))
        cached = [made[0], prepare(source, held, both, Path(cache), len(layers))]
        for name, way in ways(spec, LIMIT / 20 if quick else LIMIT).items():
            sets = [prepare(source, some, way.spec, None, 4) for some in (texts, held)] if way.live else cached
            for seed in SEEDS[: 1 if quick else None]:
                curve = train(study, way, *sets, seed, 0.0 if way.live else making, judge)
                found += [{"way": name, "seed": seed, **one} for one in curve]
    table = pd.DataFrame(found)
    if not quick:
        table.to_csv(HERE / "quality.csv", index=False)
        report(table, making)
    return rows_of(table)


def rows_of(table: pd.DataFrame) -> list[dict]:
    """Time to each level, the kit against the other ways."""
    times = {
        (way, level): [seconds_to(curve, level) for _, curve in group.groupby("seed")]
        for way, group in table.groupby("way", sort=False)
        for level in LEVELS
    }
    rows = []
    for level in LEVELS:
        ours = [t for t in times["kit", level] if t is not None]
        for way in table["way"].unique()[1:]:
            theirs = [t for t in times[way, level] if t is not None]
            whole = len(ours) == len(theirs) == table["seed"].nunique()
            missing = None if whole else "not reached by every seed within the time given"
            claim = f"seconds to {level:.0%} of the teacher: kit, compared with {way}"
            rows.append(row(claim, ours or None, theirs or None, "s", True, missing=missing))
    return rows


def report(table: pd.DataFrame, making: float) -> None:
    """Write the picture and the page."""
    figure = style.new_figure("How much of the teacher does a student keep, after how many minutes?", 5)
    ax = figure.subplots()
    for (name, group), colour, line in zip(table.groupby("way", sort=False), PALETTE, ("-", "--", "-.", ":")):
        for i, (_, curve) in enumerate(group.groupby("seed")):
            minutes, kept = curve["seconds"] / 60, 100 * curve["kept"]
            ax.plot(minutes, kept, line, color=colour, marker="o", markersize=4, label=None if i else name)
    for level in LEVELS:
        ax.axhline(100 * level, color="grey", linewidth=0.8, linestyle=":")
    ax.set(xlabel="minutes, the teacher's passes included", ylabel="score above chance (% of the teacher's)")
    style.legend(figure, ax.get_legend_handles_labels()[0])
    figure.savefig(PICTURE, dpi=110)
    rows = []
    for name, group in table.groupby("way", sort=False):
        curves = [curve for _, curve in group.groupby("seed")]
        last = pd.DataFrame([curve.iloc[-1] for curve in curves])
        times = [[seconds_to(curve, level) for curve in curves] for level in LEVELS]
        cells = [" / ".join("-" if t is None else f"{t:.0f}" for t in some) for some in times]
        ends = [" / ".join(f"{v:.3f}" for v in last[column]) for column in ("kept", "similarity", "retrieval")]
        rows.append(f"| {name} | {' | '.join(cells)} | {last['seconds'].mean():.0f} | {' | '.join(ends)} |")
    wanted = [f"seconds to {level:.0%}" for level in LEVELS]
    head = ["way", *wanted, "seconds in all", "kept", "similarity", "retrieval"]
    PAGE.write_text(
        "\n".join([
            "# Quality per minute", "",
            "This page is written by `python -m benchmarks.quality`. A number for each seed. *Kept* is the mean share",
            f"of the teacher's probe score above chance on {' and '.join(TASKS)}.",
            "`-`: not reached within the time given.", "",
            f"![curves]({PICTURE.name})", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *rows, "",
            f"The teacher's passes took {making:.0f} s; the clock of the kit's ways includes them. The other ways were",
            f"stopped after {LIMIT:g} minutes.", "", f"{machine()}; {versions(())['date']}.", "",
        ]), "utf-8",
    )  # fmt: skip


if __name__ == "__main__":
    main(measure)
