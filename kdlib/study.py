"""A study: the artefacts of a run, each taken from the run folder or made, in the order the data flows.

Every notebook opens a `Study` and asks it for what it needs; so any notebook runs alone, and a second run of the
same profile finds what is already there.
"""

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers.utils import logging

from kdlib import config, device, sources, vocabulary
from kdlib.benchmark import average_row, compare, probe_runs, rows_of
from kdlib.card import write_card
from kdlib.corpus import Corpus, load_corpus, sentences, windows, without
from kdlib.distill import Outcome, Texts, distill, prepare
from kdlib.efficiency import size_rows, speed_rows
from kdlib.encoder import Encoder, text_vectors
from kdlib.errors import UserError
from kdlib.objectives import check_objectives
from kdlib.probe import cka_rows, layer_probe, retrieval_rows, segmentation, similarity
from kdlib.store import find_run, fingerprint, new_folder, write_json
from kdlib.student import build_student, layer_map
from kdlib.tasks import Task, load_tasks
from kdlib.teacher import load_encoder, load_teacher, prefix_of

STAGES = ["probe", "prune", "distill", "benchmark", "ablations", "figures"]
NOTEBOOKS = {
    "probe": "01_probe_the_teacher",
    "prune": "02_prune_the_vocabulary",
    "distill": "03_distill_a_student",
    "benchmark": "04_benchmark_students",
    "ablations": "05_ablations",
    "figures": "06_figures",
}
READS = {  # the sections of a profile that a stage depends on, besides those of the stages before it
    "probe": ["language", "seed", "teacher", "corpus", "parallel", "tasks", "probe"],
    "prune": ["language", "seed", "teacher", "corpus", "vocabulary"],
    "distill": ["device", "student", "distill"],
    "benchmark": ["tasks", "benchmark"],
    "ablations": ["tasks", "benchmark", "ablations"],
    "figures": ["probe", "tasks", "parallel", "benchmark", "ablations"],
}
BEFORE = {"distill": "prune", "benchmark": "distill", "ablations": "distill", "figures": "distill"}


def stage_key(profile: config.Profile, stage: str) -> str:
    """A fingerprint of all that a stage's result depends on."""
    sections = {name: profile.model_dump()[name] for name in READS[stage]}
    return fingerprint(sections, stage_key(profile, BEFORE[stage]) if stage in BEFORE else None)


def _parts(text: str | tuple[str, str] | list[str]) -> tuple[str, ...]:
    """The sentences of a task's text, of either kind."""
    return (text,) if isinstance(text, str) else text if isinstance(text, tuple) else (" ".join(text),)


class Study:
    """A run's artefacts: corpus, tasks, teacher, pruned teacher, student, and the rows of each stage."""

    def __init__(self, run_dir: str | Path | None = None, profile: str = "workshop", overrides: Any = ()):
        logging.disable_progress_bar()  # of loading and saving, which take a second; long work shows its own
        self.run = find_run(run_dir, profile, overrides)
        self.profile = self.run.profile
        check_objectives(self.profile.distill.objectives)
        for weights in self.profile.ablations.objectives.values():
            check_objectives(weights)
        self.device = device.pick_device(self.profile.device)
        self.bf16 = device.use_bf16(self.profile.distill.precision, self.device)

    # -- what everything starts from

    @cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.profile)

    @cached_property
    def tasks(self) -> list[Task]:
        return load_tasks(self.profile, self.corpus)

    @cached_property
    def parallel(self) -> dict[str, list[str]]:
        """The parallel sentences by language; empty without any, or where the study's language is not among them."""
        spec = self.profile.parallel
        if spec is None:
            return {}
        rows = (
            sources.embedded_rows("parallel") if spec.source == "embedded" else sources.read_rows(spec, spec.languages)
        )
        missing = [code for code in spec.languages if code not in rows]
        if missing:
            raise UserError(f"parallel.languages: no column {', '.join(missing)}; there are {', '.join(rows.columns)}")
        whole = rows[spec.languages].map(lambda text: isinstance(text, str) and bool(text.strip())).all(axis=1)
        rows = rows[whole][: self.profile.probe.languages_rows]
        return {code: list(rows[code]) for code in spec.languages}

    @cached_property
    def teacher(self) -> Encoder:
        return load_teacher(self.profile.teacher, self.device, self.bf16)

    def _load(self, folder: str, name: str) -> Encoder:
        encoder = load_encoder(self.run.path / folder, name, self._prefix, self._max_length)
        encoder.model.to(self.device)
        encoder.bf16 = self.bf16
        return encoder

    @property
    def _prefix(self) -> str:
        return prefix_of(self.profile.teacher)

    @property
    def _max_length(self) -> int:
        return self.profile.teacher.max_length

    def _made(self, folder: str, stage: str) -> bool:
        try:
            made = json.loads((self.run.path / folder / "made.json").read_text("utf-8"))
            return made["key"] == stage_key(self.profile, stage)
        except (OSError, ValueError, KeyError, TypeError):
            return False

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
        counts = vocabulary.count_pieces(self.teacher.tokenizer, sentences(self.corpus.train))
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
    def selection(self) -> vocabulary.Selection:
        """The pieces to keep."""
        spec = self.profile.vocabulary
        words = vocabulary.word_list(self.profile.language) if spec.wordlist else []
        prefix = [self._prefix] if self._prefix else []
        return vocabulary.select(
            self.teacher.tokenizer, sentences(self.corpus.train), words, prefix, spec.characters, spec.max_rows
        )

    @cached_property
    def pruned(self) -> Encoder:
        """The teacher with the pruned vocabulary, from `vocabulary/` or made there."""
        if not self._made("vocabulary", "prune"):
            ids = self.selection.ids
            teacher = self.teacher
            model = vocabulary.prune_model(teacher.model, teacher.tokenizer, ids)
            tokenizer = vocabulary.prune_tokenizer(teacher.tokenizer, ids)
            with new_folder(self.run.path / "vocabulary") as folder:
                Encoder(model, tokenizer, "pruned teacher", teacher.prefix, teacher.max_length).save(folder)
                np.save(folder / "kept_ids.npy", np.array(ids))
                write_json(folder / "made.json", {"key": stage_key(self.profile, "prune")})
        return self._load("vocabulary", "pruned teacher")

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
        pieces = vocabulary.piece_list(full.tokenizer)
        kept = set(chosen.ids)
        scripts = pd.DataFrame(
            {"script": [vocabulary.main_script(p) for p in pieces], "kept": [i in kept for i in range(len(pieces))]}
        )
        for (script, keep), count in scripts.value_counts().items():
            rows.append(
                dict(model="pruned teacher", metric="rows_kept" if keep else "rows_cut", arm=script, value=count)
            )
        for reason, count in pd.Series(chosen.reason).value_counts().items():
            rows.append(dict(model="pruned teacher", metric="rows_reason", arm=reason, value=count))
        held = vocabulary.count_pieces(full.tokenizer, texts["heldout"])
        for method, counts in (("corpus", chosen.counts), ("heldout", held)):
            for size, share in vocabulary.coverage_curve(chosen, counts):
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
        return vocabulary.prove(
            self.teacher, self.pruned, np.load(self.run.path / "vocabulary" / "kept_ids.npy"), texts, states_of
        )

    # -- 03

    @cached_property
    def texts(self) -> tuple[Texts, Texts]:
        """What students are distilled on and watched with, with the teacher's cached states."""
        spec = self.profile.distill
        tested = {part for task in self.tasks for text in task.test.texts for part in _parts(text)}
        train = windows(without(self.corpus.train, tested), spec.windows)
        if spec.max_texts and len(train) > spec.max_texts:
            chosen = np.random.default_rng(self.profile.seed).permutation(len(train))[: spec.max_texts]
            train = [train[i] for i in sorted(chosen)]
        root = self.run.path / "cache"
        depth = self.profile.student.layers
        held = sentences(self.corpus.heldout)[:1000]
        return prepare(self.pruned, train, spec, root, depth), prepare(self.pruned, held, spec, root, depth)

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
        model = build_student(self.pruned.model, spec.layers, spec.init if init is None else init, self.profile.seed)
        name = "from scratch" if init == "random" else "no distillation"
        return Encoder(
            model.to(self.device), self.pruned.tokenizer, name, self._prefix, self.pruned.max_length, self.bf16
        )

    def distill(self, on_point: Callable[[pd.DataFrame], None] | None = None) -> tuple[Encoder, pd.DataFrame, dict]:
        """The student, the curve of its training and the facts of the run.

        They come from `student/` and `distill/` or are made there.
        A run that was cut off goes on from its last checkpoint.
        """
        work = self.run.path / "distill"
        key = stage_key(self.profile, "distill")
        if not self._made("student", "distill"):
            checkpoints = work / f"checkpoints-{key}"
            train, held = self.texts
            start = self.undistilled()
            outcome: Outcome = distill(
                self.pruned, start.model, train, held,
                self._spec(start_random=self.profile.student.init == "random"), checkpoints, self.profile.seed,
                "distilling the student", on_point,
            )  # fmt: skip
            work.mkdir(exist_ok=True)
            outcome.curve.to_csv(work / "curve.csv", index=False)
            write_json(work / "facts.json", outcome.facts)
            with new_folder(self.run.path / "student") as folder:
                Encoder(outcome.student, self.pruned.tokenizer, "student", self._prefix, self._max_length).save(folder)
                write_json(folder / "made.json", {"key": key})
                write_card(folder, self.run)
            shutil.rmtree(checkpoints, ignore_errors=True)
        return self.student, pd.read_csv(work / "curve.csv"), json.loads((work / "facts.json").read_text())

    def _spec(self, start_random: bool = False, **changes) -> config.Distill:
        """The distillation's settings; a random start has no teacher embeddings worth freezing."""
        changes = {"freeze_embeddings": False, **changes} if start_random else changes
        return self.profile.distill.model_copy(update=changes)

    @cached_property
    def student(self) -> Encoder:
        if not self._made("student", "distill"):
            self.distill()
        return self._load("student", "student")

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
        held = sentences(self.corpus.heldout)[:1000]
        target = text_vectors(self.pruned, held)[:, 0]
        for encoder in (self.undistilled(), self.student):
            value = similarity(text_vectors(encoder, held)[:, 0], target)
            rows.append(dict(model=encoder.name, metric="similarity", method="heldout", value=value, n=len(held)))
        return rows

    # -- 04

    @cached_property
    def contestants(self) -> dict[str, Encoder]:
        """Who is compared: teacher, pruned teacher, student, the student without distillation, and from scratch."""
        everyone = [self.teacher, self.pruned, self.student, self.undistilled(), self.undistilled("random")]
        return dict(zip(("teacher", "pruned teacher", "student", "no distillation", "from scratch"), everyone))

    def probe_rows(self) -> list[dict]:
        return compare(self.contestants, self.tasks, self.profile.benchmark, "probe")

    def finetune_rows(self) -> list[dict]:
        tasks = self._tasks_that("finetune")
        return compare(self.contestants, tasks, self.profile.benchmark, "finetune") if tasks else []

    def _tasks_that(self, flag: str) -> list[Task]:
        """The tasks that the profile wants for "finetune" or "ablate"."""
        return [task for task, spec in zip(self.tasks, self.profile.tasks) if getattr(spec, flag)]

    def efficiency_rows(self) -> list[dict]:
        texts = sentences(self.corpus.heldout)
        rows = [row for name, encoder in self.contestants.items() for row in size_rows(encoder, name)]
        shown = {name: self.contestants[name] for name in ("teacher", "pruned teacher", "student")}
        return rows + speed_rows(shown, texts, self.profile.benchmark.latency_runs)

    # -- 05

    def arms(self) -> list[dict]:
        """The ablation arms: family, arm, x, and what they change; the profile's own choice is in each family."""
        spec, base = (
            self.profile.ablations,
            dict(fraction=1.0, init=self.profile.student.init, objectives=self.profile.distill.objectives),
        )
        arms = [
            dict(family="fraction", arm=f"{share:.0%}", x=share, **(base | {"fraction": share}))
            for share in spec.fractions
        ]
        arms += [dict(family="init", arm=str(init), x=None, **(base | {"init": init})) for init in spec.inits]
        return arms + [
            dict(family="objective", arm=name, x=None, **(base | {"objectives": weights}))
            for name, weights in spec.objectives.items()
        ]

    def ablation_rows(self, on_arm: Callable[[dict, list[dict]], None] | None = None) -> list[dict]:
        """Every arm distilled and probed, plus the teacher and the undistilled student for reference.

        An arm lies in a folder named by what it changes; finished arms are never made again, and arms that come to the
        same thing are made once. All arms share the cached teacher states.
        """
        tasks = self._tasks_that("ablate") or self.tasks
        rows = []
        for encoder in (self.pruned, self.undistilled()):
            name = "teacher" if encoder is self.pruned else "no distillation"
            rows += self._kept(
                ["reference", name],
                lambda encoder=encoder: self._probe_arm(encoder, tasks),
                model=name,
                method="reference",
            )
        for arm in self.arms():
            changed = {key: arm[key] for key in ("fraction", "init", "objectives")}
            made = self._kept(
                changed,
                lambda arm=arm: self._run_arm(arm, tasks),
                model="student",
                method=arm["family"],
                arm=arm["arm"],
                x=arm["x"],
            )
            rows += made
            if on_arm:
                on_arm(arm, made)
        return rows

    def _kept(self, what: Any, make: Callable[[], list[dict]], **labels) -> list[dict]:
        full = self.profile.model_dump()
        shared = [full["distill"], full["student"], full["tasks"], full["seed"]]
        shared += [full["ablations"][k] for k in ("epochs", "max_texts")] + [
            full["benchmark"][k] for k in ("seeds", "probe_share", "bootstrap")
        ]
        key = fingerprint(what, stage_key(self.profile, "prune"), shared)
        file = self.run.folder("ablations") / key / "rows.json"
        if not file.is_file():
            rows = make()
            write_json(file, rows)
        return [row | labels for row in json.loads(file.read_text("utf-8"))]

    def _run_arm(self, arm: dict, tasks: list[Task]) -> list[dict]:
        spec = self.profile.ablations
        train, held = self.texts
        rng = np.random.default_rng(self.profile.seed)
        places = rng.permutation(len(train))[: spec.max_texts]
        places = places[: max(1, round(len(places) * arm["fraction"]))]
        settings = self._spec(arm["init"] == "random", objectives=arm["objectives"], epochs=spec.epochs, evaluations=1)
        model = build_student(self.pruned.model, self.profile.student.layers, arm["init"], self.profile.seed)
        label = f"arm {arm['family']} {arm['arm']}"
        work = self.run.path / "ablations" / "work"
        shutil.rmtree(work, ignore_errors=True)
        outcome = distill(
            self.pruned,
            model.to(self.device),
            train.part(places),
            held.part(range(min(300, len(held)))),
            settings,
            work,
            self.profile.seed,
            label,
        )
        shutil.rmtree(work, ignore_errors=True)
        encoder = Encoder(outcome.student, self.pruned.tokenizer, label, self._prefix, self._max_length, self.bf16)
        last = outcome.curve.query("split == 'heldout'").iloc[-1]
        return [dict(metric="heldout_loss", value=float(last["loss"])), *self._probe_arm(encoder, tasks)]

    def _probe_arm(self, encoder: Encoder, tasks: list[Task]) -> list[dict]:
        spec = self.profile.benchmark
        runs = {task.name: probe_runs(encoder, task, spec) for task in tasks}
        rows = [row for task, task_runs in runs.items() for row in rows_of(task_runs, spec, task=task)]
        rows.append(average_row(runs, spec))
        held, target = self._heldout_vectors
        value = similarity(text_vectors(encoder, held)[:, 0], target)
        return rows + [dict(metric="similarity", value=value, n=len(held))]

    @cached_property
    def _heldout_vectors(self) -> tuple[list[str], np.ndarray]:
        """Some held-out sentences and the teacher's vectors of them, which every arm is compared with."""
        held = sentences(self.corpus.heldout)[:300]
        return held, text_vectors(self.pruned, held)[:, 0]
