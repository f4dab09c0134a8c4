"""The reports: rows of results, one class for each notebook that records some."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib import config
from kdlib.data.corpus import Corpus, sentences
from kdlib.data.tasks import Task
from kdlib.device import processor
from kdlib.distillation.objectives import constant_loss
from kdlib.errors import UserError
from kdlib.evaluation.benchmark import Trial, run_trials, trial_rows
from kdlib.evaluation.cloze import mlm_rows
from kdlib.evaluation.paired_tests import paired_rows
from kdlib.evaluation.probing import cka_rows, layer_probe, retrieval_rows, segmentation, similarity
from kdlib.evaluation.retention import retention_rows
from kdlib.evaluation.speed import size_rows, speed_rows
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.models.tokenizer_files import token_list
from kdlib.pruning.selection import count_tokens, coverage_curve, main_script
from kdlib.pruning.verify import verify
from kdlib.study.arms import INT8, STATIC, UNDISTILLED, Arm
from kdlib.study.stage import Context, Keyed, Report, Settings, Source, Watch
from kdlib.study.stages import ArmScores, Condition, Distill, Prune, Reference, trial_key

Parallel = Source[dict[str, list[str]]]


class ProbeSettings(Settings):
    """The settings of probing."""

    probe: config.Probe
    language: str
    seed: int
    precision: config.Precision


class ProbeReport(Report[ProbeSettings]):
    """What the teacher knows of the language (notebook 01)."""

    name = "probe"
    teacher: Source[Encoder]
    corpus: Source[Corpus]
    parallel: Parallel
    tasks: Source[list[Task]]

    def segmentation_rows(self) -> list[dict]:
        """Fertility, unknown tokens and split words of the teacher's tokenizer, per language.

        Without parallel sentences in the language we use held-out text and give one row.
        """
        parallel, language = self.parallel.get(), self.settings.language
        texts = parallel or _heldout(self.corpus.get(), language)
        return [
            dict(
                model="teacher", language=code, metric=metric, value=value, n=len(lines),
                method="parallel" if parallel else "heldout",
            )
            for code, lines in texts.items()
            for metric, value in segmentation(self.teacher.get().tokenizer, lines).items()
        ]  # fmt: skip

    def usage_rows(self) -> list[dict]:
        """How much of the teacher's vocabulary the corpus uses."""
        counts = count_tokens(self.teacher.get().tokenizer, sentences(self.corpus.get().train))
        used, row = int((counts > 0).sum()), dict(model="teacher", n=int(counts.sum()))
        shares = {"vocabulary_used": used, "vocabulary_share": used / len(counts)}
        return [row | dict(metric=metric, value=value) for metric, value in shares.items()]

    def layer_probe_rows(self) -> list[dict]:
        """A linear probe at every layer, on every task."""
        spec, teacher = self.settings.probe, self.teacher.get()
        found = (layer_probe(teacher, t, spec.train_rows, spec.test_rows, self.settings.seed) for t in self.tasks.get())
        return [row for rows in found for row in rows]

    def retrieval_rows(self) -> list[dict]:
        """Translation retrieval at every layer; no rows without parallel sentences."""
        parallel, language = self.parallel.get(), self.settings.language
        usable = language in parallel and len(parallel) > 1
        return retrieval_rows(self.teacher.get(), parallel, language) if usable else []

    def cka_rows(self) -> list[dict]:
        """Linear CKA between all layers."""
        held = sentences(self.corpus.get().heldout)[: self.settings.probe.cka_sentences]
        return cka_rows(self.teacher.get(), held)

    def cloze_rows(self) -> list[dict]:
        """Pseudo-perplexity and cloze accuracy; no rows for a teacher without a masked-language head."""
        teacher, held = self.teacher.get(), sentences(self.corpus.get().heldout)
        return mlm_rows(teacher, held, "teacher", self.settings.probe.cloze_sentences) if teacher.head else []


class PruneReportSettings(Settings):
    """The settings of the report on pruning. coverage: the share of held-out tokens asked for."""

    language: str
    coverage: float | None = None


class PruneReport(Report[PruneReportSettings]):
    """What pruning keeps, drops and costs (notebook 02)."""

    name = "prune"
    makes = "pruned"
    pruned: Prune
    teacher: Source[Encoder]
    corpus: Source[Corpus]
    parallel: Parallel

    def verify(self, texts: list[str] | None = None, states_of: int = 100) -> pd.DataFrame:
        """Check that pruning changed nothing, on these texts (default: the training text); see `pruning.verify`."""
        given = sentences(self.corpus.get().train) if texts is None else texts
        return verify(self.teacher.get(), self.pruned.get(), self.pruned.kept_ids(), given, states_of)

    def rows(self) -> list[dict]:
        """Sizes, tokens and unknown tokens before and after; what is kept by script and reason; coverage by size."""
        full, pruned, chosen = self.teacher.get(), self.pruned.get(), self.pruned.selection
        corpus, parallel, language = self.corpus.get(), self.parallel.get(), self.settings.language
        texts = [("corpus", language, sentences(corpus.train))]
        heldout = _heldout(corpus, language)
        texts += [("heldout", code, lines) for code, lines in heldout.items()]
        texts += [("parallel", code, parallel[code]) for code in heldout if code in parallel and language in parallel]
        rows = size_rows(full, "teacher") + size_rows(pruned, "pruned teacher")
        for name, encoder in (("teacher", full), ("pruned teacher", pruned)):
            for method, code, lines in texts:
                facts = segmentation(encoder.tokenizer, lines)
                rows += [
                    dict(model=name, language=code, metric=metric, method=method, value=facts[metric], n=len(lines))
                    for metric in ("fertility", "unknown_rate")
                ]
        tokens, kept = token_list(full.tokenizer), set(chosen.ids)
        spare = len(full.model.get_input_embeddings().weight) - len(tokens)
        rows.append(dict(model="teacher", metric="rows_without_token", value=spare))
        scripts = pd.DataFrame(
            {"script": [main_script(token) for token in tokens], "kept": [i in kept for i in range(len(tokens))]}
        )
        shared = dict(model="pruned teacher")
        for script, keep, count in scripts.value_counts().reset_index().itertuples(index=False):
            rows.append(shared | dict(metric="rows_kept" if keep else "rows_cut", arm=script, value=count))
        for reason, count in pd.Series(chosen.reason).value_counts().items():
            rows.append(shared | dict(metric="rows_reason", arm=reason, value=count))
        held = [("heldout", code, count_tokens(full.tokenizer, lines)) for code, lines in heldout.items()]
        for method, code, counts in [("corpus", language, chosen.counts), *held]:
            shared |= dict(metric="coverage", method=method, language=code, n=int(counts.sum()))
            rows += [shared | dict(x=size, value=share) for size, share in coverage_curve(chosen, counts)]
        if self.settings.coverage:
            rows.append(
                dict(model="pruned teacher", metric="rows_found", x=self.settings.coverage, value=len(chosen.ids))
            )
        return rows


def _heldout(corpus: Corpus, language: str) -> dict[str, Sequence[str]]:
    """The held-out sentences by language."""
    parts = corpus.parts or {language: corpus}
    return {code: sentences(part.heldout) for code, part in parts.items()}


class ClozeSettings(Settings):
    """The settings of the report on conditioning."""

    cloze_sentences: int
    precision: config.Precision


class ConditionReport(Report[ClozeSettings]):
    """What conditioning changed (notebook 02b)."""

    name = "condition"
    makes = "conditioned"
    pruned: Prune
    conditioned: Condition
    corpus: Source[Corpus]

    def rows(self) -> list[dict]:
        """The curve and the facts of the training."""
        trained, shared = self.conditioned.get(), dict(model="conditioned teacher")
        rows = [
            shared
            | dict(metric="perplexity", method=p["split"], x=p["seconds"], n=int(p["step"]))
            | {key: p[name] for key, name in (("value", "perplexity"), ("low", "low"), ("high", "high")) if name in p}
            for p in trained.curve.to_dict("records")
        ]
        return rows + [shared | dict(metric=name, value=float(value)) for name, value in trained.facts.items()]

    def cloze_rows(self) -> list[dict]:
        """Pseudo-perplexity and cloze accuracy, before (where the teacher has a head) and after conditioning."""
        texts, before = sentences(self.corpus.get().heldout), self.pruned.get()
        encoders = [*([before] if before.head is not None else []), self.conditioned.get().encoder]
        return [row for e in encoders for row in mlm_rows(e, texts, e.name, self.settings.cloze_sentences)]


class NoSettings(Settings):
    """For reports that depend on their inputs only."""


class DistillReport(Report[NoSettings]):
    """The distillation (notebook 03)."""

    name = "distill"
    makes = "student"
    student: Distill
    heldout: Keyed[Sequence[str]]

    def rows(self) -> list[dict]:
        """Curve and facts of the training, and the similarity to the teacher before and after."""
        student, curve, facts = self.student.get()
        losses = [column for column in curve if column not in ("split", "step", "seconds")]
        rows = [
            dict(metric=metric, method=point["split"], x=point["seconds"], n=int(point["step"]), value=point[metric])
            for point in curve.to_dict("records")
            for metric in losses
            if not pd.isna(point[metric])  # of translations, where no batch since the last point had any
        ]
        rows = [dict(model="student") | row for row in rows + [dict(metric=m, value=v) for m, v in facts.items()]]
        for metric, layers in (
            ("copied_layer", self.student.copied_layers),
            ("compared_layer", self.student.compared_layers),
        ):
            rows += [dict(model="student", metric=metric, x=i, value=layer) for i, layer in enumerate(layers, 1)]
        held = self.heldout.get()
        states = self.student.prepare(held).cached
        if states and "hidden" in losses:
            value = constant_loss(states.layers[layer] for layer in self.student.compared_layers)
            rows.append(dict(model="constant", metric="hidden", method="heldout", value=value, n=len(held)))
        target = text_vectors(self.student.teacher, held)[:, 0]
        for encoder in (self.student.start(), student):
            vectors = text_vectors(encoder, held)[:, 0]
            if vectors.shape == target.shape:
                value = similarity(vectors, target)
                rows.append(dict(model=encoder.name, metric="similarity", method="heldout", value=value, n=len(held)))
        return rows


class BenchmarkSettings(Settings):
    """The settings of the benchmark. tasks: method ("probe", "finetune", "fewshot") -> names of its tasks."""

    benchmark: config.Benchmark
    tasks: dict[str, list[str]]
    precision: config.Precision


# Models that a method leaves out. The pruned teacher computes what the teacher does on text of the corpus; files with
# 8-bit weights and tables of token vectors are not trained, and have one layer to look at.
MAKE = "make"  # a unit of work that makes a model and tries nothing
LEFT_OUT = {
    "probe": (),
    "best layer": ("pruned teacher", "tf-idf", *STATIC, *INT8, *UNDISTILLED),
    "finetune": ("pruned teacher", *STATIC, *INT8),
    "fewshot": ("pruned teacher", *STATIC, *INT8, *UNDISTILLED),
}
# As fast as the pruned teacher and the student; TF-IDF has no weights to count.
UNTIMED = ("conditioned teacher", "blank", "tf-idf", *UNDISTILLED)
PAIRS = (
    ("pruned teacher", "teacher"),
    (INT8[0], "pruned teacher"),
    (INT8[1], "student"),
)  # compared besides the student


class BenchmarkReport(Report[BenchmarkSettings]):
    """The student beside its teacher and other models (notebook 04). models: by their names in results."""

    name = "benchmark"
    tasks: Source[list[Task]]
    corpus: Source[Corpus]

    def __init__(
        self, context: Context, settings: BenchmarkSettings, models: Mapping[str, Keyed[Encoder]], **read: Any
    ):
        super().__init__(context, settings, **read)
        self.inputs |= {f"model {name}": model for name, model in models.items()}
        self.models = models

    @cached_property
    def contestants(self) -> dict[str, Keyed[Any]]:
        """The models that can be made: not every family of models can be written with 8-bit weights."""
        found = dict(self.models)
        for name in INT8:
            try:
                if name in found:
                    found[name].get()
            except UserError as error:
                warnings.warn(f"{name}: left out ({error})", stacklevel=2)
                del found[name]
        return found

    def trials(self, method: str, only: Sequence[str] = ()) -> list[Trial]:
        """Every model on every task with every seed. A finished trial is kept in `benchmark/`.

        Args:
            method: "probe" (linear probe), "best layer", "finetune" or "fewshot" (fine-tuning on a few rows per class).
            only: these models; none: all.
        """
        models = {name: self.models[name] for name in only} or self._compared(method)
        self.context.ahead(self.name, [(MAKE, name) for name in models])  # each by one worker, before its trials
        # Probes with other seeds use the same vectors: one worker reads the texts once.
        seeds = self.settings.benchmark.seeds if method in ("finetune", "fewshot") else [None]
        tasks = self.settings.tasks[method]
        self.context.ahead(
            self.name, [(method, name, task, seed) for name in models for task in tasks for seed in seeds]
        )
        return self._trials(method, models, self.settings.tasks[method], self.settings.benchmark)

    def unit(self, method: str, model: str, task: str = "", seed: int | None = None) -> None:
        """The trials of one model on one task with one seed, or with all; they are kept. `MAKE`: the model alone."""
        if method == MAKE:
            self.models[model].get()
            return
        spec = self.settings.benchmark
        spec = spec if seed is None else spec.model_copy(update={"seeds": [seed]})
        self._trials(method, {model: self.models[model]}, [task], spec)

    def _compared(self, method: str) -> dict[str, Keyed[Any]]:
        return {name: model for name, model in self.contestants.items() if name not in LEFT_OUT[method]}

    def _trials(
        self, method: str, models: Mapping[str, Keyed[Any]], names: Sequence[str], spec: config.Benchmark
    ) -> list[Trial]:
        keys = {name: trial_key(self.context, name, model) for name, model in models.items()}
        tasks = [task for task in self.tasks.get() if task.name in names]
        encoders = {name: model.get for name, model in models.items()}
        return run_trials(encoders, tasks, spec, method, self.context.path / "benchmark", keys)

    def paired_rows(self, trials: Sequence[Trial]) -> list[dict]:
        """The student against every other model, and `PAIRS`, tested on the same seeds and items."""
        spec, names = self.settings.benchmark, list(self.contestants)
        pairs = [("student", name) for name in names if name not in ("student", INT8[1])]
        rows = paired_rows(trials, pairs + [pair for pair in PAIRS if pair[0] in names], spec)
        return [*rows, dict(model="student", metric="margin", value=spec.margin)]

    def retention_rows(self, trials: Sequence[Trial]) -> list[dict]:
        """Chance, room and retention by linear probe; see `retention.retention_rows`."""
        return retention_rows(trials, self.tasks.get(), self.settings.benchmark)

    def efficiency_rows(self) -> list[dict]:
        """Sizes of all models, and speeds of those whose speeds differ."""
        encoders = {name: model.get() for name, model in self.contestants.items() if name != "tf-idf"}
        rows = [row for name, encoder in encoders.items() for row in size_rows(encoder, name)]
        timed = {name: encoder for name, encoder in encoders.items() if name not in UNTIMED}
        texts = sentences(self.corpus.get().heldout)[:1000]
        machine = dict(model="machine", metric="threads", value=torch.get_num_threads(), arm=processor())
        return [*rows, machine, *speed_rows(timed, texts, self.settings.benchmark.latency_runs)]


class AblationSettings(Settings):
    """The settings of the report on the ablations. benchmark: margin and resamples of comparisons."""

    benchmark: config.Benchmark


class AblationReport(Report[AblationSettings]):
    """The ablations (notebook 05).

    Args:
        arms: the grid, each arm with its scores, one for each seed.
        references: models to compare with.
    """

    name = "ablations"

    def __init__(
        self,
        context: Context,
        settings: AblationSettings,
        arms: Sequence[tuple[Arm, list[ArmScores]]],
        references: Mapping[str, Reference],
    ):
        super().__init__(context, settings)
        self.inputs |= {f"{arm.family}/{arm.name}/{i}": s for arm, seeds in arms for i, s in enumerate(seeds)}
        self.inputs |= dict(references)
        self.arms, self.references = arms, references

    def rows(self, wanted: Sequence[str] = (), on_arm: Callable[[Arm, list[dict]], None] | None = None) -> list[dict]:
        """Distil and score every arm, and compare it with the first arm of its family.

        The teacher and the undistilled student are shown for reference. Scores of the probes are averaged over tasks;
        the similarity to the teacher and each kind of transfer are tasks by themselves.

        Args:
            wanted: run only these arms, "family" or "family/arm"; of the others, finished ones are shown.
            on_arm: called with each arm and its rows.
        """
        rows = [
            row | dict(model=name, method="reference")
            for name, stage in self.references.items()
            for row in self._rows(stage.get().trials, [stage.get().numbers])
        ]
        families: dict[str, list[Trial]] = {}
        names = [f"{arm.family}/{arm.name}" for arm, _ in self.arms]
        asked = [not wanted or bool({arm.family, name} & set(wanted)) for (arm, _), name in zip(self.arms, names)]
        self.context.ahead(
            self.name,
            (
                (arm.family, arm.name, i)
                for (arm, stages), now in zip(self.arms, asked)
                for i, stage in enumerate(stages)
                if now and not stage.intact()
            ),
        )
        for (arm, stages), now in zip(self.arms, asked):
            if not now and not all(stage.intact() for stage in stages):
                continue
            found = [self.unit(arm.family, arm.name, i) for i in range(len(stages))]
            trials = [replace(trial, model=arm.name) for scores in found for trial in scores.trials]
            families.setdefault(arm.family, []).extend(trials)
            made = self._rows(trials, [scores.numbers for scores in found])
            made = [row | dict(model="student", method=arm.family, arm=arm.name, x=arm.x) for row in made]
            rows += made
            if on_arm:
                on_arm(arm, made)
        for family, trials in families.items():
            for part, rows_of in _parts(trials):
                names = list(dict.fromkeys(trial.model for trial in part))  # a narrower student has no similarity
                pairs = [(name, names[0]) for name in names[1:] if names[0] == trials[0].model]
                compared = rows_of(paired_rows(part, pairs, self.settings.benchmark))
                rows += [row | dict(model="student", method=family, arm=row["model"], x=None) for row in compared]
        return rows

    def unit(self, family: str, name: str, number: int) -> Any:
        """Distil and score one arm with one of its seeds."""
        stages = next(stages for arm, stages in self.arms if (arm.family, arm.name) == (family, name))
        return stages[number].get(Watch(label=f"arm {family} {name}, {number + 1} of {len(stages)}"))

    def _rows(self, trials: Sequence[Trial], numbers: Sequence[Mapping[str, float]]) -> list[dict]:
        """Rows of a model's trials, and of its other numbers, averaged over seeds."""
        seeds = list(dict.fromkeys(trial.seed for trial in trials))
        spec = self.settings.benchmark.model_copy(update={"seeds": seeds})
        rows = [row for part, rows_of in _parts(trials) for row in rows_of(trial_rows(part, spec))]
        return rows + [dict(metric=name, value=float(np.mean([n[name] for n in numbers]))) for name in numbers[0]]


def _bare(rows: Sequence[dict]) -> list[dict]:
    """Rows of a measure that stands alone: without an average, which it is itself. The similarity has no task."""
    kept = [row for row in rows if row["task"] != "average"]
    return [row | dict(task=None) if row["task"] == "similarity" else row for row in kept]


def _parts(trials: Sequence[Trial]) -> list[tuple[list[Trial], Callable[[Sequence[dict]], Sequence[dict]]]]:
    """The trials of probes, and those of each other measure; each part with what its rows go through."""
    parts: dict[str, list[Trial]] = {"": []}
    for trial in trials:
        alone = trial.metrics[0].name in ("similarity", "transfer")
        parts.setdefault(trial.task if alone else "", []).append(trial)
    return [(part, _bare if task else list) for task, part in parts.items()]


class FigureReport(Report[NoSettings]):
    """The figures (notebook 06). They are out of date when any other report is."""

    name = "figures"
