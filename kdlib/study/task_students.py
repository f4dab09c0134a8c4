"""The stage that distils a model for a task, its report, its card and its ONNX files."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import AutoConfig, AutoTokenizer, pipeline
from transformers.utils.logging import disable_progress_bar

from kdlib import config
from kdlib.data.readers import read_file
from kdlib.data.tasks import Split, Task
from kdlib.errors import UserError
from kdlib.evaluation.benchmark import Trial, fewshot_sizes, score_rows
from kdlib.evaluation.finetuning import Rows, Tokens, answers, outputs
from kdlib.evaluation.metrics import headline, score
from kdlib.evaluation.paired_tests import paired_rows
from kdlib.evaluation.task_students import SOFT, Learner, learn, plain_auto, task_trials, teach
from kdlib.files import fingerprint, flaw, new_file, read_json, write_json
from kdlib.models.encoder import Encoder
from kdlib.models.families import positions
from kdlib.models.onnx import FILES, FOLDER, OnnxModel, export_task
from kdlib.models.tokenizer_files import save_tokenizer
from kdlib.study.model_card import CardFacts
from kdlib.study.stage import Context, Keyed, Report, Settings, Source, Stage, Watch

TUNING = ("seeds", "finetune_", "fewshot_steps", "freeze_embeddings", "bootstrap", "margin")  # prefixes of settings
TEMPLATE = Path(__file__).with_name("task_card.md")
PIPELINES = {"tokens": "token-classification"}


class TaskStudentSettings(Settings):
    """The settings of a task's model. tuning: the part of the benchmark's settings that says how to fine-tune."""

    task: str
    spec: config.TaskStudent
    tuning: config.Benchmark
    seed: int
    precision: config.Precision
    card: CardFacts


class Made(NamedTuple):
    """A task's model: its folder, and rows of its scores beside the fine-tuned teacher's."""

    folder: Path
    rows: list[dict]


def tuning_of(spec: config.Benchmark) -> config.Benchmark:
    """The settings of the benchmark that fine-tuning on a task depends on; the others have their defaults."""
    return config.Benchmark(**{name: value for name, value in spec if name.startswith(TUNING)})


class TaskStudent(Stage[TaskStudentSettings, Made]):
    """A plain transformers model for a task, distilled from its labelled rows and from texts without labels."""

    name = "task"
    teacher: Keyed[Encoder]
    student: Keyed[Encoder]
    tasks: Source[list[Task]]
    texts: Keyed[list]

    @property
    def task(self) -> Task:
        """The task."""
        return next(task for task in self.tasks.get() if task.name == self.settings.task)

    @property
    def drawn(self) -> Task:
        """The task with the labelled rows that the model learns from."""
        tuning = self.settings.tuning
        return self.task.small(tuning.finetune_rows, tuning.finetune_test_rows, self.settings.seed)

    def make(self, folder: Path, watch: Watch) -> None:
        """Fine-tune the teacher, label the texts, and train the student. An unfinished training is resumed."""
        spec, student, task = self.settings, self.student.get(), self.drawn
        tuning = spec.tuning
        teacher, texts, hidden = self.teacher.get(), self.texts.get(), spec.spec.hidden > 0
        found, soft = teach(teacher, task, texts, tuning, spec.seed, hidden, self.work / "teacher")
        model, predicted = learn(student, task, soft, spec.spec, tuning, spec.seed, self.work / "student")
        model.save_pretrained(folder)
        tokenizer = copy.deepcopy(student.tokenizer)
        longest = tuning.finetune_max_length or student.max_length
        tokenizer.model_max_length = min(longest, positions(model.config))
        save_tokenizer(tokenizer, folder)
        one = tuning.model_copy(update={"seeds": [spec.seed]})
        rows = [
            row
            for name, answer in (("teacher", found), ("student", predicted))
            for row in score_rows([score(task, answer)], one, model=name, task=task.name, method="model")
            if row.get("seed") is None
        ]
        write_json(folder / "scores.json", rows)
        labels = dict(kind=task.kind, rows=len(task.train), texts=len(soft) - len(task.train))
        write_json(folder / "task.json", labels)

    def add_unsealed(self, folder: Path) -> None:
        """Write the model card."""
        write_task_card(folder, self.settings.task, self.settings.card)

    def load(self, folder: Path) -> Made:
        """The folder and the scores."""
        return Made(folder, read_json(folder / "scores.json", list))


class TaskReportSettings(Settings):
    """The settings of the report: seeds are those of the benchmark."""

    spec: config.TaskStudent
    tuning: config.Benchmark
    precision: config.Precision


class TaskReport(Report[TaskReportSettings]):
    """Students of tasks beside the teacher, tf-idf and students on labels alone (notebook 04b).

    made: the stage of each task's model. An input is named by what it is and by its task.
    """

    name = "task"

    def __init__(self, context: Context, settings: TaskReportSettings, made: dict[str, TaskStudent]):
        super().__init__(context, settings, **{f"model {name}": stage for name, stage in made.items()})
        self.made = made

    def units(self) -> list[tuple[str, int, int]]:
        """What can be computed independently: task, labelled rows per class, seed."""
        return [
            (name, x, seed)
            for name, stage in self.made.items()
            for x in self._sizes(stage.task)
            for seed in self.settings.tuning.seeds
        ]

    def _sizes(self, task: Task) -> list[int]:
        spec = self.settings.tuning.model_copy(update={"fewshot": self.settings.spec.rows})
        return fewshot_sizes(task, spec)

    def unit(self, name: str, x: int, seed: int) -> list[Trial]:
        """The trials of a unit. A finished trial is kept in `task_trials/`."""
        stage, settings = self.made[name], self.settings
        task, tuning = stage.task, settings.tuning
        content = fingerprint(task.kind, task.labels, task.train.texts, task.train.targets, task.test.texts)
        about = [name for name in TUNING if name not in ("seeds", "bootstrap", "margin")]
        read = {name: value for name, value in tuning if name.startswith(tuple(about))}
        key = fingerprint(
            stage.teacher.key, stage.student.key, stage.texts.key, content, task.test.targets, read, self.context.bf16()
        )
        arms = settings.spec.arms if x == self._sizes(task)[0] else ()
        return task_trials(
            stage.teacher.get, stage.student.get, task, stage.texts.get, settings.spec, tuning, x, seed, list(arms),
            self.context.path / "task_trials", key,
        )  # fmt: skip

    def trials(self) -> list[Trial]:
        """The trials of all units."""
        self.context.ahead(self.name, self.units())
        return [trial for unit in self.units() for trial in self.unit(*unit)]

    def paired_rows(self, trials: Sequence[Trial]) -> list[dict]:
        """The student on soft labels against every other model, and the arms against it, on the same rows and seeds."""
        names = dict.fromkeys(trial.model for trial in trials)
        arms = [name for name in names if name.startswith(f"{SOFT}:")]
        pairs = [(SOFT, name) for name in names if name != SOFT and name not in arms]
        return paired_rows(trials, pairs + [(arm, SOFT) for arm in arms], self.settings.tuning)

    def rows(self) -> list[dict]:
        """The scores of the models that `tasks/` holds, and of their ONNX files where there are any."""
        return [row for stage in self.made.values() for row in stage.get().rows + task_numbers(stage.folder)]


def write_task_card(folder: Path, task: str, facts: CardFacts) -> None:
    """Write README.md into the folder of a task's model."""
    about = read_json(folder / "task.json")
    settings = read_json(folder / "config.json")
    rows = [*read_json(folder / "scores.json", list), *task_numbers(folder)]
    shown = [
        f"| {row['model']} | {row['method']} | {row['value']:.3f} | "
        + (f"{row['low']:.3f} to {row['high']:.3f} |" if row.get("low") is not None else "|")
        for row in rows
        if row["metric"] == headline(about["kind"])
    ]
    use = PIPELINES.get(about["kind"], "text-classification")
    card = ModelCard.from_template(
        ModelCardData(
            language=facts.language, library_name="transformers", pipeline_tag=use, tags=["distillation", task],
            license="mit" if facts.teacher == "embedded" else "other",
        ),
        str(TEMPLATE), facts=facts, task=task, about=about, use=use, metric=headline(about["kind"]),
        labels=list(settings["id2label"].values()), numbers="\n".join(shown), n=rows[0]["n"],
    )  # fmt: skip
    with new_file(folder / "README.md") as path:
        path.write_text(card.content, "utf-8")


def task_folder(run: Path, task: str) -> Path:
    """The folder of a task's model in a run. Raises UserError where there is none, or a damaged one."""
    folder = run / "tasks" / task
    if not folder.is_dir():
        there = sorted(path.name for path in (run / "tasks").glob("*") if path.is_dir())
        known = f"there are {', '.join(there)}" if there else "notebook 04b makes them (a task with distill: true)"
        raise UserError(f"{folder}: no model of this task; {known}")
    if fault := flaw(folder):
        raise UserError(f"{folder}: {fault}; distil it again (kdlib run --only task)")
    return folder


def predict(folder: Path, file: Path, text: str = "text", second: str = "second") -> pd.DataFrame:
    """Label the texts of a file.

    Args:
        folder: of a task's model.
        file: a text a line, or a table (csv, tsv, jsonl, parquet).
        text: column of the text.
        second: column of the second text, for a task of pairs.

    Returns:
        A line for each text: text (and second), label and score; for multilabel the labels of which the model is more
        sure than not, and for tokens each entity as "kind: words".

    Raises:
        UserError: for a file that cannot be read or lacks a column.
    """
    kind, frame = read_json(folder / "task.json")["kind"], read_file(file)
    columns = [text] if kind != "pair" else [text, second]
    if missing := [name for name in columns if name not in frame]:
        raise UserError(f"{file}: no column {missing[0]!r}; there are {', '.join(map(str, frame.columns))}")
    disable_progress_bar()
    use, rows = PIPELINES.get(kind, "text-classification"), frame[columns].astype(str)
    given: list[Any] = list(rows[text])
    if kind == "pair":
        given = [{"text": a, "text_pair": b} for a, b in zip(given, rows[second], strict=True)]
    more: dict[str, Any] = {"aggregation_strategy": "simple"} if kind == "tokens" else {"truncation": True}
    if kind == "multilabel":
        more["top_k"] = None
    found = [] if not given else pipeline(use, model=str(folder), batch_size=16, **more)(given)
    labels, scores = [], []
    for answer in found:
        if kind == "tokens":
            labels.append("; ".join(f"{entity['entity_group']}: {entity['word']}" for entity in answer))
            scores.append(min((entity["score"] for entity in answer), default=np.nan))
        elif kind == "multilabel":
            on = [entry for entry in answer if entry["score"] > 0.5]
            labels.append(", ".join(entry["label"] for entry in on))
            scores.append(min((entry["score"] for entry in on), default=np.nan))
        else:
            labels.append(answer["label"])
            scores.append(answer["score"])
    return rows.assign(label=labels, score=np.round(np.array(scores, float), 4))


class _OnnxTask(nn.Module):
    """An ONNX file of a task's model, called like the model."""

    def __init__(self, file: Path):
        super().__init__()
        self.inner = OnnxModel(file, AutoConfig.from_pretrained(file.parent))

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": torch.from_numpy(self.inner.run("logits", **inputs))}


def export_task_student(folder: Path, task: Task, int8: bool = True, bootstrap: int = 1000) -> list[dict]:
    """Write a task's model as ONNX files, and score them beside torch on the test rows.

    Args:
        folder: of the model; the files are in its onnx/, the rows in onnx/numbers.csv.
        task: its test rows are predicted.
        int8: also write 8-bit weights.
        bootstrap: samples of an interval.

    Returns:
        Rows of size and scores: method "torch fp32", "onnx fp32" and "onnx int8".
    """
    model = plain_auto(task.kind).from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export_task(model, tokenizer, folder, int8)
    encoder = Encoder(model.base_model, tokenizer, folder.name, "", tokenizer.model_max_length)
    tested = Rows(Tokens(encoder), task.kind, Split(task.test.texts, [None] * len(task.test)))
    spec, rows = config.Benchmark(seeds=[0], bootstrap=bootstrap), []
    kinds = {kind: file for kind, file in FILES.items() if int8 or "int8" not in kind}
    for kind, file in {"torch fp32": "../model.safetensors", **kinds}.items():
        path = folder / FOLDER / file
        read = Learner(model, task.kind, config.TaskStudent()) if kind.startswith("torch") else _OnnxTask(path)
        about = dict(model="student", task=task.name, method=kind)
        found = answers(outputs(read, tested, False), task.kind)
        rows += [row for row in score_rows([score(task, found)], spec, **about) if row.get("seed") is None]
        rows.append(about | dict(metric="megabytes", value=path.stat().st_size / 1e6))
    with new_file(folder / FOLDER / "numbers.csv") as path:
        pd.DataFrame(rows).to_csv(path, index=False)
    return rows


def task_numbers(folder: Path) -> list[dict]:
    """The rows that `export_task_student` wrote; none where nothing was exported."""
    file = folder / FOLDER / "numbers.csv"
    if not file.is_file():
        return []
    table = pd.read_csv(file).astype(object)
    return table.where(table.notna(), None).to_dict("records")
