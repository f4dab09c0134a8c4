"""Distilling the default student: texts per second, beside the plain loop of the paper's scripts."""

from itertools import islice

import torch

from benchmarks.common import Job, in_turns, main, row, seconds, workshop
from benchmarks.reference import BATCH, LENGTH, Loop, batches
from kdlib.config import Student
from kdlib.distill import Watched, compared_layers, with_states
from kdlib.objectives import Needs, total_loss
from kdlib.student import build_student

OBJECTIVES = {"tinybert_hidden": 1.0, "tinybert_attention": 1.0}


def measure(quick: bool = False) -> list[dict]:
    job = workshop(64 if quick else 768)
    steps, rounds = (1, 1) if quick else (3, 3)
    full, depth = job.study.teacher, job.study.profile.student.layers
    student = build_student(full.model, Student(layers=depth))
    loop = Loop(full.model, student)
    rows = [encoding.ids for encoding in full.tokenize(job.texts)]
    feed = batches(rows, full.tokenizer.pad_token_id)
    loop.step(*next(feed))  # the first step makes the optimiser's state
    cached = with_states(job.train, job.study.source, job.spec, job.study.run.path / "cache", depth)

    def reference() -> float:
        given = list(islice(feed, steps))
        return steps * BATCH / seconds(lambda: [loop.step(*batch) for batch in given])

    texts = len(job.texts)
    found = in_turns(
        {
            "reference": reference,
            "live": lambda: texts / job.epoch(job.train),
            "cached": lambda: texts / job.epoch(cached),
        },
        rounds,
    )
    mean = sum(map(len, rows)) / texts
    packed = [rate * LENGTH for rate in found["reference"]]
    gap = disagreement(job, rows)
    how = f"{texts} texts of the corpus, {mean:.0f} tokens on average; the plain loop pads each to {LENGTH}"
    return [
        row("distillation, teacher live, beside the plain loop", found["live"], found["reference"], "texts/s",
            at_least=4, note=how),
        row("distillation, from the second epoch on (teacher cached), beside the plain loop", found["cached"],
            found["reference"], "texts/s", at_least=8),
        row("distillation, teacher live, beside the plain loop if all its rows were full",
            [rate * mean for rate in found["live"]], packed, "tokens/s"),
        row("distillation, the same loss on one batch without padding: relative difference", gap, at_most=1e-4),
    ]  # fmt: skip


def disagreement(job: Job, rows: list[list[int]]) -> float:
    """Between the plain loop's loss, over the whole vocabulary, and the kit's, over the pruned one, on a batch of whole
    rows of text, where padding cannot tell them apart; no dropout. Relative."""
    full, pruned, depth = job.study.teacher, job.study.source, job.study.profile.student.layers
    kept = torch.tensor(job.study.selection.ids)
    ids = [i for text in rows for i in text][: 4 * 64]
    full_ids = torch.tensor(ids).reshape(-1, 64)
    pruned_ids = torch.searchsorted(kept, full_ids)
    assert torch.equal(kept[pruned_ids], full_ids), "the corpus has a piece that was pruned"
    mask = torch.ones_like(full_ids)
    loop = Loop(full.model, build_student(full.model, Student(layers=depth)))
    loop.teacher.eval()
    loop.student.eval()
    with torch.no_grad():
        theirs = float(loop.loss(full_ids, mask))
        ours = float(kit_loss(pruned.model, job.student().eval(), loop.fit_dense, pruned_ids, mask))
    return abs(ours - theirs) / theirs


def kit_loss(teacher, student, projection, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The kit's value of the plain loop's loss."""
    needs = Needs.of(OBJECTIVES)
    depth = student.config.num_hidden_layers
    layers, teacher_layers = compared_layers(needs, depth, teacher.config.num_hidden_layers)
    watched = Watched(student, layers, needs, projection), Watched(teacher, teacher_layers, needs)
    try:
        return total_loss(OBJECTIVES, *(one(ids, mask) for one in watched))[0]
    finally:
        for one in watched:
            one.release()


if __name__ == "__main__":
    main(measure)
