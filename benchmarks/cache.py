"""The teacher's states on disk: what they cost, what they save, and that they change nothing."""

import shutil

import torch

from benchmarks.common import WORK, Job, in_turns, main, row, seconds, workshop
from kdlib.batching import BudgetSampler
from kdlib.device import autocast
from kdlib.distillation.objectives import ModelOutputs, RequiredOutputs, total_loss
from kdlib.distillation.state_capture import StateCapture
from kdlib.distillation.tokenized_corpus import TokenizedCorpus, compared_layers, with_states


def measure(quick: bool = False) -> list[dict]:
    job = workshop(64 if quick else 512)
    root, depth = WORK / "fresh cache", job.study.profile.student.layers
    shutil.rmtree(root, ignore_errors=True)
    made: list[TokenizedCorpus] = []
    making = seconds(lambda: made.append(with_states(job.train, job.study.source, job.spec, root, depth)))
    cached = made[0]
    bytes_ = sum(file.stat().st_size for file in root.rglob("layer-*.f16"))
    found = in_turns({"cached": lambda: job.epoch(cached), "live": lambda: job.epoch(job.train)}, 1 if quick else 3)
    first = [making + epoch for epoch in found["cached"]]
    gap, batches = disagreement(job, cached, 2 if quick else 6)
    shutil.rmtree(root)
    how = f"{len(job.texts)} texts, {job.train.tokens:,} tokens, layers {', '.join(map(str, cached.cached.layers))}"
    return [
        row("an epoch with the teacher cached, compared with live", found["cached"], found["live"], "s", True,
            at_least=1.5, note=how),
        row("the first epoch, with the cache to be made, compared with live", first, found["live"], "s", True,
            at_least=0.9),
        row("size of the cache", bytes_ / job.train.tokens, unit="bytes/token"),
        row(f"loss with cached states, {batches} batches: largest relative difference from live", gap, at_most=1e-3),
    ]  # fmt: skip


@torch.no_grad()
def disagreement(job: Job, cached: TokenizedCorpus, count: int) -> tuple[float, int]:
    """The largest relative difference between the loss with cached and with live states, and over how many batches."""
    needs, student, source = RequiredOutputs.of(job.spec.objectives), job.student().eval(), job.study.source
    layers, teacher_layers = compared_layers(job.spec, student.config.num_hidden_layers, source.layers)
    mine, theirs = StateCapture(student, layers, needs), StateCapture(source.model, teacher_layers, needs)
    gaps = []
    for batch in list(BudgetSampler([len(ids) for ids in cached.ids], job.spec.batch_tokens))[:count]:
        given = cached.collate(batch)
        ids, mask = given["input_ids"], given["attention_mask"]
        kept = ModelOutputs([given[f"layer {layer}"] for layer in teacher_layers], mask)
        with autocast(ids.device, source.bf16):
            states, live = mine(ids, mask), theirs(ids, mask)
        a, b = (float(total_loss(job.spec.objectives, states, target)[0]) for target in (kept, live))
        gaps.append(abs(a - b) / b)
    return max(gaps), len(gaps)


if __name__ == "__main__":
    main(measure)
