"""Profiles: every parameter of a study with its type and default, overrides, and errors for wrong values."""

import difflib
import re
import reprlib
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kdlib.errors import UserError
from kdlib.files import parse_yaml

Init = Literal["alternate", "late", "first", "last", "random"] | list[int]
Precision = Literal["auto", "fp32", "bf16"]


class Section(BaseModel):
    """A section of a profile: typed and frozen. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Source(Section):
    """Where text or rows come from.

    `embedded`, a hub id, a file of a hub data set (hf://datasets/owner/name/file), an address (https://), a local
    folder or a local file. A zip is read as the folder it holds.
    """

    source: str = Field(default="embedded", description="embedded, a hub id, an address, a local folder or file")
    subset: str | None = Field(default=None, description="configuration name of a hub data set")
    split: str = Field(default="train", description="split of a hub data set, or a word in the names of files")
    revision: str | None = Field(default=None, description="commit, tag or branch of a hub data set")
    encoding: str | None = Field(default=None, description="of text files, such as cp1252; null: UTF-8")
    repair: bool = Field(
        default=False, description="repair UTF-8 read twice, HTML entities and soft hyphens in the text"
    )


class Fallback(Source):
    """Another place for the same data, used when those before it cannot be read.

    Columns that it does not name have the names of the first place.
    """

    source: str = Field(description="as in the first place, but for `embedded`, which is other data")
    text: str | None = Field(default=None, description="column of the text; null: as in the first place")

    @model_validator(mode="after")
    def _is_the_same_data(self) -> "Fallback":
        if self.source == "embedded":
            raise PydanticCustomError("embedded_fallback", "embedded data cannot be a fallback for other data")
        return self


class CorpusFallback(Fallback):
    """Another place for the corpus."""

    document: str | None = Field(default=None, description="column of the document; null: as in the first place")


class TaskFallback(Fallback):
    """Another place for a task's rows."""

    test: str | None = Field(default=None, description="file or split of the test rows; null: 30% of the rows")
    second: str | None = Field(default=None, description="column of the second text; null: as in the first place")
    label: str | list[str] | None = Field(default=None, description="label columns; null: as in the first place")


class Teacher(Section):
    """An encoder by name: the teacher, or a baseline."""

    source: str = Field(default="embedded", description="embedded, a hub id, or a local folder")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the main branch")
    prefix: str | None = Field(default=None, description="text before every text; null: as the teacher was trained")
    max_length: int = Field(default=128, ge=8, description="tokens per text; longer texts are truncated")
    allow_pickle: bool = Field(default=False, description="load .bin weights where there is no safetensors file")


class Corpus(Source):
    """The text that students are distilled on."""

    text: str = Field(default="text", description="column that holds the text")
    document: str | None = Field(default=None, description="column that says which document a row belongs to")
    drop_repeats: bool = Field(default=False, description="leave out sentences that occurred before in the corpus")
    heldout: float = Field(default=0.03, gt=0, lt=0.5, description="share of documents kept for the held-out loss")
    max_documents: int | None = Field(default=None, ge=10, description="training documents at most; null: all")
    streaming: bool = Field(default=False, description="read the first max_documents documents only")
    fallbacks: list[CorpusFallback] = Field(default=[], description="other places for the same text, tried in order")

    @model_validator(mode="after")
    def _streams_so_many(self) -> "Corpus":
        if self.streaming and self.max_documents is None:
            raise PydanticCustomError("endless_stream", "streaming needs max_documents")
        return self


class Parallel(Source):
    """Sentences with their translations."""

    languages: list[str] = Field(
        default=["tgl", "eng", "spa", "ind", "ceb"],
        description="columns, named by language; objectives of translations take the first that is not the study's",
    )


class Task(Source):
    """One labelled task. Embedded: source `embedded`, name one of topic, sentiment, dengue, entailment, entities."""

    name: str = Field(description="name of the task in results; of an embedded task its own name")
    kind: Literal["classify", "multilabel", "pair", "tokens"] = Field(default="classify", description="its kind")
    text: str = Field(default="text", description="column of the text")
    second: str | None = Field(default=None, description="column of the second text (kind pair)")
    label: str | list[str] = Field(default="label", description="label column; a list of 0/1 columns (kind multilabel)")
    test: str | None = Field(default=None, description="file or split of the test rows; null: 30% of the rows")
    skip_empty: bool = Field(default=False, description="leave out rows without text or label; false: refuse them")
    fallbacks: list[TaskFallback] = Field(default=[], description="other places for the same rows, tried in order")
    probe: bool = Field(default=True, description="compare models by probe; notebook 01 uses all tasks")
    finetune: bool = Field(default=True, description="fine-tune on it in the benchmark")
    fewshot: bool = Field(default=True, description="fine-tune on the few examples per class of benchmark.fewshot")
    ablate: bool = Field(default=True, description="probe the ablation arms on it")
    distill: bool = Field(default=False, description="distil a model for it (notebook 04b)")
    unlabelled: str | None = Field(default=None, description="file of more texts without labels, for notebook 04b")


class Probe(Section):
    """How the teacher is probed."""

    languages_rows: int = Field(
        default=500, ge=20, description="parallel sentences used; objectives of translations take those after them"
    )
    cka_sentences: int = Field(default=400, ge=20, description="held-out sentences that CKA compares layers on")
    cloze_sentences: int = Field(default=50, ge=5, description="sentences for pseudo-perplexity and cloze")
    train_rows: int = Field(default=600, ge=20, description="training items of a layer probe, per task")
    test_rows: int = Field(default=400, ge=20, description="test items of a layer probe, per task")


class Vocabulary(Section):
    """Which tokens are kept."""

    prune: bool = Field(default=True, description="false: the student keeps the teacher's whole vocabulary")
    wordlist: bool = Field(default=True, description="keep the tokens of wordfreq's words for the language")
    characters: Literal["scripts", "all"] = Field(default="scripts", description="single characters to keep")
    max_rows: int | None = Field(default=None, ge=100, description="embedding rows to keep at most")
    coverage: float | None = Field(
        default=None,
        gt=0.5,
        lt=1,
        description="keep as few rows as cover this share of each language's held-out tokens",
    )


class Condition(Section):
    """Further masked-language training of the pruned teacher on the target language, before it is distilled."""

    use: bool = Field(default=False, description="distill from the conditioned teacher")
    epochs: float = Field(default=1.0, gt=0, description="passes over the texts")
    head_epochs: float = Field(default=3.0, ge=0, description="passes that train a new head alone first")
    learning_rate: float = Field(default=5e-5, gt=0, description="highest learning rate")
    head_rate: float = Field(default=1e-3, gt=0, description="learning rate of the warm-up")
    mask: float = Field(default=0.15, gt=0, lt=1, description="share of the tokens that are masked")
    whole_words: bool = Field(default=False, description="mask all tokens of a word together")
    batch_tokens: int = Field(default=2048, ge=64, description="tokens per batch, padding included")
    max_texts: int | None = Field(default=None, ge=50, description="texts that are used at most; null: all")


PRESETS = {
    "base": dict(layers=6, hidden=768, ffn=3072, heads=12),  # Cruz and Aji 2025
    "tiny": dict(layers=4, hidden=312, ffn=1200, heads=12),  # theirs, too
    "comet": dict(layers=6, hidden=256, ffn=1024, heads=8),  # AfroXLMR-Comet 2025
    "slim": dict(layers=6, ffn=768, narrow="importance"),  # beside the embedded teacher as large as 4 whole layers
}


class Student(Section):
    """The sizes of the student, and its initialisation."""

    preset: Literal["base", "tiny", "comet", "slim"] | None = Field(
        default=None, description="sizes not named are the preset's"
    )
    layers: int = Field(default=4, ge=1, description="transformer layers")
    hidden: int | None = Field(default=None, ge=8, description="width; null: the teacher's")
    ffn: int | None = Field(default=None, ge=8, description="width of the feed-forward layers; null: the teacher's")
    heads: int | None = Field(default=None, ge=1, description="attention heads; null: the teacher's")
    init: Init = Field(default="alternate", description="layers to copy: a rule or a list; or random")
    narrow: Literal["pca", "importance", "truncate", "random"] = Field(
        default="pca",
        description="start of a narrower student; importance: removes the least important neurons and heads",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: Any) -> Any:
        known = isinstance(values, dict) and PRESETS.get(str(values.get("preset")))
        return {**known, **values} if known else values


class Distill(Section):
    """The distillation."""

    objectives: dict[str, float] = Field(
        default={"hidden": 1.0, "sentence": 1.0},
        description="weight of each objective; they are described in kdlib/distillation/objectives.py",
    )
    layers: Literal["alternate", "late", "first", "last"] | list[int] = Field(
        default="alternate", description="teacher layers that student layers are compared with: a rule or a list"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**32, description="of the order of the texts and of new weights; null: the study's seed"
    )
    temperature: float = Field(default=2.0, gt=0, description="of the soft targets (objective kl)")
    relation_heads: int = Field(
        default=12, ge=1, description="relation heads (objective relation), which divide both widths; MiniLMv2: 48"
    )
    mask: float = Field(default=0.15, gt=0, lt=1, description="share of masked tokens (objectives kl and mlm)")
    projection: Literal["auto", "shared"] = Field(
        default="auto",
        description="projection of states: a least-squares fit where widths differ, or TinyBERT's (shared)",
    )
    teacher_noise: bool = Field(default=False, description="dropout in the teacher too, as TinyBERT's script has it")
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of the training texts")
    epochs: float = Field(default=3.0, gt=0, description="passes over the texts")
    learning_rate: float = Field(default=5e-4, gt=0, description="highest learning rate")
    weight_decay: float = Field(default=0.01, ge=0, description="of AdamW")
    beta2: float = Field(default=0.999, gt=0, lt=1, description="of AdamW; 0.98 helps a short training")
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps")
    batch_tokens: int = Field(default=2048, ge=64, description="tokens per batch, padding included")
    windows: list[Annotated[int, Field(ge=1)]] = Field(
        default=[1, 2, 3], min_length=1, description="neighbouring sentences of a text, in turn"
    )
    freeze_embeddings: bool = Field(default=True, description="do not train copied embeddings")
    cache: bool = Field(default=True, description="compute the teacher's states once and keep them in the run folder")
    cache_gigabytes: float = Field(default=8.0, ge=0, description="largest cache; above it the teacher runs live")
    precision: Precision = Field(default="auto", description="auto: bfloat16 where it is measured to be faster")
    compile: bool | None = Field(default=None, description="torch.compile; null: on a GPU")
    evaluations: int = Field(default=8, ge=1, description="evenly spaced held-out evaluations, after one at the start")
    heldout_texts: int = Field(default=400, ge=10, description="held-out texts of an evaluation at most")
    max_texts: int | None = Field(default=None, ge=50, description="texts of the corpus that are used at most")


class Benchmark(Section):
    """How models are compared."""

    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default=[0, 1, 2], min_length=1, description="a trial each"
    )
    probe_share: float = Field(default=0.9, gt=0, le=1, description="share of the training set each probe seed draws")
    probe_rows: int | None = Field(default=None, ge=20, description="training rows of a probe at most; null: all")
    probe_test_rows: int | None = Field(default=None, ge=20, description="test rows of a probe at most; null: all")
    finetune_rows: int | None = Field(default=None, ge=20, description="training rows of a fine-tuning run at most")
    finetune_test_rows: int | None = Field(default=None, ge=20, description="test rows of fine-tuning at most")
    finetune_head: Literal["random", "probe"] = Field(
        default="random", description="start of the new head: random, or the linear probe of the rows"
    )
    finetune_epochs: float = Field(default=3.0, gt=0, description="passes over the rows")
    finetune_rate: float = Field(default=2e-5, gt=0, description="highest learning rate of fine-tuning")
    finetune_batch: int = Field(default=32, ge=1, description="texts a step; the paper: 4 times 8")
    finetune_max_length: int | None = Field(
        default=None, ge=8, description="tokens per text in fine-tuning; null: teacher.max_length"
    )
    finetune_fp16: bool = Field(default=False, description="half precision in fine-tuning on a GPU, as the paper")
    freeze_embeddings: bool = Field(default=False, description="do not train the embeddings in fine-tuning")
    fewshot: list[Annotated[int, Field(ge=1)]] = Field(default=[], description="examples per class of few-shot runs")
    fewshot_steps: int = Field(default=60, ge=1, description="steps of a few-shot run at least")
    margin: float = Field(default=0.02, gt=0, lt=1, description="scores that differ by less are equivalent")
    latency_runs: int = Field(default=30, ge=3, description="texts that are timed one at a time")
    bootstrap: int = Field(default=1000, ge=100, description="resamples of an interval")


class TaskStudent(Section):
    """The distillation of a model for a task: it learns from labels and from the teacher's soft labels."""

    rows: list[Annotated[int, Field(ge=1)]] = Field(
        default=[8, 16, 64, 256], min_length=1, description="labelled rows per class, a comparison each"
    )
    texts: int = Field(default=2000, ge=0, description="texts of the corpus that the teacher labels")
    share: float = Field(default=0.9, ge=0, le=1, description="weight of the soft labels; the labels have the rest")
    temperature: float = Field(default=2.0, gt=0, description="of the soft labels")
    hidden: float = Field(default=0.0, ge=0, description="weight of the distance to the teacher's text vectors")
    confidence: float = Field(default=0.0, ge=0, lt=1, description="least probability of the teacher's label")
    balance: bool = Field(default=False, description="as many texts of every class, as the teacher labels them")
    epochs: float = Field(default=3.0, gt=0, description="passes over all texts")
    learning_rate: float = Field(default=1e-4, gt=0, description="highest learning rate of the student")
    arms: dict[str, dict[str, Any]] = Field(
        default={
            "confident": {"confidence": 0.7},
            "balanced": {"balance": True},
            "hidden": {"hidden": 1.0},
            "labels, as many steps": {"share": 0.0},
        },
        description="other settings that are compared, with the fewest rows",
    )

    @model_validator(mode="after")
    def _arms_are_settings(self) -> "TaskStudent":
        for name in self.arms:
            self.arm(name)
        return self

    def arm(self, name: str) -> "TaskStudent":
        """These settings with the changes of an arm, and without arms."""
        return TaskStudent.model_validate(self.model_dump() | {"arms": {}} | self.arms[name])


class Ablations(Section):
    """The experiments. A family is one question; an arm is one setting: the parameters that it changes.

    The first arm of a family is its base, which the others are compared with.
    """

    epochs: float = Field(default=1.0, gt=0, description="distill.epochs of every arm that does not change it")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default=[0], min_length=1, description="distill.seed of each student of an arm"
    )
    max_texts: int | None = Field(default=None, ge=50, description="texts that arms are distilled on at most")
    arms: dict[Annotated[str, Field(pattern=r"^\w[\w +.-]*$")], dict[str, dict[str, Any]]] = {
        "fraction": {f"{share:.0%}": {"distill.fraction": share} for share in (1.0, 0.5, 0.3, 0.1)},
        "init": {init: {"student.init": init} for init in ("alternate", "last", "first", "random")},
        "objective": {
            "hidden": {"distill.objectives": {"hidden": 1.0}},
            "sentence": {"distill.objectives": {"sentence": 1.0}},
            "hidden + sentence": {"distill.objectives": {"hidden": 1.0, "sentence": 1.0}},
            "hidden + attention": {"distill.objectives": {"hidden": 1.0, "attention": 1.0}},
        },
    }


class Compute(Section):
    """Where the independent parts of a run are computed: arms, models, tasks and seeds. It changes no result."""

    jobs: int = Field(default=1, ge=1, description="parts that are computed at a time, each in a process of its own")
    backend: Literal["loky", "dask"] = Field(default="loky", description="loky: this machine; dask: a cluster")
    address: str | None = Field(default=None, description="of the dask scheduler, such as tcp://10.0.0.1:8786")

    @model_validator(mode="after")
    def _has_a_cluster(self) -> "Compute":
        if (self.backend == "dask") != (self.address is not None):
            raise PydanticCustomError(
                "no_cluster", "backend dask needs the address of its scheduler, and only that one"
            )
        return self


def _codes(value: Any) -> Any:
    codes = value if isinstance(value, list) else [value]
    if not codes or not all(isinstance(code, str) and len(code) > 1 for code in codes) or len({*codes}) < len(codes):
        raise PydanticCustomError(
            "language", "should be an ISO 639 code, or a list of different ones, the target first"
        )
    return value


TARGET_SHARE = 0.7  # of the training tokens, for the first of several languages


class Profile(Section):
    """A whole study. Field descriptions are the documentation of the parameters."""

    name: str = Field(default="workshop", description="what the study is called")
    language: Annotated[str | list[str], BeforeValidator(_codes)] = Field(
        default="tgl", description="ISO 639 code of the target language; a list adds languages after it"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of every random draw, except for `benchmark.seeds`")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where there is one")
    compute: Compute = Compute()
    teacher: Teacher = Teacher()
    corpus: Corpus = Corpus()
    corpora: dict[str, Corpus] = Field(default={}, description="corpora of the other languages, by code")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="share of the training tokens by language; default 0.7 for the target"
    )
    parallel: Parallel | None = Parallel()
    baselines: dict[str, Teacher] = Field(default={}, description="other encoders to benchmark, by display name")
    tasks: list[Task] = [
        Task(name="topic"),
        Task(name="sentiment"),
        Task(name="dengue", kind="multilabel"),
        Task(name="entailment", kind="pair"),
        Task(name="entities", kind="tokens"),
    ]
    probe: Probe = Probe()
    vocabulary: Vocabulary = Vocabulary()
    condition: Condition = Condition()
    student: Student = Student()
    distill: Distill = Distill()
    students: dict[str, dict[str, Any]] = Field(default={}, description="other students: name -> what they change")
    benchmark: Benchmark = Benchmark()
    task_student: TaskStudent = TaskStudent()
    ablations: Ablations = Ablations()

    @property
    def languages(self) -> list[str]:
        """The codes of all languages, the target first."""
        return [self.language] if isinstance(self.language, str) else self.language

    @property
    def target(self) -> str:
        """The code of the target language."""
        return self.languages[0]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the training tokens of each language; their sum is 1."""
        others = len(self.languages) - 1
        usual = {code: (1 - TARGET_SHARE) / others if others else 1.0 for code in self.languages}
        weights = self.weights or usual | ({self.target: TARGET_SHARE} if others else {})
        return {code: weights[code] / sum(weights.values()) for code in self.languages}

    @model_validator(mode="after")
    def _names_every_language(self) -> "Profile":
        others = self.languages[1:]
        for name, given, codes in (("corpora", self.corpora, others), ("weights", self.weights, self.languages)):
            if (given or name == "corpora") and set(given) != set(codes):
                raise PydanticCustomError(
                    "languages",
                    "{name} should name {codes}",
                    {"name": name, "codes": ", ".join(codes) or "no language"},
                )
        return self


def profile_names() -> list[str]:
    """Names of the profiles that come with the kit."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("kdlib.profiles").iterdir() if p.name.endswith(".yaml")
    )


def load_profile(profile: str | Path = "workshop", overrides: str | Sequence[str] | dict[str, Any] = ()) -> Profile:
    """Load and check a profile.

    Args:
        profile: a name, or a YAML file.
        overrides: "distill.epochs=3 seed=1", a list of such assignments (values are YAML), or a dict of dotted keys.

    Raises:
        UserError: for an unknown profile, an unknown key (with the closest valid ones) or a wrong value.
    """
    profile = str(profile)
    if profile in profile_names():
        text = (resources.files("kdlib.profiles") / f"{profile}.yaml").read_text("utf-8")
    elif profile.endswith((".yaml", ".yml")):
        try:
            text = Path(profile).read_text("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"profile {profile}: cannot be read (not UTF-8 text)") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"profile {profile!r}: cannot be read ({getattr(error, 'strerror', None) or error})"
            ) from None
    else:
        raise UserError(f"unknown profile {profile!r}: {', '.join(profile_names())}, or a .yaml file")
    return _with(parse_yaml(text, profile), parse_overrides(overrides), profile)


def changed(profile: Profile, overrides: dict[str, Any], origin: str) -> Profile:
    """A copy of the profile with some dotted keys changed, checked. `origin` is its name in errors."""
    return _with(profile.model_dump(), overrides, origin)


def _with(tree: dict, overrides: dict[str, Any], origin: str) -> Profile:
    if (preset := overrides.get("student.preset")) and isinstance(tree.get("student"), dict):
        for key in {*PRESETS["base"], *PRESETS.get(str(preset), {})}:  # it replaces the sizes in the profile
            tree["student"].pop(key, None)
    for key, value in overrides.items():
        _assign(tree, key, value)
    return check(tree, origin)


LARGEST = 100_000  # values in a profile; YAML aliases can make more than fits in memory
_SHORT = reprlib.Repr()  # values in messages are cut, since YAML aliases can make them huge
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100
_WORDS = {
    "model_type": "should be a section of keys",
    "list_type": "should be a list",
    "dict_type": "should be a mapping of names to values",
    "string_type": "should be text (quotes make it so)",
    "too_short": "should hold one value at least",
    "missing": "is missing",
}


def check(tree: dict, origin: str) -> Profile:
    """Make a Profile of a nested dict. Raises UserError with the key, what was found and what would be right."""
    _refuse_unwritable(tree, origin)
    _refuse_unknown(tree, Profile, "")
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"] if not re.fullmatch(r"(literal|list)\[.*\]", str(part)))
            words = _WORDS.get(item["type"]) or item["msg"].removeprefix("Input ").removeprefix("String ")
            problems.append(f"{where}: {words}, got {_SHORT.repr(item['input'])}")
        raise UserError(f"profile {origin}: {'; '.join(dict.fromkeys(problems))}") from None


def _refuse_unwritable(tree: dict, origin: str) -> None:
    """Refuse aliases that contain themselves or grow too large, and text that no file can hold."""
    values = 0

    def walk(value: Any, path: str) -> None:
        nonlocal values
        values += 1
        if values > LARGEST:
            raise RecursionError
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise UserError(f"profile {origin}: {path or value!r} holds half a character ({_SHORT.repr(value)})")
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in inside:
            walk(key, path)
            walk(inner, f"{path}.{key}" if path else str(key))

    try:
        walk(tree, "")
    except RecursionError:
        raise UserError(f"profile {origin}: nested too deeply, or too many values through aliases (*name)") from None


def parse_overrides(overrides: str | Sequence[str] | dict[str, Any]) -> dict[str, Any]:
    """`a.b=c` assignments as a dict of dotted keys; values are YAML."""
    if isinstance(overrides, dict):
        return {str(key): value for key, value in overrides.items()}
    if isinstance(overrides, str):
        try:
            overrides = shlex.split(overrides)
        except ValueError as error:
            raise UserError(f"overrides {overrides!r}: {error}") from None
    if not isinstance(overrides, (list, tuple)):
        raise UserError(f"overrides {overrides!r}: write key=value, for example distill.epochs=3")
    parsed = {}
    for item in overrides:
        key, equals, value = str(item).partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {item!r}: write key=value, for example distill.epochs=3")
        parsed[key.strip()] = parse_yaml(value, f"--set {key.strip()}", mapping=False)
    return parsed


def _assign(tree: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:  # absent, or switched off with null
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"--set {key}: {parent!r} holds a value, not a section")
    tree[last] = value


def _refuse_unknown(tree: dict, model: type[BaseModel], path: str) -> None:
    for key, value in tree.items():
        dotted = f"{path}{key}"
        if key not in model.model_fields:
            if isinstance(value, dict) and value:  # the longer path gives better suggestions
                dotted += f".{next(iter(value))}"
            valid = dict.fromkeys(all_keys(Profile) + [path + name for name in model.model_fields])
            close = difflib.get_close_matches(dotted, valid, n=3, cutoff=0.5)
            close = close or difflib.get_close_matches(str(key), {k.rpartition(".")[2]: None for k in valid}, n=3)
            raise UserError(
                f"unknown parameter {dotted!r}; closest: {', '.join(close) or ', '.join(model.model_fields)}"
            )
        inner = _section(model.model_fields[key].annotation)
        if inner and isinstance(value, dict):
            _refuse_unknown(value, inner, f"{dotted}.")
        elif inner and isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    _refuse_unknown(item, inner, f"{dotted}.{i}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section(arg) for arg in get_args(annotation) if get_origin(annotation) is not dict)
    return next(filter(None, inner), None)


def all_keys(model: type[BaseModel] = Profile, path: str = "") -> list[str]:
    """Every dotted key of a profile."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(path + name)
        inner = _section(field.annotation)
        if inner and get_origin(field.annotation) is not list:
            keys += all_keys(inner, f"{path}{name}.")
    return keys
