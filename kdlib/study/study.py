"""A study: the artefacts of a run, each taken from the run folder or made, in the order the data flows.

Every notebook opens a `Study` and asks it for what it needs; so any notebook runs alone, and a second run of the
same profile finds what is already there.
"""

import copy
import itertools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from kdlib import config, distributed
from kdlib.data.corpus import Corpus, Document, load_corpus, sentences, windows, without
from kdlib.data.lazy import Lazy
from kdlib.data.sources import digest, embedded_rows, read_rows
from kdlib.data.tasks import Task, load_tasks, origins
from kdlib.device import pick_device, use_bf16
from kdlib.distillation import conditioning
from kdlib.distillation.distill import Outcome, TokenizedCorpus, distill, prepare, training_size
from kdlib.distillation.objectives import check_objectives
from kdlib.distillation.student_init import build_student, layer_map
from kdlib.errors import UserError
from kdlib.evaluation.benchmark import Trial, average_row, rows_of
from kdlib.evaluation.benchmark import run as run_trials
from kdlib.evaluation.cloze import mlm_rows
from kdlib.evaluation.paired_tests import paired_rows
from kdlib.evaluation.probing import cka_rows, layer_probe, retrieval_rows, segmentation, similarity
from kdlib.evaluation.speed import size_rows, speed_rows
from kdlib.files import SEAL, fingerprint, flaw, new_file, new_folder, read_json, read_table, seal, write_json
from kdlib.models import embedded_teacher
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.models.loading import load_encoder, load_teacher, prefix_of
from kdlib.models.safetensors_files import weights_folder
from kdlib.models.tokenizer_files import token_list
from kdlib.models.vector_cache import VectorCache, body_key
from kdlib.pruning.model import prune_encoder
from kdlib.pruning.selection import (
    Selection,
    count_tokens,
    coverage_curve,
    keep_all,
    main_script,
    select_tokens,
    word_list,
)
from kdlib.pruning.verify import verify
from kdlib.study import arms as ablate
from kdlib.study.model_card import write_card
from kdlib.study.run import find_run

log = logging.getLogger(__name__)
STAGES = ["probe", "prune", "condition", "distill", "benchmark", "ablations", "figures"]
NOTEBOOKS = {
    "probe": "01_probe_the_teacher",
    "prune": "02_prune_the_vocabulary",
    "condition": "02b_condition_the_teacher",
    "distill": "03_distill_a_student",
    "benchmark": "04_benchmark_students",
    "ablations": "05_ablations",
    "figures": "06_figures",
}
READS = {  # what a stage depends on, besides the stages before it: sections of the profile, and `Study.data` by name
    "probe": ["language", "seed", "teacher", "corpus", "parallel", "tasks", "probe"],
    "prune": ["language", "seed", "teacher", "corpus", "vocabulary"],
    "condition": ["device", "condition", "training"],
    "distill": ["device", "student", "distill", "training"],
    "benchmark": ["tasks", "students", "baselines", "benchmark"],
    "ablations": ["tasks", "benchmark", "condition", "student", "distill", "ablations", "training"],
    "figures": ["probe", "tasks", "parallel", "condition", "students", "baselines", "benchmark", "ablations"],
}
BEFORE = {"condition": "prune", "benchmark": "distill", "ablations": "prune", "figures": "distill"}
CURVE = ("split", "step", "seconds", "loss")  # columns of a curve of training
SAMPLE = 500  # sentences whose hidden states say which directions a narrower student keeps


def stage_key(profile: config.Profile, stage: str, data: Mapping[str, str]) -> str:
    """A fingerprint of all that a stage's result depends on. data: of the run, as `Study.data` has it."""
    full = profile.model_dump()
    sections = {name: [full.get(name), data.get(name)] for name in READS[stage]}
    if stage == "condition":
        del full["condition"]["use"]  # says who is distilled, not how conditioning is done
    before = _before(profile, stage)
    return fingerprint(sections, stage_key(profile, before, data) if before else None)


def _before(profile: config.Profile, stage: str) -> str | None:
    """The stage whose result another starts from."""
    if stage == "distill":
        return "condition" if profile.condition.use else "prune"
    return BEFORE.get(stage)


def _parts(text: str | tuple[str, str] | list[str]) -> tuple[str, ...]:
    """The sentences of a task's text, of either kind."""
    return (text,) if isinstance(text, str) else text if isinstance(text, tuple) else (" ".join(text),)


class Study:
    """A run's artefacts: corpus, tasks, teacher, pruned teacher, student, and the rows of each stage."""

    def __init__(self, run_dir: str | Path | None = None, profile: str = "workshop", overrides: Any = ()):
        disable_progress_bar()  # of loading and saving, which take a second; long work shows its own
        self.run = find_run(run_dir, profile, overrides)
        self.profile = self.run.profile
        arms = [arm.profile for arm in ablate.arms(self.profile)]
        for profile in (self.profile, *arms, *ablate.students(self.profile).values()):
            check_objectives(profile.distill.objectives)
        self.device = pick_device(self.profile.device)
        self.bf16 = use_bf16(self.profile.distill.precision, self.device)

    # -- what everything starts from

    @cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.profile, self.run.path / "cache")

    @cached_property
    def tasks(self) -> list[Task]:
        tasks = load_tasks(self.profile, self.corpus)
        write_json(self.run.path / "sources.json", origins(self.corpus, tasks))
        return tasks

    @cached_property
    def parallel(self) -> dict[str, list[str]]:
        """The parallel sentences by language; empty without any, or where the study's language is not among them."""
        spec = self.profile.parallel
        if spec is None or self.profile.language not in spec.languages:
            return {}
        rows = embedded_rows("parallel") if spec.source == "embedded" else read_rows(spec, spec.languages)
        missing = [code for code in spec.languages if code not in rows]
        if missing:
            raise UserError(f"parallel.languages: no column {', '.join(missing)}; there are {', '.join(rows.columns)}")
        whole = rows[spec.languages].map(lambda text: isinstance(text, str) and bool(text.strip())).all(axis=1)
        rows = rows[whole][: self.profile.probe.languages_rows]
        return {code: list(rows[code]) for code in spec.languages}

    @cached_property
    def data(self) -> dict[str, str]:
        """Fingerprints of the texts and labels that are read, by kind; of what they are, not of where they lie.

        corpus, tasks, parallel; training: the corpus without what the tasks are tested on.
        """
        return {
            "corpus": self.corpus.origin.sha256,
            "tasks": fingerprint({task.name: task.origin.sha256 for task in self.tasks}),
            "parallel": digest(self.parallel.items()),
            "training": digest(document.sentences for document in self._train_documents),
        }

    def key(self, stage: str) -> str:
        """A fingerprint of all that a stage's result depends on: parameters and data."""
        return stage_key(self.profile, stage, self.data)

    def data_of(self, stage: str) -> dict[str, str]:
        """`data`, as far as a stage and those before it read it."""
        names: set[str] = set()
        while stage:
            names |= set(READS[stage])
            stage = _before(self.profile, stage)
        return {name: value for name, value in self.data.items() if name in names}

    @cached_property
    def teacher(self) -> Encoder:
        return self._remembering(load_teacher(self.profile.teacher, self.device, self.bf16))

    def _remembering(self, encoder: Encoder, ids: np.ndarray | None = None) -> Encoder:
        """The encoder, which from now on reads no text twice in this run; ids: as `Memory` has them."""
        key = body_key(encoder.model, self.bf16, encoder.token_types)
        encoder.vector_cache = VectorCache(self.run.path / "cache" / f"vectors-{key}", ids)
        return encoder

    def _place(self, name: str, stage: str) -> Path:
        """The folder of an artefact: `name` in the run folder; for an arm that makes it otherwise, one of its own."""
        key = self.key(stage)
        ours = key == stage_key(self.run.profile, stage, self.data)
        return self.run.path / name if ours else self.run.folder("others") / f"{name}-{key}"

    def _load(self, folder: Path, name: str) -> Encoder:
        encoder = load_encoder(folder, name, self._prefix, self._max_length)
        encoder.to(self.device)
        encoder.bf16 = self.bf16
        return encoder

    def as_arm(self, profile: config.Profile) -> "Study":
        """The same study under the profile of an arm; what the arm leaves as it is is shared."""
        self.data  # is the same for all arms: made before they part
        arm = copy.copy(self)
        arm.profile = profile
        for name, stage in (("selection", "prune"), ("pruned", "prune"), ("conditioned", "condition")):
            if arm.key(stage) != self.key(stage):
                arm.__dict__.pop(name, None)
        for name in ("texts", "student", "contestants", "_train_texts"):
            arm.__dict__.pop(name, None)
        return arm

    @property
    def _prefix(self) -> str:
        return prefix_of(self.profile.teacher)

    @property
    def _max_length(self) -> int:
        return self.profile.teacher.max_length

    def _made(self, folder: Path, stage: str) -> bool:
        """Whether an artefact is there, whole, and made with this profile's parameters; what is damaged is named."""
        if not folder.is_dir():
            return False
        wrong = flaw(folder)
        if wrong:
            log.warning("%s: %s; it is made again", folder, wrong)
            return False
        return read_json(folder / SEAL).get("key") == self.key(stage)

    def intact(self, stage: str) -> bool:
        """Whether the model that a stage makes, if it makes one, is there and whole."""
        name = {"prune": "vocabulary", "condition": "conditioned", "distill": "student"}.get(stage)
        return name is None or self._made(self._place(name, stage), stage)

    # -- 01

    def segmentation_rows(self) -> list[dict]:
        """Fertility, unknown tokens and split words of the teacher's tokenizer.

        Per language of the parallel sentences.
        """
        texts = self.parallel or {self.profile.language: sentences(self.corpus.heldout)}
        method = "parallel" if self.parallel else "heldout"
        return [
            dict(model="teacher", language=code, metric=metric, value=value, method=method, n=len(lines))
            for code, lines in texts.items()
            for metric, value in segmentation(self.teacher.tokenizer, lines).items()
        ]

    def usage_rows(self) -> list[dict]:
        """How much of the teacher's vocabulary the language's corpus ever uses."""
        counts = count_tokens(self.teacher.tokenizer, sentences(self.corpus.train))
        used = int((counts > 0).sum())
        row = dict(model="teacher", n=int(counts.sum()))
        return [
            row | dict(metric="vocabulary_used", value=used),
            row | dict(metric="vocabulary_share", value=used / len(counts)),
        ]

    def layer_probe_rows(self) -> list[dict]:
        spec = self.profile.probe
        return [
            row
            for task in self.tasks
            for row in layer_probe(self.teacher, task, spec.train_rows, spec.test_rows, self.profile.seed)
        ]

    def retrieval_rows(self) -> list[dict]:
        usable = self.profile.language in self.parallel and len(self.parallel) > 1
        return retrieval_rows(self.teacher, self.parallel, self.profile.language) if usable else []

    def cka_rows(self) -> list[dict]:
        return cka_rows(self.teacher, sentences(self.corpus.heldout)[: self.profile.probe.cka_sentences])

    # -- 02

    @cached_property
    def selection(self) -> Selection:
        """The pieces to keep."""
        spec = self.profile.vocabulary
        if not spec.prune:
            return keep_all(self.teacher.tokenizer, sentences(self.corpus.train))
        words = word_list(self.profile.language) if spec.wordlist else []
        prefix = [self._prefix] if self._prefix else []
        return select_tokens(
            self.teacher.tokenizer, sentences(self.corpus.train), words, prefix, spec.characters, spec.max_rows
        )

    @cached_property
    def pruned(self) -> Encoder:
        """The teacher with the pruned vocabulary, from `vocabulary/` or made there."""
        target = self._place("vocabulary", "prune")
        if not self._made(target, "prune"):
            ids, spec = self.selection.ids, self.profile.teacher
            stored = (
                embedded_teacher.folder() if spec.source == "embedded" else weights_folder(spec.source, spec.revision)
            )
            with new_folder(target) as folder:
                prune_encoder(self.teacher, ids, folder, stored)
                np.save(folder / "kept_ids.npy", np.array(ids))
                seal(folder, key=self.key("prune"))
        return self._remembering(self._load(target, "pruned teacher"), np.load(target / "kept_ids.npy"))

    def prune_rows(self) -> list[dict]:
        """What pruning kept and cut, and what it costs in tokens and unknown tokens."""
        full, pruned, chosen = self.teacher, self.pruned, self.selection
        texts = {"corpus": sentences(self.corpus.train), "heldout": sentences(self.corpus.heldout)}
        if self.profile.language in self.parallel:
            texts["parallel"] = self.parallel[self.profile.language]
        rows = size_rows(full, "teacher") + size_rows(pruned, "pruned teacher")
        for name, encoder in (("teacher", full), ("pruned teacher", pruned)):
            for method, lines in texts.items():
                facts = segmentation(encoder.tokenizer, lines)
                rows += [
                    dict(model=name, metric=m, method=method, value=facts[m], n=len(lines))
                    for m in ("fertility", "unknown_rate")
                ]
        pieces = token_list(full.tokenizer)
        kept = set(chosen.ids)
        scripts = pd.DataFrame(
            {"script": [main_script(p) for p in pieces], "kept": [i in kept for i in range(len(pieces))]}
        )
        for (script, keep), count in scripts.value_counts().items():
            rows.append(
                dict(model="pruned teacher", metric="rows_kept" if keep else "rows_cut", arm=script, value=count)
            )
        for reason, count in pd.Series(chosen.reason).value_counts().items():
            rows.append(dict(model="pruned teacher", metric="rows_reason", arm=reason, value=count))
        held = count_tokens(full.tokenizer, texts["heldout"])
        for method, counts in (("corpus", chosen.counts), ("heldout", held)):
            for size, share in coverage_curve(chosen, counts):
                rows.append(
                    dict(
                        model="pruned teacher",
                        metric="coverage",
                        method=method,
                        x=size,
                        value=share,
                        n=int(counts.sum()),
                    )
                )
        return rows

    def prove_pruning(self, texts: list[str] | None = None, states_of: int = 100) -> pd.DataFrame:
        """Do the pruned ids name the teacher's on every text, are the weights its own, the hidden states equal?"""
        texts = sentences(self.corpus.train) if texts is None else texts
        return verify(
            self.teacher, self.pruned, np.load(self._place("vocabulary", "prune") / "kept_ids.npy"), texts, states_of
        )

    # -- 02b

    def condition(self, on_point: Callable[[pd.DataFrame], None] | None = None) -> tuple[Encoder, pd.DataFrame, dict]:
        """The pruned teacher trained further on the language, the curve of that training and its facts.

        They come from `conditioned/` or are made there. A run that was cut off goes on from its last checkpoint.
        """
        target = self._place("conditioned", "condition")
        if not self._made(target, "condition"):
            if distributed.world_size() > 1:
                raise UserError("condition.use: conditioning takes one process; first: kdlib run --only condition")
            spec = self.profile.condition
            train, held = self._some(self._train_texts, spec.max_texts), self._watched
            outcome = conditioning.condition(
                self.pruned,
                train,
                held,
                spec,
                self._condition_work,
                self.profile.seed,
                "conditioning the teacher",
                on_point,
                self.run.path / "cache",
            )
            with new_folder(target) as folder:
                outcome.encoder.save(folder)
                outcome.curve.to_csv(folder / "curve.csv", index=False)
                write_json(folder / "facts.json", outcome.facts)
                seal(folder, key=self.key("condition"))
        return self.conditioned, read_table(target / "curve.csv", CURVE), read_json(target / "facts.json")

    @cached_property
    def conditioned(self) -> Encoder:
        target = self._place("conditioned", "condition")
        if not self._made(target, "condition"):
            self.condition()
        shutil.rmtree(self._condition_work, ignore_errors=True)
        return self._load(target, "conditioned teacher")

    @property
    def _condition_work(self) -> Path:
        """Where the checkpoints of conditioning lie until it is done."""
        target = self._place("conditioned", "condition")
        return target.with_name(f"{target.name}-checkpoints-{self.key('condition')}")

    def condition_rows(self, curve: pd.DataFrame, facts: dict) -> list[dict]:
        rows = [
            dict(model="conditioned teacher", metric="perplexity", method=p["split"], x=p["seconds"], n=int(p["step"]))
            | {key: p[name] for key, name in (("value", "perplexity"), ("low", "low"), ("high", "high")) if name in p}
            for p in curve.to_dict("records")
        ]
        return rows + [dict(model="conditioned teacher", metric=name, value=float(v)) for name, v in facts.items()]

    def cloze_rows(self) -> list[dict]:
        """Pseudo-perplexity and cloze accuracy, before (where the teacher has a head) and after conditioning."""
        texts, count = sentences(self.corpus.heldout), self.profile.probe.cloze_sentences
        encoders = [self.pruned] if self.pruned.head is not None else []
        return [row for e in [*encoders, self.conditioned] for row in mlm_rows(e, texts, e.name, count)]

    @property
    def source(self) -> Encoder:
        """Whom the student learns from: the pruned teacher, or the conditioned one with `condition.use`."""
        return self.conditioned if self.profile.condition.use else self.pruned

    # -- 03

    @property
    def _train_documents(self) -> list[Document]:
        """The training documents, without what the tasks are tested on."""
        tested = {part for task in self.tasks for text in task.test.texts for part in _parts(text)}
        return without(self.corpus.train, tested)

    @cached_property
    def _train_texts(self) -> Sequence[str]:
        """Windows of the training documents, without what the tasks are tested on."""
        return windows(self._train_documents, self.profile.distill.windows)

    def _some(self, texts: Sequence[str], count: int | None, share: float = 1.0) -> Sequence[str]:
        """At most `count` of the texts, and of those a share; smaller choices are parts of the larger ones."""
        if share == 1 and (count is None or count >= len(texts)):
            return texts
        chosen = np.random.default_rng(self.profile.seed).permutation(len(texts))[:count]
        chosen = chosen[: max(1, round(len(chosen) * share))]
        wanted = np.zeros(len(texts), bool)
        wanted[chosen] = True
        some = Lazy(lambda: itertools.compress(texts, wanted), len(chosen))
        return some if isinstance(texts, Lazy) else list(some)

    @cached_property
    def texts(self) -> tuple[TokenizedCorpus, TokenizedCorpus]:
        """What the student is distilled on and watched with, with the teacher's cached states."""
        spec = self.profile.distill
        return self._prepared(self._some(self._train_texts, spec.max_texts, spec.fraction))

    @property
    def _watched(self) -> Sequence[str]:
        """The held-out sentences that trainings are watched with."""
        return sentences(self.corpus.heldout)[: self.profile.distill.heldout_sentences]

    def _prepared(self, train: Sequence[str]) -> tuple[TokenizedCorpus, TokenizedCorpus]:
        held = self._watched
        cache, depth = self.run.path / "cache", self.profile.student.layers
        return tuple(prepare(self.source, texts, self.profile.distill, cache, depth) for texts in (train, held))

    @property
    def copied_layers(self) -> list[int]:
        """The teacher layers the student starts from; none for a random start."""
        spec = self.profile.student
        return [] if spec.init == "random" else layer_map(spec.init, spec.layers, self.teacher_layers)

    @property
    def compared_layers(self) -> list[int]:
        return layer_map("alternate", self.profile.student.layers, self.teacher_layers)

    @property
    def teacher_layers(self) -> int:
        return self.pruned.layers

    def undistilled(self, init: config.Init | None = None) -> Encoder:
        """The student as it starts: "no distillation", or "from scratch" with init="random"."""
        spec = self.profile.student
        spec = spec if init is None else spec.model_copy(update={"init": init})
        sample = [encoding.ids for encoding in self.source.tokenize(sentences(self.corpus.train)[:SAMPLE])]
        model = build_student(self.source.model, spec, self.profile.seed, sample)
        name = "from scratch" if init == "random" else "no distillation"
        return self._encoder(model, name)

    def _encoder(self, model: PreTrainedModel, name: str) -> Encoder:
        """A student's model as an encoder with the pruned tokenizer."""
        model = model.to(self.device)
        return Encoder(model, self.pruned.tokenizer, name, self._prefix, self.pruned.max_length, self.bf16)

    @property
    def training_size(self) -> tuple[int, int]:
        """Steps and tokens of the distillation."""
        return training_size(self.texts[0], self.profile.distill, self.profile.seed)

    def distill(
        self, on_point: Callable[[pd.DataFrame], None] | None = None, should_stop: Callable[[], bool] | None = None
    ) -> tuple[Encoder, pd.DataFrame, dict]:
        """The student, the curve of its training and the facts of the run.

        They come from `student/` and `distill/` or are made there.
        A run that was cut off goes on from its last checkpoint. on_point, should_stop: as `distill.distill` has them;
        it raises Stopped after a stop that was asked for.
        """
        work, target = self._place("distill", "distill"), self._place("student", "distill")
        if not self._made(target, "distill"):
            with distributed.main_process_first():
                texts = self.texts
            outcome = self._train("distilling the student", *texts, self._distill_work, on_point, should_stop)
            if distributed.rank() == 0:
                with new_file(work / "curve.csv") as file:
                    outcome.curve.to_csv(file, index=False)
                write_json(work / "facts.json", outcome.facts)
                with new_folder(target) as folder:
                    student = self._encoder(outcome.student, "student")
                    student.head = outcome.head
                    student.save(folder)
                    seal(folder, key=self.key("distill"))
                    write_card(folder, self.run)
            distributed.barrier()
        curve, facts = read_table(work / "curve.csv", CURVE), read_json(work / "facts.json")
        if on_point:
            on_point(curve)
        return self.student, curve, facts

    def _train(
        self, label: str, train: TokenizedCorpus, heldout: TokenizedCorpus, work: Path, on_point=None, should_stop=None
    ) -> Outcome:
        """Distil the profile's student on `train`; goes on from the last checkpoint under `work`."""
        spec, start = self.profile.distill, self.undistilled().model
        if self.profile.student.init == "random" or start.config.hidden_size != self.source.hidden:
            spec = spec.model_copy(update={"freeze_embeddings": False})  # they are not the teacher's: nothing to keep
        return distill(self.source, start, train, heldout, spec, work, self.profile.seed, label, on_point, should_stop)

    @cached_property
    def student(self) -> Encoder:
        target = self._place("student", "distill")
        if not self._made(target, "distill"):
            self.distill()
        if distributed.rank() == 0:
            shutil.rmtree(self._distill_work, ignore_errors=True)
        return self._remembering(self._load(target, "student"))

    @property
    def _distill_work(self) -> Path:
        """Where the checkpoints of distillation lie until it is done."""
        return self._place("distill", "distill") / f"checkpoints-{self.key('distill')}"

    def distill_rows(self, curve: pd.DataFrame, facts: dict) -> list[dict]:
        losses = [column for column in curve if column not in ("split", "step", "seconds")]
        rows = [
            dict(
                model="student",
                metric=metric,
                method=point["split"],
                x=point["seconds"],
                n=int(point["step"]),
                value=point[metric],
            )
            for point in curve.to_dict("records")
            for metric in losses
        ]
        rows += [dict(model="student", metric=metric, value=value) for metric, value in facts.items()]
        held = self._watched
        target = text_vectors(self.source, held)[:, 0]
        for encoder in (self.undistilled(), self.student):
            value = similarity(text_vectors(encoder, held)[:, 0], target)
            rows.append(dict(model=encoder.name, metric="similarity", method="heldout", value=value, n=len(held)))
        return rows

    # -- 04

    @cached_property
    def contestants(self) -> dict[str, Callable[[], Encoder]]:
        """Who is compared, each made when it is first needed.

        teacher, pruned teacher, conditioned teacher (with `condition.use`), student, the same student without
        distillation and from scratch, then the profile's other students and baselines.
        """
        found: dict[str, Callable[[], Encoder]] = {
            "teacher": lambda: self.teacher,
            "pruned teacher": lambda: self.pruned,
        }
        if self.profile.condition.use:
            found["conditioned teacher"] = lambda: self.conditioned
        found |= {
            "student": lambda: self.student,
            "no distillation": self.undistilled,
            "from scratch": lambda: self.undistilled("random"),
        }
        found |= {name: lambda study=study: study.student for name, study in self._other_students.items()}
        for name, spec in self.profile.baselines.items():
            found[name] = lambda spec=spec: load_teacher(spec, self.device, self.bf16)
        return found

    @cached_property
    def _other_students(self) -> dict[str, "Study"]:
        return {name: self.as_arm(profile) for name, profile in ablate.students(self.profile).items()}

    def _contestant_keys(self) -> dict[str, str]:
        """For every contestant a fingerprint of all that its vectors depend on."""
        student, shared = self.key("distill"), [self.bf16, self._prefix, self._max_length]
        made_of = {"teacher": self.profile.teacher.model_dump(), "pruned teacher": self.key("prune")}
        made_of |= {"conditioned teacher": self.key("condition")}
        made_of |= {name: study.key("distill") for name, study in self._other_students.items()}
        made_of |= {name: spec.model_dump() for name, spec in self.profile.baselines.items()}
        return {name: fingerprint(name, made_of.get(name, student), shared) for name in self.contestants}

    def trials(self, method: str) -> list[Trial]:
        """Every contestant on every task with every seed, by linear probe, fine-tuning or few-shot fine-tuning.

        Each trial is kept in `benchmark/` as soon as it is done. A pruned teacher is not fine-tuned: it computes what
        the teacher computes, as notebook 02 proves. Few-shot curves leave out the students that were not distilled.
        """
        out = {
            "probe": [],
            "finetune": ["pruned teacher"],
            "fewshot": ["pruned teacher", "no distillation", "from scratch"],
        }
        encoders = {name: encoder for name, encoder in self.contestants.items() if name not in out[method]}
        spec, tasks, folder = self.profile.benchmark, self._tasks_that(method), self.run.folder("benchmark")
        return run_trials(encoders, tasks, spec, method, folder, self._contestant_keys())

    def paired_rows(self, trials: list[Trial]) -> list[dict]:
        """The student against every other contestant, tested on the same seeds and items."""
        others = [name for name in self.contestants if name != "student"]
        rows = paired_rows(trials, [("student", name) for name in others], self.profile.benchmark)
        return rows + [dict(model="student", metric="margin", value=self.profile.benchmark.margin)]

    def _tasks_that(self, flag: str) -> list[Task]:
        """The tasks the profile wants for "finetune" or "fewshot"; for "probe" or "ablate" all, where it wants none."""
        wanted = [task for task, spec in zip(self.tasks, self.profile.tasks) if getattr(spec, flag)]
        return wanted or (self.tasks if flag in ("probe", "ablate") else [])

    def efficiency_rows(self) -> list[dict]:
        """Sizes of all contestants, speeds of those that differ in speed."""
        encoders = {name: encoder() for name, encoder in self.contestants.items()}
        rows = [row for name, encoder in encoders.items() for row in size_rows(encoder, name)]
        same = ("conditioned teacher", "no distillation", "from scratch")  # as the pruned teacher and the student
        shown = {name: encoder for name, encoder in encoders.items() if name not in same}
        return rows + speed_rows(shown, sentences(self.corpus.heldout)[:1000], self.profile.benchmark.latency_runs)

    # -- 05

    def ablation_rows(
        self, wanted: Sequence[str] = (), on_arm: Callable[[ablate.Arm, list[dict]], None] | None = None
    ) -> list[dict]:
        """Every arm distilled and probed, plus the teacher and the undistilled student for reference.

        wanted: run only these arms, "family" or "family/arm"; of the others those that are finished are told. An arm
        lies in a folder named by what it is made of: finished arms are never made again, arms that come to the same
        thing are made once, and one that was cut off goes on where it stopped. Arms share the teacher's cached states.
        """
        rows = []
        for name, encoder in (("teacher", lambda: self.pruned), ("no distillation", self.undistilled)):
            made = self._kept("reference", name, lambda folder: self._arm_scores(encoder(), kept=True))
            rows += [row | dict(model=name, method="reference") for row in made]
        chosen = {(arm.family, arm.name) for arm in ablate.arms(self.profile, wanted)}
        for arm in ablate.arms(self.profile):
            study, label = self.as_arm(arm.profile), f"arm {arm.family} {arm.name}"
            run = (lambda folder: study._run_arm(label, folder)) if (arm.family, arm.name) in chosen else None
            made = study._kept("arm", arm.changes, run)
            made = [row | dict(model="student", method=arm.family, arm=arm.name, x=arm.x) for row in made]
            rows += made
            if on_arm and made:
                on_arm(arm, made)
        return rows

    def _kept(self, kind: str, what: Any, make: Callable[[Path], list[dict]] | None) -> list[dict]:
        """The rows of an arm, from its folder or made there; none where it is not there and not to be made.

        `what` is written down for people to read.
        """
        probes = ("seeds", "probe_share", "probe_rows", "probe_test_rows", "bootstrap")
        full = self.profile.model_dump()
        judged = [
            full["tasks"],
            self.data["tasks"],
            full["ablations"]["max_texts"],
            *(full["benchmark"][key] for key in probes),
        ]
        name = what if kind == "reference" else None
        folder = self.run.folder("ablations") / fingerprint(kind, name, self.key("distill"), judged)
        try:
            rows = read_json(folder / "rows.json", list)
            if all(isinstance(row, dict) and isinstance(row.get("metric"), str) for row in rows):
                shutil.rmtree(folder / "work", ignore_errors=True)
                return rows
        except UserError as error:
            if (folder / "rows.json").exists():
                log.warning("%s; the arm is made again", error)
        if make is None:
            return []
        rows = make(folder)
        write_json(folder / "arm.json", what)
        write_json(folder / "rows.json", rows)
        shutil.rmtree(folder / "work", ignore_errors=True)
        return rows

    def _run_arm(self, label: str, folder: Path) -> list[dict]:
        spec = self.profile.distill
        texts = self._some(self._some(self._train_texts, spec.max_texts), self.profile.ablations.max_texts)
        train, held = self._prepared(texts)
        order = np.random.default_rng(self.profile.seed).permutation(len(train))
        train = train.part(order[: max(1, round(len(train) * spec.fraction))])
        outcome = self._train(label, train, held, folder / "work")
        with new_file(folder / "curve.csv") as file:
            outcome.curve.to_csv(file, index=False)
        last = outcome.curve.query("split == 'heldout'").iloc[-1]
        scores = self._arm_scores(self._encoder(outcome.student, label))
        return [dict(metric="heldout_loss", value=float(last["loss"])), *scores]

    def _arm_scores(self, encoder: Encoder, kept: bool = False) -> list[dict]:
        """Probe scores on the tasks that the profile ablates on, their mean, and similarity to the teacher.

        kept: of a contestant of the benchmark, whose trials are the benchmark's.
        """
        spec, tasks = self.profile.benchmark, self._tasks_that("ablate")
        place = (self.run.folder("benchmark"), self._contestant_keys()) if kept else ()
        runs: dict[str, list] = {}
        for trial in run_trials({encoder.name: encoder}, tasks, spec, "probe", *place):
            runs.setdefault(trial.task, []).append(trial.metrics)
        rows = [row for task, task_runs in runs.items() for row in rows_of(task_runs, spec, task=task)]
        rows.append(average_row(runs, spec))
        held, target = self._heldout_vectors
        if encoder.hidden == target.shape[1]:
            value = similarity(text_vectors(encoder, held)[:, 0], target)
            rows.append(dict(metric="similarity", value=value, n=len(held)))
        return rows + [dict(metric="parameters", value=encoder.parameters)]

    @cached_property
    def _heldout_vectors(self) -> tuple[list[str], np.ndarray]:
        """Some held-out sentences and the teacher's vectors of them, which every arm is compared with."""
        held = self._watched
        return held, text_vectors(self.pruned, held)[:, 0]
