"""The cost model of docs/scale.md against measurements: seconds of a distillation, gigabytes of its files and weights.

    python -m benchmarks.cost

Models of several shapes are distilled for a few steps on one thread, and the seconds are those that the processor
spent, so that a busy machine does not blur them. Of the model two numbers are the machine's: what a step costs whatever
is in it, and the arithmetic done a second. They are fitted on all points but one, and that one is predicted.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel

from benchmarks.memory import encoder
from kdlib.config import Distill, Student
from kdlib.distillation.distill import distill
from kdlib.distillation.student_init import build_student
from kdlib.distillation.teacher_cache import gigabytes
from kdlib.distillation.tokenized_corpus import TokenizedCorpus, with_states
from kdlib.models.encoder import Encoder
from kdlib.models.token_store import Ragged


@dataclass(frozen=True)
class Job:
    """texts of `length` tokens, so many a batch; layers, hidden size and vocabulary of the teacher; the student has
    `kept` of its layers. cached: the teacher's states come from the cache."""

    length: int
    rows: int
    layers: int
    hidden: int
    vocabulary: int
    kept: int
    cached: bool = False
    texts: int = 192

    @property
    def steps(self) -> int:
        return -(-self.texts // self.rows)

    @property
    def tokens(self) -> int:
        return self.texts * self.length


JOBS = [
    Job(32, 32, 6, 256, 1000, 2),
    Job(64, 32, 6, 256, 1000, 2),
    Job(32, 32, 12, 256, 1000, 2),
    Job(32, 32, 6, 384, 1000, 2),
    Job(32, 32, 6, 256, 20000, 2),
    Job(32, 32, 12, 384, 1000, 4),
    Job(32, 32, 12, 384, 1000, 4, cached=True),
    Job(64, 16, 6, 512, 8000, 3),
]


def arithmetic(job: Job) -> float:
    """Floating-point operations of one epoch: 24 h^2 a token and layer for its matrices, 4 h n for attention to n
    tokens; a live teacher's once, the student's three times, since a gradient costs two passes."""
    layer = 24 * job.hidden**2 + 4 * job.hidden * job.length
    return job.tokens * layer * (3 * job.kept + (0 if job.cached else job.layers))


def measure(job: Job) -> dict:
    """Processor seconds of the training, without caching, and sizes of what was made, in gigabytes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=job.vocabulary, hidden_size=job.hidden, num_hidden_layers=job.layers, num_attention_heads=8,
        intermediate_size=4 * job.hidden, max_position_embeddings=128,
    )  # fmt: skip
    teacher = Encoder(BertModel(config).eval(), encoder().tokenizer, "teacher")
    lengths = np.full(job.texts, job.length, np.int32)
    ids = np.random.default_rng(0).integers(5, job.vocabulary, job.tokens, np.int32)
    texts = TokenizedCorpus(Ragged(ids, np.cumsum(lengths, dtype=np.int64) - lengths, lengths), 0)
    spec = Distill(
        cache=job.cached, batch_tokens=job.rows * job.length, epochs=1.0, evaluations=1, precision="fp32", compile=False
    )
    with tempfile.TemporaryDirectory() as folder:
        texts = with_states(texts, teacher, spec, Path(folder) / "cache", job.kept)
        student = build_student(teacher.model, Student(layers=job.kept))
        began = time.process_time()
        distill(teacher, student, texts, texts.part([0]), spec, Path(folder) / "work")
        spent = time.process_time() - began
        states = sum(file.stat().st_size for file in (Path(folder) / "cache").rglob("*.f16")) / 1e9
    held = sum(p.numel() * 4 for m in (teacher.model, student) for p in m.parameters())
    trained = sum(p.numel() * 12 for n, p in student.named_parameters() if "word_embeddings" not in n)
    return {"seconds": spent, "states": states, "weights": (held + trained) / 1e9}


def predicted(job: Job) -> dict:
    """Gigabytes by the model: the teacher's states on disk, and weights, gradients and Adam's two moments in memory."""
    layer = 12 * job.hidden**2 + 13 * job.hidden
    # 128 positions, two types, a LayerNorm; BERT's pooler
    table = (job.vocabulary + 128 + 2 + 2) * job.hidden + job.hidden**2 + job.hidden
    teacher, student = job.layers * layer + table, job.kept * layer + table
    trained = student - job.vocabulary * job.hidden
    states = gigabytes(job.tokens, job.kept, job.hidden) if job.cached else 0.0
    return {"states": states, "weights": (4 * (teacher + student) + 12 * trained) / 1e9}


def fit(points: list[tuple[Job, float]]) -> np.ndarray:
    """Seconds a step and seconds a floating-point operation that explain the points best, by relative error."""
    seconds = np.array([spent for _, spent in points])
    terms = np.array([[job.steps, arithmetic(job)] for job, _ in points])
    return np.linalg.lstsq(terms / seconds[:, None], np.ones(len(points)), rcond=None)[0]


def main() -> None:
    measure(JOBS[0])  # the first of a process is slower
    found = [(job, measure(job)) for job in JOBS]
    points = [(job, facts["seconds"]) for job, facts in found]
    names = ("tokens", "layers", "hidden", "rows", "kept", "cached", "s", "model", "error", "GB", "model", "error")
    table, rows = Table(*names), []
    for i, (job, facts) in enumerate(found):
        step, operation = fit(points[:i] + points[i + 1 :])
        guess = step * job.steps + operation * arithmetic(job)
        sizes = predicted(job)
        mine, theirs = (facts["states"] + facts["weights"], sizes["states"] + sizes["weights"])
        errors = guess / facts["seconds"] - 1, theirs / mine - 1
        rows.append(vars(job) | facts | {"predicted": guess, "error": errors[0], "size error": errors[1]})
        table.add_row(
            f"{job.tokens:,}", f"{job.layers}", f"{job.hidden}", f"{job.vocabulary:,}", f"{job.kept}", f"{job.cached}",
            f"{facts['seconds']:.2f}", f"{guess:.2f}", f"{errors[0]:+.0%}", f"{mine:.3f}", f"{theirs:.3f}",
            f"{errors[1]:+.1%}",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    step, operation = fit(points)
    worst = max(abs(row["error"]) for row in rows)
    console.print(
        f"{step * 1e3:.1f} ms a step and {1e-9 / operation:.1f} GFLOP/s on one thread; worst error {worst:.0%}"
    )
    if "--json" in sys.argv:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
