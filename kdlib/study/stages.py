"""The stages that write a model, and the arms of the ablations."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kdlib import config, distributed
from kdlib.data.corpus import Corpus, TranslationPairs, sentences
from kdlib.data.tasks import Task, english_twins
from kdlib.distillation.conditioning import condition
from kdlib.distillation.distill import Outcome, distill
from kdlib.distillation.student_init import build_student, layer_map, source_layers
from kdlib.distillation.tokenized_corpus import Pairs, TokenizedCorpus, prepare, training_size
from kdlib.errors import UserError
from kdlib.evaluation.benchmark import Trial, load_trials, run_trials, save_trials
from kdlib.evaluation.metrics import Metric
from kdlib.evaluation.probing import linear_probe, retrieval, similarities
from kdlib.files import fingerprint, read_json, read_table, write_json
from kdlib.models import embedded_teacher
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.models.loading import prefix_of
from kdlib.models.onnx import FILES, FOLDER, export_student, load_exported
from kdlib.models.safetensors_files import weights_folder
from kdlib.pruning.model import prune_encoder
from kdlib.pruning.selection import Selection, keep_all, select_by_coverage, select_tokens, word_list
from kdlib.study.model_card import CardFacts, write_card
from kdlib.study.stage import Context, Keyed, Settings, Source, Stage, Watch

log = logging.getLogger(__name__)
CURVE = ("split", "step", "seconds", "loss")  # columns of a curve of training
SAMPLE = 500  # sentences whose hidden states choose the directions that a narrower student keeps


class Trained(NamedTuple):
    """A trained encoder, the curve of its training, and the training's sizes and speeds."""

    encoder: Encoder
    curve: pd.DataFrame
    facts: dict[str, Any]


def in_precision(encoder: Encoder, bf16: bool) -> Encoder:
    """The same model, read in this precision, without vectors cached in the other one."""
    return encoder if encoder.bf16 == bf16 else replace(encoder, bf16=bf16, vector_cache=None)


class PruneSettings(Settings):
    """The settings of pruning."""

    vocabulary: config.Vocabulary
    languages: list[str]
    teacher: config.Teacher


class Prune(Stage[PruneSettings, Encoder]):
    """The teacher with the pruned vocabulary."""

    name = "vocabulary"
    version = 2
    teacher: Source[Encoder]
    corpus: Source[Corpus]

    @cached_property
    def selection(self) -> Selection:
        """The tokens to keep, with reasons."""
        spec, tokenizer, corpus = self.settings.vocabulary, self.teacher.get().tokenizer, self.corpus.get()
        texts = sentences(corpus.train)
        if not spec.prune:
            return keep_all(tokenizer, texts)
        lists = [word_list(code) for code in self.settings.languages] if spec.wordlist else []
        words = [word for rank in zip_longest(*lists) for word in rank if word is not None]
        prefix = prefix_of(self.settings.teacher)
        more = ([prefix] if prefix else [], spec.characters, spec.max_rows)
        if spec.coverage is None:
            return select_tokens(tokenizer, texts, words, *more)
        held = [sentences(part.heldout) for part in corpus.parts.values()] or [sentences(corpus.heldout)]
        return select_by_coverage(tokenizer, texts, words, *more, coverage=spec.coverage, heldout=held)

    def make(self, folder: Path, watch: Watch) -> None:
        """Prune the teacher, from its files where they hold its weights."""
        ids, spec = self.selection.ids, self.settings.teacher
        teacher = self.teacher.get()
        spare = len(teacher.model.get_input_embeddings().weight) - len(self.selection.counts)
        if spare and spec.source != "embedded":
            log.warning("%s: %d of its embedding rows have no token in its tokenizer; they go", spec.source, spare)
        stored = embedded_teacher.folder() if spec.source == "embedded" else weights_folder(spec.source, spec.revision)
        prune_encoder(teacher, ids, folder, stored)
        np.save(folder / "kept_ids.npy", np.array(ids))

    def load(self, folder: Path) -> Encoder:
        """The pruned teacher; it shares its vector cache with the teacher."""
        return self.context.load_encoder(
            folder, "pruned teacher", self.settings.teacher, kept_ids=self.kept_ids(folder), remembers=True
        )

    def kept_ids(self, folder: Path | None = None) -> np.ndarray:
        """The teacher's id of each kept token: int [rows]."""
        return np.load((folder or self.folder) / "kept_ids.npy")


class ConditionSettings(Settings):
    """The settings of conditioning."""

    condition: config.Condition
    precision: config.Precision
    device: str
    seed: int
    teacher: config.Teacher


class Condition(Stage[ConditionSettings, Trained]):
    """The pruned teacher, trained further on the language."""

    name = "conditioned"
    pruned: Prune
    texts: Keyed[Sequence[str]]
    heldout: Keyed[Sequence[str]]

    def make(self, folder: Path, watch: Watch) -> None:
        """Train, from the last checkpoint where there is one."""
        if distributed.world_size() > 1:
            raise UserError("condition.use: conditioning runs in one process; first: kdlib run --only condition")
        spec, bf16 = self.settings, self.context.bf16(self.settings.precision)
        outcome = condition(
            in_precision(self.pruned.get(), bf16), self.texts.get(), self.heldout.get(), spec.condition, self.work,
            spec.seed, watch.label or "conditioning the teacher", watch.on_point, self.context.cache,
        )  # fmt: skip
        outcome.encoder.save(folder)
        write_training(folder, outcome.curve, outcome.facts)

    def load(self, folder: Path) -> Trained:
        """The conditioned teacher with its training."""
        bf16 = self.context.bf16(self.settings.precision)
        encoder = self.context.load_encoder(folder, "conditioned teacher", self.settings.teacher, bf16)
        return Trained(encoder, *read_training(folder))


class DistillSettings(Settings):
    """The settings of distillation. card: facts of the student's model card."""

    student: config.Student
    distill: config.Distill
    device: str
    seed: int
    teacher: config.Teacher
    card: CardFacts


class Distill(Stage[DistillSettings, Trained]):
    """The student, distilled from the pruned or the conditioned teacher.

    With objectives of translations, `pairs` are training and held-out pairs, and `reader` is the teacher that reads the
    translations, with its whole vocabulary.
    """

    name = "student"
    collective = True
    source: Prune | Condition
    corpus: Source[Corpus]
    texts: Keyed[Sequence[str]]
    heldout: Keyed[Sequence[str]]
    pairs: Keyed[tuple[TranslationPairs, TranslationPairs]] | None = None
    reader: Keyed[Encoder] | None = None

    @property
    def bf16(self) -> bool:
        """Whether this distillation computes in bfloat16."""
        return self.context.bf16(self.settings.distill.precision)

    @property
    def teacher(self) -> Encoder:
        """The encoder that the student learns from."""
        found = self.source.get()
        return in_precision(found.encoder if isinstance(found, Trained) else found, self.bf16)

    @property
    def copied_layers(self) -> list[int]:
        """The teacher layers that the student copies, 1 = first; none for a random start."""
        spec = self.settings.student
        return [] if spec.init == "random" else source_layers(spec.init, spec.layers, self.teacher.model.config)

    @property
    def compared_layers(self) -> list[int]:
        """The teacher layer that each student layer is compared with, 1 = first."""
        return layer_map(
            self.settings.distill.layers, self.settings.student.layers, self.teacher.layers, "distill.layers"
        )

    def start(self, init: config.Init | None = None) -> Encoder:
        """The student before distillation; `init` replaces the student's own start."""
        spec = self.settings.student if init is None else self.settings.student.model_copy(update={"init": init})
        sample = [encoding.ids for encoding in self.teacher.tokenize(sentences(self.corpus.get().train)[:SAMPLE])]
        model = build_student(self.teacher.model, spec, self.settings.seed, sample).to(self.context.device)
        sentence = self.teacher.sentence.after(model.config.hidden_size)
        return replace(
            self.teacher, model=model, name=start_name(init), head=None, vector_cache=None, sentence=sentence
        )

    def prepare(self, texts: Sequence[str], heldout: bool = False) -> TokenizedCorpus:
        """Tokenise texts and get the teacher's states that the student is compared with."""
        pairs = None
        if self.pairs and self.reader:
            given = self.pairs.get()[heldout]
            pairs = Pairs(given.texts, given.translations, in_precision(self.reader.get(), self.bf16))
        spec, depth = self.settings.distill, self.settings.student.layers
        return prepare(self.teacher, texts, spec, self.context.cache, depth, pairs)

    @cached_property
    def training_sets(self) -> tuple[TokenizedCorpus, TokenizedCorpus]:
        """The training texts and the held-out sentences, prepared."""
        with distributed.main_process_first():
            return self.prepare(self.texts.get()), self.prepare(self.heldout.get(), heldout=True)

    @property
    def training_size(self) -> tuple[int, int]:
        """Steps and tokens of the training."""
        return training_size(self.training_sets[0], self.settings.distill, self.settings.seed)

    def train(self, train: TokenizedCorpus, heldout: TokenizedCorpus, work: Path, watch: Watch) -> Outcome:
        """Distil on `train`. An unfinished training under `work` is resumed."""
        spec, start = self.settings.distill, self.start().model
        if self.settings.student.init == "random" or start.config.hidden_size != self.teacher.hidden:
            spec = spec.model_copy(update={"freeze_embeddings": False})  # drawn at random: nothing to keep
        label, seed = watch.label or "distilling the student", self.settings.seed
        return distill(self.teacher, start, train, heldout, spec, work, seed, label, watch.on_point, watch.should_stop)

    def make(self, folder: Path, watch: Watch) -> None:
        """Train, and write the student."""
        outcome = self.train(*self.training_sets, self.work, watch)
        if distributed.rank() == 0:
            made = replace(
                self.teacher, model=outcome.student, name="student", head=outcome.head, vector_cache=None,
                sentence=outcome.sentence,
            )  # fmt: skip
            made.save(folder)
            write_training(folder, outcome.curve, outcome.facts)

    def add_unsealed(self, folder: Path) -> None:
        """Write the model card; the benchmark's numbers are added later."""
        write_card(folder, self.settings.card, self.context.path)

    def load(self, folder: Path) -> Trained:
        """The student with its training."""
        encoder = self.context.load_encoder(folder, "student", self.settings.teacher, self.bf16, remembers=True)
        return Trained(encoder, *read_training(folder))


class Int8(Stage[Settings, Encoder]):
    """An encoder as an ONNX file with 8-bit weights."""

    name = "int8"
    model: Keyed[Encoder]

    def make(self, folder: Path, watch: Watch) -> None:
        """Export the encoder."""
        export_student(self.model.get(), folder)
        (folder / FOLDER / FILES["onnx fp32"]).unlink()

    def load(self, folder: Path) -> Encoder:
        """The exported encoder."""
        return load_exported(folder)


def start_name(init: config.Init | None) -> str:
    """The name of an undistilled student in results."""
    return "random weights" if init == "random" else "no distillation"


def write_training(folder: Path, curve: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Write the curve and the facts of a training."""
    curve.to_csv(folder / "curve.csv", index=False)
    write_json(folder / "facts.json", facts)


def read_training(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read what `write_training` wrote."""
    return read_table(folder / "curve.csv", CURVE), read_json(folder / "facts.json")


class ScoreSettings(Settings):
    """The settings of an arm's scores. probes: the benchmark's settings for linear probes."""

    probes: config.Benchmark
    tasks: list[str]
    precision: config.Precision


class Scores(NamedTuple):
    """The trials of a model and its other numbers.

    Besides those of probes there are trials of the task "similarity", and of transfer, whose metric is "transfer",
    where the model has the teacher's width.
    """

    trials: list[Trial]
    numbers: dict[str, float]


class Scored(Stage[ScoreSettings, Scores]):
    """The scores of an arm, or of a model for reference: linear probes, similarity to the teacher, transfer, size.

    `teacher` and `compared` are the pruned teacher and the texts whose vectors are compared. Transfer is measured where
    there is a `reader`, the teacher with its whole vocabulary, that reads the translations of `tested`.
    """

    room = "ablations"
    said = "the arm is computed again"
    teacher: Prune
    compared: Keyed[Sequence[str]]
    tasks: Source[list[Task]]
    reader: Source[Encoder] | None = None
    tested: Keyed[TranslationPairs] | None = None

    def score(self, encoder: Encoder, folder: Path, keys: Mapping[str, str] | None = None, **numbers: float) -> None:
        """Probe an encoder on the arms' tasks, compare its vectors with the teacher's, and write all that.

        Args:
            encoder: the student.
            folder: where to write.
            keys: of a model of the benchmark, to use the benchmark's trials.
            numbers: to be written too.
        """
        spec, tasks = self.settings.probes, [task for task in self.tasks.get() if task.name in self.settings.tasks]
        kept = self.context.path / "benchmark" if keys else None
        trials = run_trials({encoder.name: encoder}, tasks, spec, "probe", kept, keys)
        held, target = self.compared.get(), text_vectors(self.teacher.get(), self.compared.get())[:, 0]
        vectors = text_vectors(encoder, held)[:, 0]
        if vectors.shape == target.shape:
            cosines = similarities(vectors, target).astype(float)
            same = Metric("similarity", np.stack([cosines, np.ones_like(cosines)], 1))
            trials += [Trial(encoder.name, "similarity", "probe", seed, [same]) for seed in spec.seeds]
            trials += self.transfer(encoder, self.reader.get()) if self.reader else []
        save_trials(folder / "trials.npz", trials)
        write_json(folder / "numbers.json", dict(numbers, parameters=encoder.parameters))

    def transfer(self, encoder: Encoder, reader: Encoder) -> list[Trial]:
        """Whether the student's vectors are where the teacher's vectors of another language are.

        The teacher reads that language, and the student its own, for which it has the vocabulary. Retrieval finds the
        translation of each tested sentence: from the student's vectors ("retrieval into eng"), and from the teacher's
        ("retrieval from eng"). For zero-shot transfer ("topic from eng") a probe is trained on the teacher's vectors of
        English rows, and tested on the student's vectors of the task's test rows. The metric is the share of right
        answers.
        """
        spec, shares = self.settings.probes, []
        if self.tested and (pairs := self.tested.get()).texts:
            mine, theirs = (
                text_vectors(e, texts)[:, 0] for e, texts in ((encoder, pairs.texts), (reader, pairs.translations))
            )
            for way, sides in (("into", (mine, theirs)), ("from", (theirs, mine))):
                hits = retrieval(*sides).astype(float)
                found = np.stack([hits, np.ones_like(hits)], 1)
                shares += [(f"retrieval {way} {pairs.language}", seed, found) for seed in spec.seeds]
        for task in self.tasks.get():
            twins = english_twins(task)
            if twins is None:
                continue
            task = task.small(None, spec.probe_test_rows)
            train, test = text_vectors(reader, twins.texts)[:, 0], text_vectors(encoder, task.test.texts)[:, 0]
            targets, places = np.array(twins.targets), np.empty((0, 2), int)
            for seed in spec.seeds:
                metrics = linear_probe(task, train, targets, test, places, seed, spec.probe_share)
                items = next(metric.items for metric in metrics if metric.name == "accuracy")
                shares.append((f"{task.name} from eng", seed, items))
        return [Trial(encoder.name, task, "probe", seed, [Metric("transfer", items)]) for task, seed, items in shares]

    def load(self, folder: Path) -> Scores:
        """The scores."""
        return Scores(load_trials(folder / "trials.npz"), read_json(folder / "numbers.json"))


class Reference(Scored):
    """The scores of a model that arms are compared with."""

    name = "reference"
    version = 2
    model: Keyed[Encoder]

    def make(self, folder: Path, watch: Watch) -> None:
        """Score the model."""
        encoder = self.model.get()
        self.score(encoder, folder, {encoder.name: trial_key(self.context, encoder.name, self.model)})


class ArmScores(Scored):
    """The scores of an arm with one seed: its student is distilled and scored, and not kept.

    `student` is its distillation; `arm_texts` are the texts of which `distill.fraction` is drawn.
    """

    name = "arm"
    version = 2
    student: Distill
    arm_texts: Keyed[Sequence[str]]

    def make(self, folder: Path, watch: Watch) -> None:
        """Distil the arm's student and score it. An unfinished training is resumed."""
        arm, spec = self.student, self.student.settings
        train, heldout = arm.prepare(self.arm_texts.get()), arm.prepare(arm.heldout.get(), heldout=True)
        order = np.random.default_rng(spec.seed).permutation(len(train)).tolist()
        train = train.part(order[: max(1, round(len(train) * spec.distill.fraction))])
        outcome = arm.train(train, heldout, self.work, watch)
        outcome.curve.to_csv(folder / "curve.csv", index=False)
        loss = float(outcome.curve.query("split == 'heldout'")["loss"].iloc[-1])
        student = replace(
            arm.teacher, model=outcome.student, name=watch.label, head=None, vector_cache=None,
            sentence=outcome.sentence,
        )  # fmt: skip
        self.score(student, folder, heldout_loss=loss, steps=outcome.facts["steps"])


def trial_key(context: Context, name: str, model: Keyed[Encoder]) -> str:
    """A fingerprint of all that a model's vectors depend on, for `run_trials`."""
    return fingerprint(name, model.key, context.bf16())
