"""Distillation objectives: what the student is asked to have in common with the teacher.

Each objective is a function of student and teacher `States` and gives one number per batch; a profile names
objectives and their weights, and `total_loss` adds them up. Padding never counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kdlib.encoder import mean_pool
from kdlib.errors import UserError


@dataclass
class States:
    """What one forward pass gave, at the compared layers only.

    hidden: list of [batch, tokens, hidden], one per compared layer, lowest first. query, key: lists of
    [batch, heads, tokens, head size] of the compared layers, empty unless an objective asks for attention.
    mask: [batch, tokens], 1 at real tokens.
    """

    hidden: list[torch.Tensor]
    mask: torch.Tensor
    query: list[torch.Tensor]
    key: list[torch.Tensor]


def hidden_loss(student: States, teacher: States) -> torch.Tensor:
    """Mean over layers of MSE(student, teacher) / Var(teacher) over real tokens.

    TinyBERT (Jiao et al. 2020, eq. 8) without its projection; dividing by the variance of each teacher layer lets
    layers of different scale weigh the same: 0 is a perfect copy, 1 no better than the mean.
    """
    keep = student.mask.bool()
    losses = []
    for mine, theirs in zip(student.hidden, teacher.hidden, strict=True):
        # Padding is zeroed rather than cut out: the gradient of a cut is a slow scatter.
        difference = (mine.float() - theirs.float()).masked_fill(~keep.unsqueeze(-1), 0)
        variance = theirs[keep].float().var().clamp(min=1e-6)
        losses.append(difference.square().sum() / (keep.sum() * mine.shape[-1]) / variance)
    return torch.stack(losses).mean()


def attention_loss(student: States, teacher: States) -> torch.Tensor:
    """Mean over layers of MSE(student, teacher) / Var(teacher) of attention scores.

    The scores are those before the softmax, between real tokens.
    TinyBERT (Jiao et al. 2020, eq. 7) with scores Q K^T / sqrt(head size), on the scale of `hidden_loss`. Needs as many
    heads in the student as in the teacher.
    """
    if not student.query or len(student.query) != len(teacher.query):
        raise ValueError(
            f"attention maps: student {len(student.query)}, teacher {len(teacher.query)}; "
            "they must be as many, and some"
        )
    pairs = (student.mask[:, None, :, None] * student.mask[:, None, None, :]).bool()
    losses = []
    for mine, theirs in zip(zip(student.query, student.key), zip(teacher.query, teacher.key), strict=True):
        keep = pairs.expand(-1, mine[0].shape[1], -1, -1)
        target = attention_scores(*theirs)[keep]
        losses.append(F.mse_loss(attention_scores(*mine)[keep], target) / target.var().clamp(min=1e-6))
    return torch.stack(losses).mean()


def attention_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Q K^T / sqrt(head size): [batch, heads, tokens, size] twice -> [batch, heads, tokens, tokens]."""
    return query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5


def sentence_loss(student: States, teacher: States) -> torch.Tensor:
    """1 - cosine of the mean-pooled last states: what a sentence encoder is used for, asked for directly."""
    mine = mean_pool(student.hidden[-1].float(), student.mask)
    theirs = mean_pool(teacher.hidden[-1].float(), teacher.mask)
    return (1 - F.cosine_similarity(mine, theirs)).mean()


OBJECTIVES: dict[str, Callable[[States, States], torch.Tensor]] = {
    "hidden": hidden_loss,
    "attention": attention_loss,
    "sentence": sentence_loss,
}


def check_objectives(weights: dict[str, float]) -> None:
    """Raises UserError for an unknown name, a negative weight, or nothing to optimise."""
    unknown = [name for name in weights if name not in OBJECTIVES]
    if unknown:
        raise UserError(f"unknown objective {unknown[0]!r}; there are {', '.join(OBJECTIVES)}")
    if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
        raise UserError(f"distill.objectives is {weights}; weights must not be negative, and one must be positive")


def total_loss(
    weights: dict[str, float], student: States, teacher: States
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum, and each objective's own value."""
    parts = {name: OBJECTIVES[name](student, teacher) for name, weight in weights.items() if weight}
    return sum(weights[name] * value for name, value in parts.items()), {n: v.detach() for n, v in parts.items()}
