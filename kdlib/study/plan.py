"""The plan of a study: which stage needs what. Only this module reads whole profiles; stages get parts of them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kdlib import config
from kdlib.data.corpus import (
    Corpus,
    TranslationPairs,
    draw,
    first_pairs,
    load_corpus,
    load_languages,
    load_parallel,
    translation_pairs,
    windows,
)
from kdlib.data.lazy import Document
from kdlib.data.sources import digest
from kdlib.data.tasks import (
    Task,
    load_tasks,
    origins,
    read_unlabelled,
    tested_texts,
    training_documents,
    unlabelled_texts,
)
from kdlib.distillation.objectives import RequiredOutputs, check_objectives
from kdlib.distillation.student_init import layer_map
from kdlib.errors import UserError
from kdlib.evaluation.tf_idf import TfIdf
from kdlib.files import fingerprint, write_json
from kdlib.models import onnx
from kdlib.models.encoder import Encoder
from kdlib.models.loading import load_teacher, prefix_of
from kdlib.models.safetensors_files import weights_fingerprint
from kdlib.models.static import static_encoder
from kdlib.models.tokenizer_files import token_ids
from kdlib.study.arms import INT8, Arm, arms, students
from kdlib.study.model_card import CardFacts
from kdlib.study.reports import (
    AblationReport,
    AblationSettings,
    BenchmarkReport,
    BenchmarkSettings,
    ClozeSettings,
    ConditionReport,
    DistillReport,
    FigureReport,
    NoSettings,
    ProbeReport,
    ProbeSettings,
    PruneReport,
    PruneReportSettings,
)
from kdlib.study.stage import Context, Derived, Keyed, Report, Source
from kdlib.study.stages import (
    ArmScores,
    Condition,
    ConditionSettings,
    Distill,
    DistillSettings,
    Int8,
    Prune,
    PruneSettings,
    Reference,
    ScoreSettings,
    start_name,
)
from kdlib.study.task_students import TaskReport, TaskReportSettings, TaskStudent, TaskStudentSettings, tuning_of

PROBES = ("seeds", "probe_share", "probe_rows", "probe_test_rows", "bootstrap")  # of the benchmark's settings


class Graph:
    """The stages of one profile. Equal stages of the graphs of a context are one object.

    Args:
        profile: the study's, or an arm's.
        context: of the run.
        links: whether the run folder has links to this graph's models (`vocabulary`, `conditioned`, `student`).
        student: name of the link to the student; "" for none.
    """

    def __init__(self, profile: config.Profile, context: Context, links: bool = False, student: str = ""):
        self.profile, self.context, self.links, self.link = profile, context, links, student

    def check(self) -> None:
        """Raise UserError where a parameter of the study, an arm or another student makes no sense."""
        graded = [self.profile, *(arm.profile for arm in arms(self.profile)), *students(self.profile).values()]
        for profile in graded:
            check_objectives(profile.distill.objectives)
            if RequiredOutputs.of(profile.distill.objectives).translation:
                self._check_parallel()
        depth = self.profile.student.layers
        for key, rule in (("student.init", self.profile.student.init), ("distill.layers", self.profile.distill.layers)):
            if isinstance(rule, list):  # the teacher's depth is not known yet
                layer_map(rule, depth, max([depth, *rule]), key)

    def _check_parallel(self) -> None:
        spec, language = self.profile.parallel, self.profile.target
        if spec is None or language not in spec.languages or len(spec.languages) < 2:
            raise UserError(
                "distill.objectives: crosslingual and transport need parallel text; set parallel.source, and in "
                f"parallel.languages its columns: {language} and the language that the teacher is to read"
            )

    # -- what is read

    @cached_property
    def corpus(self) -> Source[Corpus]:
        """The corpus, split into training, held-out and test documents."""
        profile, cache = self.profile, self.context.cache
        spec, language, seed = profile.corpus, profile.language, profile.seed
        settings = [spec.model_dump(), language, seed]
        if isinstance(language, str):
            return self.context.source(
                "corpus",
                settings,
                lambda: load_corpus(spec, language, seed, cache),
                lambda source: source.value.origin.sha256,
            )
        settings += [{code: other.model_dump() for code, other in profile.corpora.items()}, profile.shares]

        def count(texts: list[str]) -> int:
            return sum(map(len, token_ids(self.teacher.get().tokenizer, texts)))

        return self.context.source(
            "corpus", settings, lambda: load_languages(profile, count, cache),
            lambda source: fingerprint({code: part.origin.sha256 for code, part in source.value.parts.items()}),
            also=[self.teacher.key],
        )  # fmt: skip

    @cached_property
    def tasks(self) -> Source[list[Task]]:
        """All tasks of the profile. What was read is written to `sources.json`."""
        flags = {"probe", "finetune", "fewshot", "ablate", "distill", "unlabelled"}

        def read() -> list[Task]:
            corpus = self.corpus.get()
            tasks = load_tasks(self.profile.tasks, corpus)
            write_json(self.context.path / "sources.json", origins(corpus, tasks))
            return tasks

        return self.context.source(
            "tasks", [[spec.model_dump(exclude=flags) for spec in self.profile.tasks], self.corpus.settings], read,
            lambda source: fingerprint({task.name: task.origin.sha256 for task in source.value}),
        )  # fmt: skip

    @cached_property
    def parallel(self) -> Source[dict[str, list[str]]]:
        """The parallel sentences by language; none where the study's language is missing."""
        spec, language, rows = self.profile.parallel, self.profile.target, self.profile.probe.languages_rows
        settings = [spec and spec.model_dump(), language, rows]
        return self.context.source(
            "parallel",
            settings,
            lambda: load_parallel(spec, language, rows),
            lambda source: digest(source.value.items()),
        )

    @cached_property
    def pairs(self) -> Derived[tuple[TranslationPairs, TranslationPairs]]:
        """Pairs of translations for training, and held-out pairs. Those that retrieval is measured on are left out."""
        spec, language, seed = self.profile.parallel, self.profile.target, self.profile.seed
        rows = self.profile.probe.languages_rows
        settings = [spec and spec.model_dump(), language]
        whole = self.context.source(
            "all parallel", settings, lambda: load_parallel(spec, language), lambda source: digest(source.value.items())
        )

        def make() -> tuple[TranslationPairs, TranslationPairs]:
            return translation_pairs(whole.get(), language, rows, tested_texts(self.tasks.get()), seed)

        return Derived("pairs", [rows, seed], make, parallel=whole, tasks=self.tasks)

    @cached_property
    def teacher(self) -> Source[Encoder]:
        """The teacher."""
        return self._encoder("teacher", self.profile.teacher, remembers=True)

    def _encoder(self, kind: str, spec: config.Teacher, remembers: bool = False) -> Source[Encoder]:
        """A model to read. Its key holds the weights of a local folder, which may change."""
        cache, bf16 = self.context.cache if remembers else None, self.context.bf16
        folder = Path(spec.source).expanduser()
        return self.context.source(
            kind, spec.model_dump(), lambda: load_teacher(spec, self.context.device, bf16(), cache),
            lambda _: weights_fingerprint(folder) if folder.is_dir() else "",
        )  # fmt: skip

    @cached_property
    def training(self) -> Source[Sequence[Document]]:
        """The training documents, without the test sentences of tasks."""
        return self.context.source(
            "training", [], lambda: training_documents(self.corpus.get(), self.tasks.get()),
            lambda source: digest(document.sentences for document in source.value),
            also=[self.corpus.key, self.tasks.key],
        )  # fmt: skip

    def texts(self, *counts: int | None, share: float = 1.0) -> Derived[Sequence[str]]:
        """Windows of the training documents, drawn by each count in turn, and a share of the rest."""
        lengths, seed = self.profile.distill.windows, self.profile.seed

        def make() -> Sequence[str]:
            found = windows(self.training.get(), lengths)
            for count in counts[:-1]:
                found = draw(found, count, 1.0, seed)
            return draw(found, counts[-1], share, seed)

        return Derived("texts", [lengths, counts, share, seed], make, training=self.training)

    @cached_property
    def heldout(self) -> Derived[Sequence[str]]:
        """The held-out texts of evaluations during training: windows like those of training, so losses compare.

        Those of several languages keep the shares of the profile.
        """
        spec, seed, shares = self.profile.distill, self.profile.seed, self.profile.shares

        def make() -> Sequence[str]:
            corpus, found = self.corpus.get(), {}
            for code, part in (corpus.parts or {self.profile.target: corpus}).items():
                count = max(1, round(spec.heldout_texts * shares[code]))
                found[code] = draw(windows(part.heldout, spec.windows), count, 1.0, seed)
            most = min(len(some) / shares[code] for code, some in found.items())  # the shares hold for a short part too
            return [text for code, some in found.items() for text in some[: max(1, round(most * shares[code]))]]

        return Derived("heldout", [spec.heldout_texts, spec.windows, seed], make, corpus=self.corpus)

    # -- what is computed

    @cached_property
    def prune(self) -> Prune:
        """The pruned teacher."""
        spec, profile = self.profile.vocabulary, self.profile
        settings = PruneSettings(vocabulary=spec, languages=profile.languages, teacher=profile.teacher)
        link = "vocabulary" if self.links else ""
        return self.context.stage(Prune(self.context, settings, link, teacher=self.teacher, corpus=self.corpus))

    @cached_property
    def condition(self) -> Condition:
        """The conditioned teacher."""
        profile = self.profile
        settings = ConditionSettings(
            condition=profile.condition.model_copy(update={"use": False}), precision=profile.distill.precision,
            device=profile.device, seed=profile.seed, teacher=profile.teacher,
        )  # fmt: skip
        texts = self.texts(profile.condition.max_texts)
        return self.context.stage(
            Condition(
                self.context, settings, "conditioned" if self.links else "", pruned=self.prune, texts=texts,
                heldout=self.heldout,
            )
        )  # fmt: skip

    @cached_property
    def distill(self) -> Distill:
        """The student."""
        profile, spec = self.profile, self.profile.distill
        settings = DistillSettings(
            student=profile.student, distill=spec.model_copy(update={"seed": None}), device=profile.device,
            seed=profile.seed if spec.seed is None else spec.seed, teacher=profile.teacher, card=card_facts(profile),
        )  # fmt: skip
        source = self.condition if profile.condition.use else self.prune
        texts = self.texts(spec.max_texts, share=spec.fraction)
        read: dict[str, Any] = dict(corpus=self.corpus, texts=texts, heldout=self.heldout)
        if RequiredOutputs.of(spec.objectives).translation:
            read |= dict(pairs=self.pairs, reader=self.teacher)
        return self.context.stage(Distill(self.context, settings, self.link, source=source, **read))

    def student(self) -> Keyed[Encoder]:
        """The student's encoder."""
        return Derived("encoder", [], lambda: self.distill.get().encoder, student=self.distill)

    def start(self, init: config.Init | None = None) -> Keyed[Encoder]:
        """The student before distillation."""
        return Derived(start_name(init), [init], lambda: self.distill.start(init), student=self.distill)

    def source(self) -> Keyed[Encoder]:
        """The encoder that the student learns from: the pruned teacher, or the conditioned one."""
        if not self.profile.condition.use:
            return self.prune
        return Derived("encoder", [], lambda: self.condition.get().encoder, conditioned=self.condition)

    def task_student(self, spec: config.Task) -> TaskStudent:
        """The model of a task."""
        profile, task_student = self.profile, self.profile.task_student.model_copy(update={"rows": [], "arms": {}})
        settings = TaskStudentSettings(
            task=spec.name, spec=task_student, tuning=tuning_of(profile.benchmark), seed=profile.seed,
            precision=profile.distill.precision, card=card_facts(profile),
        )  # fmt: skip
        lengths, count, seed = profile.distill.windows, task_student.texts, profile.seed

        def read() -> list:
            task = next(task for task in self.tasks.get() if task.name == spec.name)
            return [
                *read_unlabelled(spec, task),
                *unlabelled_texts(spec.kind, self.training.get(), lengths, count, seed),
            ]

        texts = self.context.source(
            "unlabelled", [spec.model_dump(), lengths, count, seed], read, lambda source: digest(source.value),
            also=[self.training.key],
        )  # fmt: skip
        return self.context.stage(
            TaskStudent(
                self.context, settings, f"tasks/{spec.name}" if self.links else "", teacher=self.source(),
                student=self.student(), tasks=self.tasks, texts=texts,
            )
        )  # fmt: skip

    # -- what is reported

    @cached_property
    def others(self) -> dict[str, "Graph"]:
        """The graphs of the profile's other students, by name."""
        found = students(self.profile)
        return {name: Graph(profile, self.context, student=f"students/{name}") for name, profile in found.items()}

    @cached_property
    def models(self) -> dict[str, Keyed[Encoder]]:
        """The models of the benchmark, by their names in results. Each is made when needed."""
        found: dict[str, Keyed[Encoder]] = {"teacher": self.teacher, "pruned teacher": self.prune}
        if self.profile.condition.use:
            found["conditioned teacher"] = self.source()
        found |= {"student": self.student(), "no distillation": self.start(), "random weights": self.start("random")}
        found |= {name: graph.student() for name, graph in self.others.items()}
        found |= {name: self._encoder("baseline", spec) for name, spec in self.profile.baselines.items()}
        return found | self.controls

    @cached_property
    def controls(self) -> dict[str, Keyed[Any]]:
        """The contestants that need no transformer, or eight bits instead of 32."""
        prune = self.prune
        found: dict[str, Keyed[Any]] = {
            "tf-idf": Derived("tf-idf", [], TfIdf),
            "static": Derived("static", [], lambda: static_encoder(prune.get()), pruned=prune),
            "static SIF": Derived(
                "static", ["SIF"],
                lambda: static_encoder(prune.get(), prune.selection.counts[prune.kept_ids()]), pruned=prune,
            ),
        }  # fmt: skip
        if onnx.available() and self.context.device.type == "cpu":
            for name, model in zip(INT8, (prune, self.student()), strict=True):
                found[name] = self.context.stage(Int8(self.context, NoSettings(), model=model))
        return found

    def named(self, flag: str) -> list[str]:
        """The profile's tasks for a method; for "probe" and "ablate" all tasks where it lists none."""
        wanted = [spec.name for spec in self.profile.tasks if getattr(spec, flag)]
        return wanted or ([spec.name for spec in self.profile.tasks] if flag in ("probe", "ablate") else [])

    @cached_property
    def grid(self) -> list[tuple[Arm, list[ArmScores]]]:
        """The ablation grid, each arm with its scores for each seed."""
        seeds = self.profile.ablations.seeds
        return [(arm, [self._arm(arm, seed) for seed in seeds]) for arm in arms(self.profile)]

    @cached_property
    def _transferring(self) -> set[str]:
        """The families that transfer is measured for: those with objectives of translations."""
        return {
            arm.family for arm in arms(self.profile) if RequiredOutputs.of(arm.profile.distill.objectives).translation
        }

    def _arm(self, arm: Arm, seed: int) -> ArmScores:
        """The scores of an arm's student of one seed. Its probes draw their rows with the same seed."""
        graph = Graph(arm.with_seed(seed), self.context)
        texts = graph.texts(graph.profile.distill.max_texts, self.profile.ablations.max_texts)
        more = self._scored(arm.family in self._transferring)
        return self.context.stage(
            ArmScores(self.context, self._scores([seed]), student=graph.distill, arm_texts=texts, **more)
        )

    def _scored(self, transfer: bool) -> dict[str, Any]:
        """The inputs that the scores of arms and references share."""
        found: dict[str, Any] = dict(teacher=self.prune, compared=self.heldout, tasks=self.tasks)
        if not transfer:
            return found
        language = self.profile.target
        tested = Derived("tested", language, lambda: first_pairs(self.parallel.get(), language), parallel=self.parallel)
        return found | dict(reader=self.teacher, tested=tested)

    def _scores(self, seeds: Sequence[int]) -> ScoreSettings:
        read = {name: getattr(self.profile.benchmark, name) for name in PROBES}
        probes = config.Benchmark(**read | {"seeds": list(seeds)})
        return ScoreSettings(probes=probes, tasks=self.named("ablate"), precision=self.profile.distill.precision)

    def _reference(self, model: Keyed[Encoder]) -> Reference:
        more = self._scored(bool(self._transferring))
        return self.context.stage(
            Reference(self.context, self._scores(self.profile.benchmark.seeds), model=model, **more)
        )

    @cached_property
    def reports(self) -> dict[str, Report[Any]]:
        """The reports by the name of their stage, in the order of the notebooks."""
        profile, context, precision = self.profile, self.context, self.profile.distill.precision
        read = dict(teacher=self.teacher, corpus=self.corpus, parallel=self.parallel)
        probe = ProbeSettings(probe=profile.probe, language=profile.target, seed=profile.seed, precision=precision)
        cloze = ClozeSettings(cloze_sentences=profile.probe.cloze_sentences, precision=precision)
        methods = {method: self.named(method) for method in ("probe", "finetune", "fewshot")}
        methods["best layer"] = methods["probe"]
        benchmark = BenchmarkSettings(benchmark=profile.benchmark, tasks=methods, precision=precision)
        made = {spec.name: self.task_student(spec) for spec in profile.tasks if spec.distill}
        task = TaskReportSettings(spec=profile.task_student, tuning=tuning_of(profile.benchmark), precision=precision)
        references = {"teacher": self._reference(self.prune), "no distillation": self._reference(self.start())}
        found: list[Report[Any]] = [
            ProbeReport(context, probe, tasks=self.tasks, **read),
            PruneReport(
                context,
                PruneReportSettings(language=profile.target, coverage=profile.vocabulary.coverage),
                pruned=self.prune,
                **read,
            ),
            ConditionReport(context, cloze, pruned=self.prune, conditioned=self.condition, corpus=self.corpus),
            DistillReport(context, NoSettings(), student=self.distill, heldout=self.heldout),
            BenchmarkReport(context, benchmark, self.models, tasks=self.tasks, corpus=self.corpus),
            TaskReport(context, task, made),
            AblationReport(context, AblationSettings(benchmark=profile.benchmark), self.grid, references),
        ]
        reports = {report.name: report for report in found}
        return reports | {"figures": FigureReport(context, NoSettings(), **reports)}


def card_facts(profile: config.Profile) -> CardFacts:
    """The facts of a student's model card."""
    return CardFacts(
        language=profile.language, teacher=profile.teacher.source, prefix=prefix_of(profile.teacher),
        max_length=profile.teacher.max_length, corpus=profile.corpus.source,
        characters=profile.vocabulary.characters, layers=profile.student.layers, init=profile.student.init,
        epochs=profile.distill.epochs, objectives=list(profile.distill.objectives),
    )  # fmt: skip
