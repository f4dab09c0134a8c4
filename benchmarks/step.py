"""The step of distillation: floating-point operations a second on real tokens, compared with the machine's peak."""

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig

from benchmarks.common import HERE, Job, in_turns, main, row, workshop
from kdlib.batching import BudgetSampler
from kdlib.device import matmul_speed
from kdlib.distillation.tokenized_corpus import TokenizedCorpus, with_states

PROFILE = HERE / "profile.txt"
SIZES = (384, 768, 1536, 2048)


def forward_flops(model: PreTrainedConfig, layers: int, length: int) -> int:
    """Of one text through so many layers: the products of a token with the weights, and of tokens with each other."""
    weights = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.intermediate_size
    return 2 * layers * length * (weights + 2 * length * model.hidden_size)


def measure(quick: bool = False) -> list[dict]:
    job = workshop(64 if quick else 512)
    depth, source = job.study.profile.student.layers, job.study.source
    cached = with_states(job.train, source, job.spec, job.study.run.path / "cache", depth)
    lengths, settings = [len(ids) for ids in job.train.ids], source.model.config
    student = sum(3 * forward_flops(settings, depth, n) for n in lengths)  # backward twice as many as forward
    teacher = sum(forward_flops(settings, source.layers, n) for n in lengths)
    kind = torch.bfloat16 if source.bf16 else torch.float32
    peaks: list[int] = []

    def peak() -> float:
        speeds = {size: matmul_speed(kind, size, 0.5) for size in SIZES}
        peaks.append(max(speeds, key=speeds.get))
        return speeds[peaks[-1]] / 1e9

    found = in_turns(
        {
            "peak": peak,
            "cached": lambda: student / job.epoch(cached) / 1e9,
            "live": lambda: (student + teacher) / job.epoch(job.train) / 1e9,
        },
        1 if quick else 3,
    )
    how = f"the peak: the fastest of square {kind} products of {', '.join(map(str, SIZES))}, here of {peaks[-1]}; "
    how += f"where the time of a step goes: {PROFILE.parent.name}/{PROFILE.name}"
    PROFILE.write_text(where(job, cached), "utf-8")
    return [
        row(f"the student's step, teacher cached, compared with the machine's peak ({kind})", found["cached"],
            found["peak"], "GFLOP/s", at_least=0.5, note=how),
        row(f"the step with the teacher live, compared with the machine's peak ({kind})", found["live"], found["peak"],
            "GFLOP/s", at_least=0.5),
    ]  # fmt: skip


def where(job: Job, cached: TokenizedCorpus, steps: int = 6) -> str:
    """A table of where the time of some steps goes, operation by operation."""
    batches = list(BudgetSampler([len(ids) for ids in cached.ids], job.spec.batch_tokens))[:steps]
    part = cached.part([i for batch in batches for i in batch])
    with profile(activities=[ProfilerActivity.CPU]) as found:
        job.epoch(part)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)


if __name__ == "__main__":
    main(measure)
