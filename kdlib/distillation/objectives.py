"""Distillation objectives: what the student is asked to have in common with the teacher.

Each objective is a function of student and teacher `States` and gives one number per batch; a profile names
objectives and their weights, and `total_loss` adds them up. Padding never counts. Where several processes share a
batch, the mean of their losses is the loss of the whole batch. A student that is narrower than its
teacher is compared through a learned projection: its `States` hold what came out of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from kdlib import distributed
from kdlib.errors import UserError
from kdlib.models.encoder import mean_pool


@dataclass
class ModelOutputs:
    """What one forward pass gave, as far as an objective asked for it.

    hidden: list of [batch, tokens, hidden], one per compared layer, lowest first, the last layer always among them.
    mask: [batch, tokens], 1 at real tokens. query, key: lists of [batch, heads, tokens, head size] of the compared
    layers. embedded: what the embeddings gave, [batch, tokens, hidden]. logits: [masked tokens, vocabulary];
    targets: [masked tokens], the tokens that were masked.
    """

    hidden: list[torch.Tensor]
    mask: torch.Tensor
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)
    embedded: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    targets: torch.Tensor | None = None


torch.export.register_dataclass(ModelOutputs)  # training by several processes has to find the tensors in it


def hidden_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Mean over layers of MSE(student, teacher) / Var(teacher) over real tokens.

    TinyBERT (Jiao et al. 2020, eq. 8) without the embeddings' states; dividing by the variance of each teacher layer
    lets layers of different scale weigh the same: 0 is a perfect copy, 1 no better than the mean.
    """
    keep = student.mask.bool()
    losses = []
    for mine, theirs in zip(student.hidden, teacher.hidden, strict=True):
        losses.append(_mean_square(mine, theirs, keep.unsqueeze(-1)) / _variance(theirs[keep].float()))
    return torch.stack(losses).mean()


def _mean_square(mine: torch.Tensor, theirs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """MSE over real tokens, or pairs of them: where `keep` is true, bool, with size 1 along what all have in common."""
    # Padding is zeroed rather than cut out: the gradient of a cut is a slow scatter.
    difference = (mine.float() - theirs.float()).masked_fill(~keep, 0)
    return _over(difference.square().sum(), keep.sum() * (difference.numel() // keep.numel()))


def _over(total: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """A sum over how many it is of.

    Processes that share a batch divide by the mean of their counts: then the mean of what they get, as of their
    gradients, is that of the whole batch, however unequal their shares.
    """
    if distributed.world_size() > 1:
        count = distributed.mean(torch.as_tensor(count, dtype=torch.float32, device=total.device))
    return total / count


def _variance(values: torch.Tensor) -> torch.Tensor:
    """The variance over the whole batch, kept from being 0."""
    if distributed.world_size() == 1:
        return values.var().clamp(min=1e-6)
    values = values.double()
    count = torch.tensor(values.numel(), dtype=torch.double, device=values.device)
    count, total, squares = distributed.mean(torch.stack([count, values.sum(), values.square().sum()]))
    unbiased = count - 1 / distributed.world_size()
    return ((squares - total.square() / count) / unbiased).float().clamp(min=1e-6)


def tinybert_hidden_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Sum over the embeddings' states and the compared layers of MSE(student, teacher) over real tokens.

    TinyBERT's general distillation (Jiao et al. 2020, eq. 8 and 9) as its script adds it up: l + 1 terms of weight 1,
    none divided by a variance.
    """
    keep = student.mask.bool().unsqueeze(-1)
    pairs = zip([student.embedded, *student.hidden], [teacher.embedded, *teacher.hidden], strict=True)
    return torch.stack([_mean_square(mine, theirs, keep) for mine, theirs in pairs]).sum()


def attention_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Mean over layers of MSE(student, teacher) / Var(teacher) of attention scores.

    The scores are those before the softmax, between real tokens.
    TinyBERT (Jiao et al. 2020, eq. 7) with scores Q K^T / sqrt(head size), on the scale of `hidden_loss`. Needs as many
    heads in the student as in the teacher.
    """
    losses = [
        _mean_square(mine, theirs, keep) / _variance(theirs[keep.expand_as(theirs)])
        for mine, theirs, keep in _scores(student, teacher)
    ]
    return torch.stack(losses).mean()


def tinybert_attention_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Sum over layers of MSE(student, teacher) of attention scores before the softmax, between real tokens.

    TinyBERT (Jiao et al. 2020, eq. 7) as its script adds it up. Needs as many heads in the student as in the teacher.
    Of DeBERTa's scores the content's part is compared; that of relative positions is left out.
    """
    return torch.stack([_mean_square(*scores) for scores in _scores(student, teacher)]).sum()


def _scores(student: ModelOutputs, teacher: ModelOutputs) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The attention scores of each layer, of student and teacher, and where both tokens are real.

    Scores are [batch, heads, tokens, tokens]; the mask is [batch, 1, tokens, tokens].
    """
    if not student.query or len(student.query) != len(teacher.query):
        raise ValueError(
            f"attention maps: student {len(student.query)}, teacher {len(teacher.query)}; "
            "they must be as many, and some"
        )
    pairs = (student.mask[:, None, :, None] * student.mask[:, None, None, :]).bool()
    for mine, theirs in zip(zip(student.query, student.key), zip(teacher.query, teacher.key), strict=True):
        yield attention_scores(*mine), attention_scores(*theirs), pairs


def attention_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Q K^T / sqrt(head size): [batch, heads, tokens, size] twice -> [batch, heads, tokens, tokens]."""
    return query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5


def sentence_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """1 - cosine of the mean-pooled last states: what a sentence encoder is used for, asked for directly."""
    mine = mean_pool(student.hidden[-1].float(), student.mask)
    theirs = mean_pool(teacher.hidden[-1].float(), teacher.mask)
    real = student.mask.any(1)
    return _over(((1 - F.cosine_similarity(mine, theirs)) * real).sum(), real.sum())


def cosine_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Mean over real tokens of 1 - cosine of the last states: DistilBERT's (Sanh et al. 2019) third loss."""
    cosine = F.cosine_similarity(student.hidden[-1].float(), teacher.hidden[-1].float(), dim=-1)
    return _over(((1 - cosine) * student.mask).sum(), student.mask.sum())


def kl_loss(student: ModelOutputs, teacher: ModelOutputs, temperature: float = 2.0) -> torch.Tensor:
    """T^2 KL(teacher || student) of the logits divided by T, mean over masked tokens.

    Soft targets (Hinton et al. 2015) as DistilBERT (Sanh et al. 2019) has them; T^2 keeps the size of the gradient.
    """
    mine = F.log_softmax(student.logits.float() / temperature, -1)
    theirs = F.log_softmax(teacher.logits.float() / temperature, -1)
    return _over(F.kl_div(mine, theirs, reduction="sum", log_target=True), len(mine)) * temperature**2


def mlm_loss(student: ModelOutputs, teacher: ModelOutputs | None = None) -> torch.Tensor:
    """Cross-entropy of the masked tokens (Devlin et al. 2019); asks nothing of the teacher."""
    return _over(F.cross_entropy(student.logits.float(), student.targets, reduction="sum"), len(student.targets))


OBJECTIVES: dict[str, Callable[..., torch.Tensor]] = {
    "hidden": hidden_loss,
    "attention": attention_loss,
    "sentence": sentence_loss,
    "tinybert_hidden": tinybert_hidden_loss,
    "tinybert_attention": tinybert_attention_loss,
    "cosine": cosine_loss,
    "kl": kl_loss,
    "mlm": mlm_loss,
}


@dataclass(frozen=True)
class RequiredOutputs:
    """What objectives ask of a forward pass.

    layers: all compared layers, not the last alone; embedded: the embeddings' states; states: states that go through
    the projection, if there is one; attention: queries and keys; masked: masked text, and logits at its masked tokens;
    soft: the teacher's logits too.
    """

    layers: bool
    embedded: bool
    states: bool
    attention: bool
    masked: bool
    soft: bool

    @classmethod
    def of(cls, weights: dict[str, float]) -> "RequiredOutputs":
        """What weighted objectives require together."""
        used = {name for name, weight in weights.items() if weight}
        attention = {"attention", "tinybert_attention"}
        return cls(
            layers=bool(used & {"hidden", "tinybert_hidden", *attention}),
            embedded="tinybert_hidden" in used,
            states=bool(used & {"hidden", "tinybert_hidden", "sentence", "cosine"}),
            attention=bool(used & attention),
            masked=bool(used & {"kl", "mlm"}),
            soft="kl" in used,
        )

    @property
    def teacher(self) -> bool:
        """Whether any objective looks at a teacher: mlm alone does not."""
        return self.states or self.attention or self.soft

    @property
    def cacheable(self) -> bool:
        """Whether cached states are all that is asked of the teacher: they are the whole text's, and states alone."""
        return self.states and not self.attention and not self.masked


def check_objectives(weights: dict[str, float]) -> None:
    """Raises UserError for an unknown name, a negative weight, or nothing to optimise."""
    unknown = [name for name in weights if name not in OBJECTIVES]
    if unknown:
        raise UserError(f"unknown objective {unknown[0]!r}; there are {', '.join(OBJECTIVES)}")
    if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
        raise UserError(f"distill.objectives is {weights}; weights must not be negative, and one must be positive")


def total_loss(
    weights: dict[str, float], student: ModelOutputs, teacher: ModelOutputs | None, temperature: float = 2.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum, and each objective's own value. temperature: of the soft targets (kl)."""
    settings = {"kl": {"temperature": temperature}}
    parts = {
        name: OBJECTIVES[name](student, teacher, **settings.get(name, {})) for name, weight in weights.items() if weight
    }
    return sum(weights[name] * value for name, value in parts.items()), {n: v.detach() for n, v in parts.items()}
