"""What a study will take: seconds and gigabytes of its stages, by the cost model of docs/scale.md.

Two numbers of the machine are measured in some seconds: the arithmetic it does in a second while training, and what a
step costs whatever is in it; and the arithmetic in a second without gradients.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel, PreTrainedConfig

from kdlib import config
from kdlib.data.tasks import Task
from kdlib.device import autocast, pick_device, use_bf16
from kdlib.distillation.objectives import RequiredOutputs
from kdlib.errors import UserError
from kdlib.evaluation.benchmark import fewshot_sizes
from kdlib.models import embedded_teacher
from kdlib.models.families import family_of
from kdlib.progress import clock
from kdlib.study.plan import Graph
from kdlib.study.reports import LEFT_OUT
from kdlib.study.stage import Context

FIT = 0.5  # seconds of fitting and testing a linear probe
START = 6.0  # seconds of a notebook besides its work: figures, tables, loading models
SAMPLE = 300  # texts that are tokenised to know the mean length
REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """The sizes of an encoder that its costs depend on."""

    layers: int
    hidden: int
    ffn: int
    rows: int

    def operations(self, tokens: float, length: float) -> float:
        """Floating-point operations of a forward pass over so many tokens, in texts of a mean length."""
        layer = 8 * self.hidden**2 + 4 * self.hidden * self.ffn + 4 * self.hidden * length
        return tokens * self.layers * layer

    @property
    def gigabytes(self) -> float:
        """Size of the weights in float32."""
        layer = 4 * self.hidden**2 + 2 * self.hidden * self.ffn + 13 * self.hidden
        return 4e-9 * (self.layers * layer + (self.rows + 516) * self.hidden)


@dataclass(frozen=True)
class Machine:
    """What was measured: operations a second without and with gradients, and seconds of a step."""

    forward: float
    training: float
    step: float


@dataclass(frozen=True)
class Line:
    """A part of a stage, and what it will take."""

    stage: str
    what: str
    seconds: float
    gigabytes: float = 0.0


def measure(shape: Shape, device: torch.device, bf16: bool, length: int = 48) -> Machine:
    """Measure this machine on two layers of a shape.

    Args:
        shape: of the teacher.
        device: where the study runs.
        bf16: whether it computes in bfloat16.
        length: tokens of a text.
    """
    part = Shape(2, shape.hidden, shape.ffn, 100)
    heads = next(n for n in (12, 8, 4, 2, 1) if shape.hidden % n == 0)
    settings = BertConfig(
        vocab_size=100, hidden_size=part.hidden, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=part.ffn, max_position_embeddings=length, attn_implementation="eager",
    )  # fmt: skip
    model = BertModel(settings, add_pooling_layer=False).to(device)

    def seconds(texts: int, train: bool) -> float:
        ids = torch.randint(5, 100, (texts, length), device=device)
        optimiser = torch.optim.AdamW(model.parameters(), fused=True)
        found = []
        for _ in range(REPEATS + 1):
            begun = time.perf_counter()
            with torch.set_grad_enabled(train), autocast(device, bf16):
                loss = model(ids).last_hidden_state.float().square().mean()
            if train:
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
            loss.item()  # waits for a GPU
            found.append(time.perf_counter() - begun)
        return statistics.median(found[1:])  # the first is slower

    few, many = 4, 24
    forward = part.operations(many * length, length) / seconds(many, False)
    short, long = seconds(few, True), seconds(many, True)
    training = 3 * part.operations((many - few) * length, length) / max(long - short, 0.2 * long)
    return Machine(forward, training, max(0.0, short - 3 * part.operations(few * length, length) / training))


class Plan:
    """The stages of a profile with what they will take.

    Args:
        graph: of the profile; the corpus and the tasks are read, and nothing is computed.
        machine: what was measured; None: it is measured now.
    """

    def __init__(self, graph: Graph, machine: Machine | None = None):
        self.graph, self.profile = graph, graph.profile
        device = graph.context.device
        self.teacher, self.tokenizer = _teacher(self.profile.teacher)
        self.machine = machine or measure(self.teacher, device, use_bf16(self.profile.distill.precision, device))
        self.tasks = graph.tasks.get()
        rows = self.profile.vocabulary.max_rows or self.teacher.rows
        self.rows = min(rows, self.teacher.rows) if self.profile.vocabulary.prune else self.teacher.rows

    def _length(self, texts: Sequence) -> float:
        """Mean tokens of texts, of a sample of them, truncated as the teacher truncates."""
        some = list(texts[:: max(1, len(texts) // SAMPLE)])[:SAMPLE]
        some = [text if isinstance(text, str) else " ".join(text) for text in some]
        limit = self.profile.teacher.max_length
        return sum(min(limit, len(ids)) for ids in self.tokenizer(some)["input_ids"]) / max(1, len(some))

    def student(self, profile: config.Profile) -> Shape:
        """The shape of a profile's student."""
        spec = profile.student
        hidden = spec.hidden or self.teacher.hidden
        ffn = spec.ffn or (self.teacher.ffn if hidden == self.teacher.hidden else 4 * hidden)
        rows = self.teacher.rows
        if profile.vocabulary.prune:
            rows = min(rows, profile.vocabulary.max_rows or rows)
        return Shape(spec.layers, hidden, ffn, rows)

    def _read(self, shape: Shape, tokens: float, length: float) -> float:
        return shape.operations(tokens, length) / self.machine.forward

    def _train(self, shape: Shape, tokens: float, length: float, steps: float) -> float:
        return 3 * shape.operations(tokens, length) / self.machine.training + steps * self.machine.step

    def _distill(self, profile: config.Profile, most: int | None, known: set) -> tuple[float, float]:
        """Seconds and gigabytes of a distillation. `known`: what the cache holds already; it is added to."""
        spec, graph = profile.distill, Graph(profile, self.graph.context)
        texts = graph.texts(spec.max_texts, most, share=spec.fraction).get()
        length = self._length(texts)
        tokens, shape = length * len(texts), self.student(profile)
        outputs = RequiredOutputs.of(spec.objectives)
        layers = shape.layers + outputs.embedded if outputs.layers else 1
        size = 2e-9 * tokens * self.teacher.hidden * layers
        cached = spec.cache and outputs.cacheable and not spec.teacher_noise and size <= spec.cache_gigabytes
        key = (profile.condition.use, len(texts), layers, str(spec.layers))
        passes = 0.0 if cached and key in known else 1.0 if cached else spec.epochs
        known.add(key)
        seconds = self._read(self.teacher, passes * tokens, length)
        if outputs.masked:
            seconds += 6 * 0.15 * spec.epochs * tokens * shape.hidden * shape.rows / self.machine.training
        steps = spec.epochs * tokens / spec.batch_tokens
        seconds += self._train(shape, spec.epochs * tokens, length, steps)
        return seconds, (size if cached and passes else 0.0) + shape.gigabytes

    def _tune(self, shape: Shape, task: Task, rows: float, steps: float, epochs: float) -> float:
        """Seconds of one fine-tuning and its test."""
        spec = self.profile.benchmark
        length, tested = self._length(task.train.texts), min(len(task.test), spec.finetune_test_rows or len(task.test))
        steps = max(steps, epochs * rows / spec.finetune_batch)
        tokens = steps * spec.finetune_batch * length
        return self._train(shape, tokens, length, steps) + self._read(shape, tested * length, length)

    def lines(self) -> list[Line]:
        """A line for each stage, each student and each family of arms."""
        profile, graph, spec = self.profile, self.graph, self.profile.benchmark
        start, known = [Line(name, "", START) for name in graph.reports], set()
        by = {line.stage: [line] for line in start}

        def add(stage: str, what: str, seconds: float, gigabytes: float = 0.0) -> None:
            by[stage].append(Line(stage, what, seconds, gigabytes))

        def items(task: Task, train: int | None, test: int | None) -> float:
            rows = min(len(task.train), train or len(task.train)) + min(len(task.test), test or len(task.test))
            return rows * self._length(task.train.texts)

        probed = sum(items(task, profile.probe.train_rows, profile.probe.test_rows) for task in self.tasks)
        for texts in graph.parallel.get().values():
            probed += len(texts) * self._length(texts)
        add("probe", f"teacher reads {probed:,.0f} tokens", self._read(self.teacher, probed, 48))
        fits = len(self.tasks) * (self.teacher.layers + 1 + 4 * len(spec.seeds))  # every layer; teacher and controls
        add("probe", f"{fits} linear probes", fits * FIT)
        pruned = Shape(self.teacher.layers, self.teacher.hidden, self.teacher.ffn, self.rows)
        add("prune", f"{self.rows:,} of {self.teacher.rows:,} rows", 0.0, pruned.gigabytes)
        texts = graph.texts(profile.condition.max_texts).get()
        length = self._length(texts)
        tokens, once = length * len(texts), profile.condition
        head = 6 * once.mask * tokens * self.teacher.hidden * self.rows / self.machine.training
        seconds = (once.epochs + once.head_epochs) * head + self._read(self.teacher, once.head_epochs * tokens, length)
        steps = once.epochs * tokens / once.batch_tokens
        seconds += self._train(self.teacher, once.epochs * tokens, length, steps)
        add("condition", f"{tokens:,.0f} tokens", seconds, pruned.gigabytes)
        add("distill", "student", *self._distill(profile, None, known))
        for name, other in graph.others.items():
            add("benchmark", f"student {name}", *self._distill(other.profile, None, known))
        shapes = {"teacher": self.teacher, "pruned teacher": pruned, "conditioned teacher": pruned}
        student = self.student(profile)
        models = {
            name: shapes.get(name, self.student(graph.others[name].profile) if name in graph.others else student)
            for name in graph.models
        }
        known_rows = (spec.probe_rows or 10**9) <= profile.probe.train_rows
        for method in ("probe", "finetune", "fewshot"):
            seconds, trials = 0.0, 0
            for name, shape in models.items():
                if name in LEFT_OUT[method]:
                    continue
                for task in (task for task in self.tasks if task.name in graph.named(method)):
                    if method == "probe" and (name == "pruned teacher" or (name == "teacher" and known_rows)):
                        continue  # its vectors are known from notebook 01
                    if method == "probe":
                        seconds += self._read(shape, items(task, spec.probe_rows, spec.probe_test_rows), 48)
                        trials += len(spec.seeds)
                        continue
                    rows = min(len(task.train), spec.finetune_rows or len(task.train))
                    sizes = fewshot_sizes(task, spec) if method == "fewshot" else [None]
                    for size in sizes:
                        drawn = rows if size is None else len(task.few(size, None).train)
                        steps = spec.fewshot_steps if size else 0
                        seconds += len(spec.seeds) * self._tune(shape, task, drawn, steps, spec.finetune_epochs)
                        trials += len(spec.seeds)
            add("benchmark", f"{method}: {trials} trials", seconds + (trials * FIT if method == "probe" else 0))
        for made in (graph.task_student(task) for task in profile.tasks if task.distill):
            seconds = self._task(made.task, made.texts.get(), student)
            add("task", made.settings.task, seconds, student.gigabytes)
        families: dict[str, list[float]] = {}
        graded = [task for task in self.tasks if task.name in {t.name for t in profile.tasks if t.ablate}]
        rows = sum(items(task, spec.probe_rows, spec.probe_test_rows) for task in graded)
        fits = FIT * len(graded) * len(spec.seeds)
        made = set()  # the first arms of several families are one
        for arm, stages in graph.grid:
            new = [stage for stage in stages if stage.key not in made]
            made |= {stage.key for stage in new}
            seconds = [self._distill(arm.profile, profile.ablations.max_texts, known)[0] for _ in new]
            scored = self._read(self.student(arm.profile), rows, 48) + fits
            families.setdefault(arm.family, []).append(sum(seconds) + len(new) * scored)
        for family, found in families.items():
            add("ablations", f"{family}: {len(found)} arms x {len(profile.ablations.seeds)}", sum(found))
        return [line for lines in by.values() for line in lines]

    def _task(self, task: Task, texts: Sequence, student: Shape) -> float:
        """Seconds of all trials of a task's student, and of the model itself."""
        spec, tuning, seconds = self.profile.task_student, self.profile.benchmark, 0.0
        own = self._length(task.train.texts)
        read, length = len(texts) * self._length(texts), self._length(texts)
        sizes = fewshot_sizes(task, tuning.model_copy(update={"fewshot": spec.rows}))
        drawn = [(len(task.few(size, None).train), len(tuning.seeds)) for size in sizes]
        drawn.append((min(len(task.train), tuning.finetune_rows or len(task.train)), 1))
        for place, (rows, seeds) in enumerate(drawn):
            arms = len(spec.arms) if place == 0 else 0
            alone = self._tune(student, task, rows, tuning.fewshot_steps, spec.epochs)
            steps = spec.epochs * len(texts) / tuning.finetune_batch
            soft = alone + self._train(student, spec.epochs * read, length, steps)
            once = self._tune(self.teacher, task, rows, tuning.fewshot_steps, tuning.finetune_epochs)
            once += self._read(self.teacher, rows * own + read, length) + (1 + arms) * soft
            once += alone if place < len(sizes) else 0.0  # the model itself is trained on soft labels only
            seconds += seeds * once
        return seconds


def _teacher(spec: config.Teacher) -> tuple[Shape, Any]:
    """The shape and the tokenizer of a teacher, without its weights. Raises UserError where they cannot be read."""
    source = embedded_teacher.folder() if spec.source == "embedded" else spec.source
    try:
        settings: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=spec.revision)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"teacher.source {spec.source!r}: its config.json cannot be read ({reason})") from None
    ffn = getattr(settings, family_of(settings.model_type, str(source)).ffn)
    return Shape(settings.num_hidden_layers, settings.hidden_size, ffn, settings.vocab_size), tokenizer


def print_plan(profile: str, overrides: Any = ()) -> None:
    """Print the plan of a profile as a table, with the sum of each stage and of all."""
    loaded = config.load_profile(profile, overrides)
    with tempfile.TemporaryDirectory(prefix="kdlib-plan-") as folder:
        context = Context(Path(folder), pick_device(loaded.device), loaded.distill.precision)
        graph = Graph(loaded, context)
        graph.check()
        made = Plan(graph)
        lines = made.lines()
    table = Table(title=f"plan of {loaded.name}", box=box.SIMPLE)
    for name, side in (("stage", "left"), ("what", "left"), ("time", "right"), ("GB", "right")):
        table.add_column(name, justify=side)
    for stage in dict.fromkeys(line.stage for line in lines):
        parts = [line for line in lines if line.stage == stage]
        table.add_row(stage, "", clock(sum(p.seconds for p in parts)), f"{sum(p.gigabytes for p in parts):.2f}")
        for part in parts:
            if part.what:
                table.add_row("", part.what, clock(part.seconds), f"{part.gigabytes:.2f}" if part.gigabytes else "")
    jobs = loaded.compute.jobs
    table.add_row("all", "", clock(sum(line.seconds for line in lines)), f"{sum(line.gigabytes for line in lines):.2f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    found = made.machine
    console.print(
        f"Measured now, on {context.device}: {found.forward / 1e9:,.0f} GFLOP/s without gradients, "
        f"{found.training / 1e9:,.0f} with, {1000 * found.step:.0f} ms a step."
        + (f" With {jobs} jobs on machines of their own, trials and arms take 1/{jobs} of it." if jobs > 1 else ""),
        soft_wrap=True,
    )
