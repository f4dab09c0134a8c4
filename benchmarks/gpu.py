"""What a GPU does for a distillation: one table, in at most 6 minutes, and `benchmarks/gpu.json` with the card's name.

    python -m benchmarks.gpu            # make gpu
    python -m benchmarks.gpu --tiny     # a tiny form, on the CPU where there is no GPU; its numbers mean nothing

Models have random weights: speed and memory do not depend on them. The rows are precision and compilation on and off,
with the teacher live and cached; batch sizes; the loss beside the CPU's; one fine-tuning; a batch that is too large.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel

from benchmarks.common import quiet
from benchmarks.memory import encoder
from kdlib.config import Benchmark, Distill, Student
from kdlib.data.tasks import Split, Task
from kdlib.device import matmul_speed, pick_device
from kdlib.distillation.distill import distill
from kdlib.distillation.student_init import build_student
from kdlib.distillation.tokenized_corpus import TokenizedCorpus, with_states
from kdlib.errors import UserError
from kdlib.evaluation.finetuning import finetune
from kdlib.models.encoder import Encoder
from kdlib.models.token_store import Ragged

TARGET = Path(__file__).parent / "gpu.json"
SECONDS = 330  # no row is begun after so long
LENGTHS = (16, 96)  # tokens of the shortest and of the longest text


@dataclass(frozen=True)
class Size:
    """Layers, hidden size and vocabulary of the teacher; layers of the student; steps of a run, tokens of a batch; and
    the batches that are tried."""

    layers: int
    hidden: int
    rows: int
    kept: int
    steps: int
    batch: int
    batches: tuple[int, ...]


FULL = Size(12, 768, 30_000, 6, 60, 8192, (2048, 32_768))
TINY = Size(2, 32, 100, 1, 4, 256, (128,))
CURVE = Size(2, 64, 100, 1, 20, 512, ())  # small enough for the CPU beside the GPU


def teacher_of(size: Size, device: torch.device) -> Encoder:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size.rows, hidden_size=size.hidden, num_hidden_layers=size.layers, max_position_embeddings=128,
        num_attention_heads=max(1, size.hidden // 64), intermediate_size=4 * size.hidden,
    )  # fmt: skip
    return Encoder(BertModel(config).eval().to(device), encoder().tokenizer, "teacher")


def texts_of(size: Size, tokens: int) -> TokenizedCorpus:
    """Texts of random tokens and of mixed lengths, together about so many tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(*LENGTHS, max(8, 2 * tokens // sum(LENGTHS)), dtype=np.int32)
    ids = rng.integers(5, size.rows, int(lengths.sum()), np.int32)
    return TokenizedCorpus(Ragged(ids, np.cumsum(lengths, dtype=np.int64) - lengths, lengths), 0)


def run(size: Size, device: torch.device, bf16: bool, compiled: bool, cached: bool, batch: int | None = None):
    """One distillation of `size.steps` steps; its outcome, and the operations of its training."""
    batch = batch or size.batch
    teacher = replace(teacher_of(size, device), bf16=bf16)
    texts = texts_of(size, size.steps * batch)
    spec = Distill(
        cache=cached,
        batch_tokens=batch,
        epochs=1.0,
        evaluations=2,
        compile=compiled,
        precision="bf16" if bf16 else "fp32",
    )
    torch.manual_seed(0)
    student = build_student(teacher.model, Student(layers=size.kept))
    with tempfile.TemporaryDirectory() as folder:
        texts = with_states(texts, teacher, spec, Path(folder) / "cache", size.kept)
        outcome = distill(teacher, student, texts, texts.part(range(8)), spec, Path(folder) / "work")
    layer = 24 * size.hidden**2 + 4 * size.hidden * sum(LENGTHS) / 2
    return outcome, texts.tokens * layer * (3 * size.kept + (0 if cached else size.layers))


def speed_row(name: str, size: Size, device: torch.device, peaks: dict[bool, float], **how) -> dict:
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    outcome, operations = run(size, device, **how)
    seconds = outcome.facts["training_seconds"]
    return {
        "row": name,
        "tokens_per_second": outcome.facts["tokens"] / max(seconds, 1e-9),
        "share_of_peak": operations / max(seconds, 1e-9) / peaks[how["bf16"]],
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
        "seconds": seconds,
    }


def curve_row(device: torch.device) -> dict:
    """The largest relative difference between the held-out losses on this device and on the CPU, in fp32."""
    curves = []
    for where in (device, torch.device("cpu")):
        curve = run(CURVE, where, False, False, False)[0].curve
        curves.append(curve[curve["split"] == "heldout"]["loss"].to_numpy())
    apart = np.abs(curves[0] / curves[1] - 1).max()
    return {"row": f"loss beside the CPU's, {len(curves[0])} points", "largest_difference": float(apart)}


def tuning_row(size: Size, device: torch.device) -> dict:
    """One fine-tuning on a task that can be learned: does a text hold more short words than long ones?"""
    rng = np.random.default_rng(0)
    words = [["ba", "la", "ma"], ["balabala", "malabama", "lamalaba"]]
    rows = [(" ".join(rng.choice(words[label], 8)), label) for label in rng.integers(0, 2, 200).tolist()]
    parts = [Split([t for t, _ in some], [y for _, y in some]) for some in (rows[:150], rows[150:])]
    task = Task("short or long words", "classify", ["short", "long"], *parts)
    begun = time.perf_counter()
    spec = Benchmark(finetune_epochs=3, finetune_rate=1e-4, finetune_batch=16)
    score = finetune(teacher_of(replace(size, rows=200), device), task, spec)[0]
    return {"row": "fine-tuning on 150 rows", "score": score.value, "seconds": time.perf_counter() - begun}


def full_row(size: Size, device: torch.device, bf16: bool) -> dict:
    """A batch that does not fit: the line that says so, and the largest half, quarter, ... of it that does."""
    if device.type != "cuda":
        return {"row": "a batch that is too large", "note": "no GPU: not tried"}
    budget, said = 2**23, ""
    while budget >= 1024:
        try:
            run(replace(size, steps=1), device, bf16, False, False, budget)
            break
        except UserError as error:
            said = str(error)
            torch.cuda.empty_cache()
            budget //= 2
    return {"row": "a batch that is too large", "note": said or "even 8 million tokens fit", "batch_tokens": budget}


def rows_of(size: Size, device: torch.device) -> list[dict]:
    """All rows that can be begun in time."""
    begun, gpu, found = time.perf_counter(), device.type == "cuda", []
    peak = {
        bf16: matmul_speed(torch.bfloat16 if bf16 else torch.float32, 4096 if gpu else 256, 0.3, device.type)
        for bf16 in (False, True)
    }
    precisions = (False, True) if gpu else (False,)
    jobs = []
    for bf16 in precisions:
        for compiled in (False, True) if gpu else (False,):
            for cached in (False, True):
                numbers, states = "bf16" if bf16 else "fp32", "cached" if cached else "live"
                name = f"{numbers}, {'compiled, ' if compiled else ''}teacher {states}"
                how = dict(bf16=bf16, compiled=compiled, cached=cached)
                jobs.append(lambda name=name, how=how: speed_row(name, size, device, peak, **how))
    for batch in size.batches:
        how = dict(bf16=gpu, compiled=False, cached=False, batch=batch)
        jobs.append(lambda how=how: speed_row(f"batches of {how['batch']:,} tokens", size, device, peak, **how))
    jobs += [lambda: curve_row(device), lambda: tuning_row(size, device), lambda: full_row(size, device, gpu)]
    for number, job in enumerate(jobs):
        if time.perf_counter() - begun > SECONDS:
            found.append({"row": f"{len(jobs) - number} more rows", "note": "left out: the time was over"})
            break
        found.append(job())
    return found


def main(arguments: list[str]) -> None:
    quiet()
    tiny, device = "--tiny" in arguments, pick_device()
    if device.type != "cuda" and not tiny:
        sys.exit("no GPU on this machine; --tiny runs a tiny form on the CPU, as the test of this script does")
    if device.type == "cuda":
        torch.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows = rows_of(TINY if tiny else FULL, device)
    table = Table("", "tokens/s", "share of peak", "GB", "s", "", title=f"{name}, torch {torch.__version__}")
    for row in rows:
        shown = [
            (row.get(key), form)
            for key, form in (
                ("tokens_per_second", ",.0f"),
                ("share_of_peak", ".0%"),
                ("gigabytes", ".1f"),
                ("seconds", ".1f"),
            )
        ]
        rest = [
            f"{key.replace('_', ' ')} {row[key]:.3g}"
            for key in ("largest_difference", "score", "batch_tokens")
            if key in row
        ]
        table.add_row(
            row["row"],
            *("" if value is None else format(value, form) for value, form in shown),
            " ".join([*rest, row.get("note", "")]),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    target = TARGET if not tiny else Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else None
    if target:
        target.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "tiny": tiny, "rows": rows}, indent=1)
        )
        print(f"written: {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
