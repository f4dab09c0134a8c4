"""Distilling the default student: texts per second, compared with the plain loop of the paper's scripts."""

from functools import partial
from itertools import islice

import torch

from benchmarks.common import Job, in_turns, keep_memory, main, row, seconds, workshop
from benchmarks.reference import BATCH, LENGTH, Loop, batches
from kdlib import config
from kdlib.distillation.objectives import RequiredOutputs, total_loss
from kdlib.distillation.state_capture import StateCapture
from kdlib.distillation.student_init import build_student
from kdlib.distillation.tokenized_corpus import compared_layers, with_states

OBJECTIVES = {"tinybert_hidden": 1.0, "tinybert_attention": 1.0}


def measure(quick: bool = False) -> list[dict]:
    keep_memory()
    jobs = {
        "single sentences": workshop(64 if quick else 1024, [1]),
        "texts of 1 to 3 sentences": workshop(64 if quick else 768),
    }
    job, rounds = jobs["single sentences"], 1 if quick else 3
    full, depth = job.study.teacher, job.study.profile.student.layers
    loop = Loop(full.model, build_student(full.model, config.Student(layers=depth)))
    rows = {kind: [encoding.ids for encoding in full.tokenize(job.texts)] for kind, job in jobs.items()}
    feed = batches(rows["single sentences"], full.tokenizer.pad_token_id)
    for _ in range(2):  # the first step makes the optimiser's state, the second is the first to find its memory there
        loop.step(*next(feed))

    def reference() -> float:
        given = list(islice(feed, rounds))
        return len(given) * BATCH / seconds(lambda: [loop.step(*batch) for batch in given])

    turns = {"reference": reference}
    means = {kind: sum(map(len, found)) / len(found) for kind, found in rows.items()}
    for kind, job in jobs.items():
        job.spec = job.spec.model_copy(update={"batch_tokens": round(BATCH * means[kind])})
        cached = with_states(job.train, job.study.source, job.spec, job.study.run.path / "cache", depth)
        turns[f"{kind}, live"] = partial(job.rate, job.train)
        turns[f"{kind}, cached"] = partial(job.rate, cached)
    found = in_turns(turns, rounds)
    lines = []
    for kind, job in jobs.items():
        how = f"{kind}: {len(job.texts)} of the corpus, {means[kind]:.0f} tokens on average, {BATCH} a batch; "
        how += f"the plain loop pads each to {LENGTH}"
        lines += [
            row(f"distillation of {kind}, teacher live, compared with the plain loop", found[f"{kind}, live"],
                found["reference"], "texts/s", at_least=4, note=how),
            row(f"distillation of {kind}, from the second epoch on (teacher cached), compared with the plain loop",
                found[f"{kind}, cached"], found["reference"], "texts/s", at_least=8),
        ]  # fmt: skip
    long = "texts of 1 to 3 sentences"
    return [
        *lines,
        row("distillation, teacher live, compared with the plain loop if all its rows were full",
            [rate * means[long] for rate in found[f"{long}, live"]], [rate * LENGTH for rate in found["reference"]],
            "tokens/s"),
        row("distillation, the same loss on one batch without padding: relative difference",
            disagreement(jobs[long], rows[long]), at_most=1e-4),
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
    loop = Loop(full.model, build_student(full.model, config.Student(layers=depth)))
    loop.teacher.eval()
    loop.student.eval()
    with torch.no_grad():
        theirs = float(loop.loss(full_ids, mask))
        ours = float(kit_loss(pruned.model, job.student().eval(), loop.fit_dense, pruned_ids, mask))
    return abs(ours - theirs) / theirs


def kit_loss(teacher, student, projection, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The kit's value of the plain loop's loss."""
    spec = config.Distill(objectives=OBJECTIVES)
    depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    needs, (layers, teacher_layers) = RequiredOutputs.of(OBJECTIVES), compared_layers(spec, *depths)
    watched = StateCapture(student, layers, needs, projection), StateCapture(teacher, teacher_layers, needs)
    try:
        return total_loss(OBJECTIVES, *(one(ids, mask) for one in watched))[0]
    finally:
        for one in watched:
            one.release()


if __name__ == "__main__":
    main(measure)
