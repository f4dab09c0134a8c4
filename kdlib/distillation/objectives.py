"""Distillation objectives: in what the student shall equal the teacher.

An objective is a function of the student's and the teacher's `ModelOutputs` that returns one number a batch. A profile
lists objectives with weights, and `total_loss` adds them up. Padding never counts. Where processes share a batch, the
mean of their losses is the loss of the whole batch. A student of another width is compared through a projection: its
outputs are those after the projection.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
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
        value: as `query`.
        embedded: [batch, tokens, hidden], the states after the embeddings.
        logits: [masked tokens, vocabulary].
        targets: [masked tokens], the tokens before masking.
        translation: of the teacher, [batch, translations' tokens, hidden], its last states of each text's translation.
        translated: [batch, translations' tokens], 1 at real tokens; all 0 for a text without a translation.
        reach: of each compared layer with local attention, how many tokens away a token sees; None for all.
    """

    hidden: list[torch.Tensor]
    mask: torch.Tensor
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)
    value: list[torch.Tensor] = field(default_factory=list)
    embedded: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    translation: torch.Tensor | None = None
    translated: torch.Tensor | None = None
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


def constant_loss(states: Iterable[np.ndarray]) -> float:
    """What `hidden_loss` gives a student that always answers the mean vector of each layer.

    It is below 1: the loss divides by the variance over all numbers, and a constant vector explains how the means of
    the dimensions differ.

    Args:
        states: the teacher's states of each compared layer, [tokens, hidden].
    """
    layers = (np.asarray(layer, np.float64) for layer in states)
    return float(np.mean([layer.var(axis=0).mean() / layer.var() for layer in layers]))


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
    pairs = _real_pairs(student.mask)
    place = torch.arange(student.mask.shape[1], device=student.mask.device)
    reach = teacher.reach or [None] * len(teacher.query)
    for mine, theirs, most in zip(zip(student.query, student.key), zip(teacher.query, teacher.key), reach, strict=True):
        seen = pairs if most is None else pairs & ((place[:, None] - place).abs() <= most)  # local attention
        yield attention_scores(*mine), attention_scores(*theirs), seen


def _real_pairs(mask: torch.Tensor) -> torch.Tensor:
    """Where both tokens of a pair are real: bool [batch, 1, tokens, tokens]."""
    return (mask[:, None, :, None] * mask[:, None, None, :]).bool()


def attention_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Q K^T / sqrt(head size): [batch, heads, tokens, size] twice -> [batch, heads, tokens, tokens]."""
    return query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5


Vector = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # from states and mask to the vectors of texts


def relation_loss(student: ModelOutputs, teacher: ModelOutputs, heads: int = 12) -> torch.Tensor:
    """KL(teacher || student) of the relations between the queries, the keys and the values of the last compared layer.

    The heads of each are joined and split again into `heads` relation heads of size d, so that widths and numbers of
    attention heads may differ. With R = softmax(X X^T / sqrt(d)) over the real tokens, X in {Q, K, V}:
    sum over X of 1/3 * 1 / (heads * tokens) * sum over heads and tokens of KL(R_teacher || R_student), mean over texts.

    References:
        Wang et al. (2021), MiniLMv2, eq. 5 to 8, with their weights of 1/3.
    """
    pairs, real = _real_pairs(student.mask), student.mask.any(1)
    lengths = student.mask.sum(1).clamp(min=1)
    losses = []
    for kind in ("query", "key", "value"):
        mine, theirs = (_relations(getattr(side, kind)[-1], pairs, heads) for side in (student, teacher))
        divergence = F.kl_div(mine, theirs, reduction="none", log_target=True).masked_fill(~pairs, 0)
        losses.append(_over((divergence.sum((1, 2, 3)) / (heads * lengths)).sum(), real.sum()))
    return torch.stack(losses).mean()


def _relations(states: torch.Tensor, pairs: torch.Tensor, heads: int) -> torch.Tensor:
    """Log-softmax of the scaled products of states [batch, attention heads, tokens, size] over the real tokens."""
    states = states.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    return _attend(attention_scores(states, states), pairs).log_softmax(-1)


def _attend(scores: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The scores, so low outside the real pairs that a softmax gives 0 there."""
    return scores.masked_fill(~pairs, torch.finfo(scores.dtype).min)


def comet_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """MSE(student, teacher) / Var(teacher) of the last layer's attention map, averaged over heads, between real tokens.

    A map is softmax(Q K^T / sqrt(head size)) over the real tokens. The mean over heads lets their numbers differ. The
    student reads the teacher's tokens, so the maps of a text are equally long: they need no interpolation, and no
    learned projection of tokens^2 x tokens^2 weights. AfroXLMR-Comet adds soft targets, which are the objective kl. The
    division by the variance is ours; without it, the numbers of long texts are too small to count beside kl.

    References:
        AfroXLMR-Comet (2025), arXiv 2502.18020: 0.5 kl + 0.5 comet, each with equal weight.
    """
    pairs = _real_pairs(student.mask)
    mine, theirs = (
        _attend(attention_scores(side.query[-1], side.key[-1]), pairs).softmax(-1).mean(1, keepdim=True)
        for side in (student, teacher)
    )
    return _mean_square(mine, theirs, pairs) / _variance(theirs[pairs])


def similarity_loss(student: ModelOutputs, teacher: ModelOutputs, vector: Vector = mean_pool) -> torch.Tensor:
    """MSE between the matrices of cosines of all texts of a batch, of student and of teacher.

    mean over texts i, j of (cos(s_i, s_j) - cos(t_i, t_j))^2, with vectors s and t of the texts. The term on the
    order of all pairs of pairs, which Jasper adds, is left out: it needs memory of the order of texts^4.

    References:
        Zhang et al. (2024), Jasper and Stella, arXiv 2412.19048, the second loss.
    """
    real = student.mask.any(1)
    mine, theirs = (
        F.normalize(vector(side.hidden[-1].float(), student.mask), dim=-1) * real.unsqueeze(1)
        for side in (student, teacher)
    )
    everybody = distributed.gather(real.float().unsqueeze(1)).sum()
    difference = mine @ distributed.gather(mine).T - theirs @ distributed.gather(theirs).T
    return _over(difference.square().sum(), real.sum() * everybody)


def alignment_loss(student: ModelOutputs, teacher: ModelOutputs, vector: Vector = mean_pool) -> torch.Tensor:
    """MSE(student, teacher) / Var(teacher) of the texts' vectors, over texts.

    Unlike `sentence` it compares lengths too, so the student's vectors can be searched in an index of the teacher's.
    The paper's abstract names direct alignment of the vectors; the square and the division by the variance are ours.

    References:
        LEAF (2025), arXiv 2509.12539.
    """
    target = vector(teacher.hidden[-1].float(), teacher.mask)
    return _vector_loss(student, target, student.mask.any(1), vector)


def _vector_loss(student: ModelOutputs, target: torch.Tensor, real: torch.Tensor, vector: Vector) -> torch.Tensor:
    """MSE / Var(target) of the student's vectors and `target` [batch, hidden], over the `real` texts."""
    mine = vector(student.hidden[-1].float(), student.mask)
    return _mean_square(mine, target, real.unsqueeze(1)) / _variance(target[real])


def crosslingual_loss(student: ModelOutputs, teacher: ModelOutputs, vector: Vector = mean_pool) -> torch.Tensor:
    """MSE(student, teacher) / Var(teacher) of the texts' vectors; the teacher reads the translation.

    Over the texts that have one. Reimers and Gurevych also compare the student's vectors of the English text; our
    student reads one language. CLKD compares scores of answers instead of vectors, with text translated either way; for
    pairs that exist in both languages its two cases are the same.

    References:
        Reimers and Gurevych (2020), eq. 1, the second term; CLKD (2023), arXiv 2305.16302.
    """
    target = vector(teacher.translation.float(), teacher.translated)
    return _vector_loss(student, target, student.mask.any(1) & teacher.translated.any(1), vector)


def transport_loss(student: ModelOutputs, teacher: ModelOutputs) -> torch.Tensor:
    """Cost of moving the student's tokens onto the teacher's tokens of the translation, mean over texts.

    <P, C> with C_ij = 1 - cosine of the last states of token i and of translated token j, and P the plan of
    `transport_plan`, through which no gradient flows. What we know of the paper leaves open the masses, which are equal
    here for all tokens of a text, and the plan, which is that of entropic transport here.

    References:
        Huang et al. (2023), OPTICAL, arXiv 2301.12566; Cuturi (2013).
    """
    real = student.mask.any(1) & teacher.translated.any(1)
    mine, theirs = (F.normalize(x.float()[real], dim=-1) for x in (student.hidden[-1], teacher.translation))
    cost = 1 - mine @ theirs.transpose(1, 2)
    plan = transport_plan(cost.detach(), student.mask[real], teacher.translated[real])
    return _over((plan * cost).sum(), real.sum())


def transport_plan(
    cost: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, epsilon: float = 0.05, rounds: int = 50
) -> torch.Tensor:
    """The plan of entropic optimal transport between equal masses of real tokens, by Sinkhorn's steps on logarithms.

    Args:
        cost: [batch, n, m].
        rows: [batch, n], 1 at real tokens; a text has at least one.
        columns: [batch, m], as `rows`.
        epsilon: weight of the plan's entropy; costs are between 0 and 2.
        rounds: steps; each makes the sums of rows and then those of columns right.

    Returns:
        [batch, n, m], at least 0, with sum 1; 0 at padding.
    """
    kernel = -cost / epsilon
    left, right = ((mask / mask.sum(1, keepdim=True)).log().to(cost) for mask in (rows, columns))
    u, v = left, right
    for _ in range(rounds):
        u = left - (kernel + v.unsqueeze(1)).logsumexp(2)
        v = right - (kernel + u.unsqueeze(2)).logsumexp(1)
    return (kernel + u.unsqueeze(2) + v.unsqueeze(1)).exp()


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
        values: the attention's values.
        heads: as many attention heads in the student as in the teacher.
        masked: masked text, and logits at its masked tokens.
        soft: the teacher's logits.
        translation: the teacher's states of the texts' translations.
    """

    states: bool = False
    layers: bool = False
    embedded: bool = False
    attention: bool = False
    values: bool = False
    heads: bool = False
    masked: bool = False
    soft: bool = False
    translation: bool = False

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
    "attention": Objective(attention_loss, RequiredOutputs(attention=True, heads=True, layers=True)),
    "sentence": Objective(sentence_loss, RequiredOutputs(states=True)),
    "tinybert_hidden": Objective(tinybert_hidden_loss, RequiredOutputs(states=True, layers=True, embedded=True)),
    "tinybert_attention": Objective(tinybert_attention_loss, RequiredOutputs(attention=True, heads=True, layers=True)),
    "cosine": Objective(cosine_loss, RequiredOutputs(states=True)),
    "relation": Objective(relation_loss, RequiredOutputs(attention=True, values=True)),
    "comet": Objective(comet_loss, RequiredOutputs(attention=True)),
    "similarity": Objective(similarity_loss, RequiredOutputs(states=True)),
    "alignment": Objective(alignment_loss, RequiredOutputs(states=True)),
    "crosslingual": Objective(crosslingual_loss, RequiredOutputs(states=True, translation=True)),
    "transport": Objective(transport_loss, RequiredOutputs(states=True, translation=True)),
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
    relation_heads: int = 12,
    vector: Vector = mean_pool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum, and each objective's own value. Objectives of translations need a batch that has some.

    Args:
        weights: of the objectives.
        student: its outputs.
        teacher: its outputs; None where no objective needs them.
        temperature: of the soft targets (kl).
        relation_heads: of relation.
        vector: from states and mask to the vectors of texts, for the objectives that compare those.
    """
    settings: dict[str, dict] = {"kl": {"temperature": temperature}, "relation": {"heads": relation_heads}}
    settings |= {name: {"vector": vector} for name in ("sentence", "similarity", "alignment", "crosslingual")}
    parts = {
        name: OBJECTIVES[name].loss(student, teacher, **settings.get(name, {}))
        for name, weight in weights.items()
        if weight and (not OBJECTIVES[name].needs.translation or teacher.translation is not None)
    }
    return sum(weights[name] * value for name, value in parts.items()), {n: v.detach() for n, v in parts.items()}
