"""Distillation objectives: in what the student shall equal the teacher.

An objective is a function of the student's and the teacher's `ModelOutputs` that returns one number a batch. A profile
lists objectives with weights, and `total_loss` adds them up. Padding never counts. Where processes share a batch, the
mean of their losses is the loss of the whole batch. A student of another width is compared through a projection: its
outputs are those after the projection.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kdlib import distributed
from kdlib.errors import UserError
from kdlib.models.sentence import mean_pool


@dataclass
class ModelOutputs:
    """The outputs of one forward pass that the objectives need.

    Attributes:
        hidden: [batch, tokens, hidden] of each compared layer, lowest first; the last layer is always there.
        mask: [batch, tokens], 1 at real tokens.
        query: [batch, heads, tokens, head size] of each compared layer.
        key: as `query`.
        embedded: [batch, tokens, hidden], the states after the embeddings.
        logits: [masked tokens, vocabulary].
        targets: [masked tokens], the tokens before masking.
        reach: of each compared layer with local attention, how many tokens away a token sees; None for all.
    """

    hidden: list[torch.Tensor]
    mask: torch.Tensor
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)
    embedded: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    reach: list[int | None] = field(default_factory=list)


torch.export.register_dataclass(ModelOutputs)  # training by several processes must find the tensors in it


def hidden_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Mean over layers of MSE(student, teacher) / Var(teacher) over real tokens; 0 is a perfect copy.

    The division gives layers of different scale the same weight.

    References:
        Jiao et al. (2020), eq. 8, without the embeddings' states.
    """
    keep = student.mask.bool()
    losses = []
    for mine, theirs in zip(student.hidden, teacher.hidden, strict=True):
        losses.append(_mean_square(mine, theirs, keep.unsqueeze(-1)) / _variance(theirs[keep].float()))
    return torch.stack(losses).mean()


def _mean_square(mine: torch.Tensor, theirs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """MSE over the real tokens, or pairs of tokens, where the bool `keep` is true."""
    # Padding is zeroed rather than cut out: the gradient of a cut is a slow scatter.
    difference = (mine.float() - theirs.float()).masked_fill(~keep, 0)
    return _over(difference.square().sum(), keep.sum() * (difference.numel() // keep.numel()))


def _over(total: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """A sum divided by its count.

    Processes that share a batch divide by the mean of their counts. Then the mean of their losses and gradients is that
    of the whole batch, also where their shares differ.
    """
    if distributed.world_size() > 1:
        count = distributed.mean(torch.as_tensor(count, dtype=torch.float32, device=total.device))
    return total / count


def _variance(values: torch.Tensor) -> torch.Tensor:
    """The variance over the whole batch, at least a small positive number."""
    if distributed.world_size() == 1:
        return values.var().clamp(min=1e-6)
    values = values.double()
    count = torch.tensor(values.numel(), dtype=torch.double, device=values.device)
    count, total, squares = distributed.mean(torch.stack([count, values.sum(), values.square().sum()]))
    unbiased = count - 1 / distributed.world_size()
    return ((squares - total.square() / count) / unbiased).float().clamp(min=1e-6)


def tinybert_hidden_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Sum over the embeddings and the compared layers of MSE(student, teacher) over real tokens.

    References:
        Jiao et al. (2020), eq. 8 and 9, with the l + 1 terms of weight 1 of their script.
    """
    keep = student.mask.bool().unsqueeze(-1)
    pairs = zip([student.embedded, *student.hidden], [teacher.embedded, *teacher.hidden], strict=True)
    return torch.stack([_mean_square(mine, theirs, keep) for mine, theirs in pairs]).sum()


def attention_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Mean over layers of MSE(student, teacher) / Var(teacher) of attention scores before the softmax.

    Student and teacher need the same number of heads.

    References:
        Jiao et al. (2020), eq. 7, with scores Q K^T / sqrt(head size), on the scale of `hidden_loss`.
    """
    losses = [
        _mean_square(mine, theirs, keep) / _variance(theirs[keep.expand_as(theirs)])
        for mine, theirs, keep in _scores(student, teacher)
    ]
    return torch.stack(losses).mean()


def tinybert_attention_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Sum over layers of MSE(student, teacher) of attention scores before the softmax, between real tokens.

    Student and teacher need the same number of heads. In DeBERTa only the content part of the scores is compared.

    References:
        Jiao et al. (2020), eq. 7, as their script adds it up.
    """
    return torch.stack([_mean_square(*scores) for scores in _scores(student, teacher)]).sum()


def _scores(student: ModelOutputs, teacher: ModelOutputs) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Attention scores of each layer [batch, heads, tokens, tokens], and the mask of real pairs that it sees."""
    if not student.query or len(student.query) != len(teacher.query):
        raise ValueError(
            f"attention maps: student {len(student.query)}, teacher {len(teacher.query)}; "
            "they must be as many, and some"
        )
    pairs = (student.mask[:, None, :, None] * student.mask[:, None, None, :]).bool()
    place = torch.arange(student.mask.shape[1], device=student.mask.device)
    reach = teacher.reach or [None] * len(teacher.query)
    for mine, theirs, most in zip(zip(student.query, student.key), zip(teacher.query, teacher.key), reach, strict=True):
        seen = pairs if most is None else pairs & ((place[:, None] - place).abs() <= most)  # local attention
        yield attention_scores(*mine), attention_scores(*theirs), seen


def attention_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Q K^T / sqrt(head size): [batch, heads, tokens, size] twice -> [batch, heads, tokens, tokens]."""
    return query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5


Vector = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # from states and mask to the vectors of texts


def sentence_loss(student: ModelOutputs, teacher: ModelOutputs, vector: Vector = mean_pool) -> torch.Tensor:
    """1 - cosine of the texts' vectors, mean over texts. `vector`: the teacher's way from last states to a vector."""
    mine = vector(student.hidden[-1].float(), student.mask)
    theirs = vector(teacher.hidden[-1].float(), teacher.mask)
    real = student.mask.any(1)
    return _over(((1 - F.cosine_similarity(mine, theirs)) * real).sum(), real.sum())


def cosine_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Mean over real tokens of 1 - cosine of the last states (Sanh et al. 2019, the third loss)."""
    cosine = F.cosine_similarity(student.hidden[-1].float(), teacher.hidden[-1].float(), dim=-1)
    return _over(((1 - cosine) * student.mask).sum(), student.mask.sum())


def kl_loss(student: ModelOutputs, teacher: ModelOutputs, temperature: float = 2.0) -> torch.Tensor:
    """T^2 KL(teacher || student) of the logits divided by T, mean over masked tokens. T^2 keeps the gradient's size.

    References:
        Hinton et al. (2015), section 2; Sanh et al. (2019).
    """
    mine = F.log_softmax(student.logits.float() / temperature, -1)
    theirs = F.log_softmax(teacher.logits.float() / temperature, -1)
    return _over(F.kl_div(mine, theirs, reduction="sum", log_target=True), len(mine)) * temperature**2


def mlm_loss(student: ModelOutputs, teacher: ModelOutputs | None = None) -> torch.Tensor:
    """Cross-entropy of the masked tokens (Devlin et al. 2019). It needs no teacher."""
    return _over(F.cross_entropy(student.logits.float(), student.targets, reduction="sum"), len(student.targets))


@dataclass(frozen=True)
class RequiredOutputs:
    """What objectives need from a forward pass.

    Attributes:
        states: states that go through the projection.
        layers: all compared layers, not only the last.
        embedded: the states after the embeddings.
        attention: queries and keys.
        masked: masked text, and logits at its masked tokens.
        soft: the teacher's logits.
    """

    states: bool = False
    layers: bool = False
    embedded: bool = False
    attention: bool = False
    masked: bool = False
    soft: bool = False

    @classmethod
    def of(cls, weights: dict[str, float]) -> "RequiredOutputs":
        """What the objectives with a weight above 0 need together."""
        used = [OBJECTIVES[name].needs for name, weight in weights.items() if weight]
        return cls(**{field.name: any(getattr(needs, field.name) for needs in used) for field in fields(cls)})

    @property
    def teacher(self) -> bool:
        """Whether an objective needs a teacher; mlm alone does not."""
        return self.states or self.attention or self.soft

    @property
    def cacheable(self) -> bool:
        """Whether cached states of the unmasked text are all that the teacher has to give."""
        return self.states and not self.attention and not self.masked


class Objective(NamedTuple):
    """A loss of the outputs of student and teacher, and the outputs it needs."""

    loss: Callable[..., torch.Tensor]
    needs: RequiredOutputs


OBJECTIVES = {
    "hidden": Objective(hidden_loss, RequiredOutputs(states=True, layers=True)),
    "attention": Objective(attention_loss, RequiredOutputs(attention=True, layers=True)),
    "sentence": Objective(sentence_loss, RequiredOutputs(states=True)),
    "tinybert_hidden": Objective(tinybert_hidden_loss, RequiredOutputs(states=True, layers=True, embedded=True)),
    "tinybert_attention": Objective(tinybert_attention_loss, RequiredOutputs(attention=True, layers=True)),
    "cosine": Objective(cosine_loss, RequiredOutputs(states=True)),
    "kl": Objective(kl_loss, RequiredOutputs(masked=True, soft=True)),
    "mlm": Objective(mlm_loss, RequiredOutputs(masked=True)),
}


def check_objectives(weights: dict[str, float]) -> None:
    """Raise UserError for an unknown name, a negative weight, or no weight above 0."""
    unknown = [name for name in weights if name not in OBJECTIVES]
    if unknown:
        raise UserError(f"unknown objective {unknown[0]!r}; there are {', '.join(OBJECTIVES)}")
    if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
        raise UserError(f"distill.objectives is {weights}; weights must not be negative, and one must be positive")


def total_loss(
    weights: dict[str, float],
    student: ModelOutputs,
    teacher: ModelOutputs | None,
    temperature: float = 2.0,
    vector: Vector = mean_pool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum, and each objective's own value. `temperature` is that of kl, `vector` of sentence."""
    settings: dict[str, dict] = {"kl": {"temperature": temperature}, "sentence": {"vector": vector}}
    parts = {
        name: OBJECTIVES[name].loss(student, teacher, **settings.get(name, {}))
        for name, weight in weights.items()
        if weight
    }
    return sum(weights[name] * value for name, value in parts.items()), {n: v.detach() for n, v in parts.items()}
