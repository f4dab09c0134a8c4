"""TextBrewer, given the kit's own batches, models, optimiser and objective: texts per second."""

import shutil

import torch

from benchmarks.common import (
    HERE,
    KEPT,
    WORK,
    Job,
    PeerMissing,
    in_turns,
    keep_memory,
    main,
    peer,
    row,
    run_peer,
    workshop,
)
from benchmarks.reference import BATCH
from kdlib.batching import BudgetSampler
from kdlib.config import Distill
from kdlib.distillation.objectives import RequiredOutputs, total_loss
from kdlib.distillation.state_capture import StateCapture
from kdlib.distillation.tokenized_corpus import compared_layers, with_states

OBJECTIVE = {"tinybert_hidden": 1.0}  # the sum over layers of the MSE of hidden states: TextBrewer's hidden_mse
SHARE = 0.95  # of the ratio that arithmetic allows


def claims(teacher_layers: int, student_layers: int) -> list[tuple[str, float]]:
    """The claims with their goals.

    A step with a live teacher costs a forward pass of the teacher, and a forward and a backward pass of the student.
    The backward pass costs as much as two forward passes. With cached states the teacher's part is gone, so the ratio
    can be 1 + L / (3 l) at most.
    """
    limit = 1 + teacher_layers / (3 * student_layers)
    return [
        ("distillation, teacher live, compared with TextBrewer", 1.0),
        (f"distillation, teacher cached, compared with TextBrewer (arithmetic limit {limit:.2f})", SHARE * limit),
    ]


def measure(quick: bool = False) -> list[dict]:
    keep_memory()
    job = workshop(64 if quick else 768)
    budget = round(BATCH * job.train.tokens / len(job.texts))
    job.spec = job.spec.model_copy(update={"objectives": OBJECTIVE, "precision": "fp32", "batch_tokens": budget})
    source, depth, texts = job.study.source, job.study.profile.student.layers, len(job.texts)
    source.bf16 = False  # TextBrewer computes in float32
    cached = with_states(job.train, source, job.spec, job.study.run.path / "cache", depth)
    goals = claims(source.layers, depth)
    found = {"live": [], "cached": [], "TextBrewer": []}
    reports: list[dict] = []
    folder = WORK / "textbrewer"
    try:
        python = peer("textbrewer")
        batches = write_job(job, folder)

        def theirs() -> float:
            reports.append(run_peer(python, HERE / "peers" / "brew.py", folder, variables=KEPT))
            return texts / reports[-1]["seconds"]

        found = in_turns(
            {"live": lambda: job.rate(job.train), "TextBrewer": theirs, "cached": lambda: job.rate(cached)},
            1 if quick else 3,
        )
    except PeerMissing as reason:
        return [row(claim, None, unit="texts/s", at_least=goal, missing=reason) for claim, goal in goals]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ours = first_loss(job, batches[0])
    gap = abs(ours - reports[0]["first_loss"]) / ours
    how = f"{texts} texts in {len(batches)} batches of the kit's sampler, float32, word embeddings frozen in both"
    results = [
        row(claim, found[name], found["TextBrewer"], "texts/s", at_least=goal, peers=["textbrewer"], note=how)
        for name, (claim, goal) in zip(("live", "cached"), goals)
    ]
    claim = "the first batch's loss: relative difference from TextBrewer's"
    return [*results, row(claim, gap, at_most=1e-4, peers=["textbrewer"])]


def write_job(job: Job, folder) -> list[dict[str, torch.Tensor]]:
    """What brew.py reads; returns the batches of the kit's epoch."""
    student = job.student()
    student.config.hidden_dropout_prob = student.config.attention_probs_dropout_prob = 0.0  # as the kit trains it
    student.save_pretrained(folder / "student")
    job.study.source.model.save_pretrained(folder / "teacher")
    sampler = BudgetSampler([len(ids) for ids in job.train.ids], job.spec.batch_tokens, job.study.profile.seed)
    batches = [job.train.collate(batch) for batch in sampler]
    layers = compared_layers(_spec(job), student.config.num_hidden_layers, job.study.source.layers)
    pairs = [[0, 0], *([mine, theirs] for mine, theirs in zip(*layers))]
    facts = {"layers": pairs, "rate": job.spec.learning_rate, "decay": job.spec.weight_decay, "clip": 1.0}
    torch.save({"batches": batches, **facts}, folder / "job.pt")
    return batches


def _spec(job: Job) -> Distill:
    """The job's settings with TextBrewer's objective."""
    return job.spec.model_copy(update={"objectives": OBJECTIVE})


@torch.no_grad()
def first_loss(job: Job, batch: dict[str, torch.Tensor]) -> float:
    """The kit's value of the objective for a batch, before any training."""
    needs, student, source = RequiredOutputs.of(OBJECTIVE), job.student().eval(), job.study.source
    layers, teacher_layers = compared_layers(_spec(job), student.config.num_hidden_layers, source.layers)
    watched = StateCapture(student, layers, needs), StateCapture(source.model, teacher_layers, needs)
    return float(total_loss(OBJECTIVE, *(one(batch["input_ids"], batch["attention_mask"]) for one in watched))[0])


if __name__ == "__main__":
    main(measure)
