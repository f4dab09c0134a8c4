"""Student building: a smaller encoder of the teacher's family, initialised from the teacher's weights."""

import copy
import logging
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kdlib import config
from kdlib.distillation.importance import most_important, sample_batches
from kdlib.errors import UserError
from kdlib.models.build import with_state
from kdlib.models.families import FAMILIES, LOCAL, Family, family_of, layer_kinds

log = logging.getLogger(__name__)
SAMPLE_TOKENS = 8192  # of the sample that a narrower student is fitted on


RULES = ("alternate", "late", "first", "last")


def layer_map(rule: str | list[int], student_layers: int, teacher_layers: int, key: str = "student.init") -> list[int]:
    """The teacher layer (1 = first) for each student layer: to copy it from, or to compare it with.

    Args:
        rule: "alternate": every n-th, with the last; "late": the last, and every n-th of those below it (as
            "alternate" for fewer than 3 layers); "first", "last", or a list of layers.
        student_layers: l.
        teacher_layers: L.
        key: the parameter that holds the rule, for errors.

    References:
        Cruz and Aji (2025): student layer i is compared with teacher layer i * L / l, which is "alternate".
    """
    if isinstance(rule, list):
        if len(rule) != student_layers:
            raise UserError(f"{key} names {len(rule)} layers for a student of {student_layers}")
        if not all(1 <= layer <= teacher_layers for layer in rule):
            raise UserError(f"{key} is {rule}; the teacher's layers are 1 to {teacher_layers}")
        return rule
    if rule not in RULES:
        raise UserError(f"{key} is {rule!r}; must be {', '.join(RULES)}, random or a list of layers")
    if student_layers > teacher_layers:
        raise UserError(f"student.layers is {student_layers}; the teacher has only {teacher_layers}")
    if rule == "late" and student_layers > 2:
        return [*layer_map("alternate", student_layers - 1, teacher_layers - 1), teacher_layers]
    if rule == "first":
        return list(range(1, student_layers + 1))
    if rule == "last":
        return list(range(teacher_layers - student_layers + 1, teacher_layers + 1))
    return [(i + 1) * teacher_layers // student_layers for i in range(student_layers)]


def source_layers(rule: str | list[int], student_layers: int, teacher: PretrainedConfig) -> list[int]:
    """The teacher layer (1 = first) that each student layer is copied from.

    In families whose layers differ (ModernBERT), a named rule is followed as far as kinds of layers allow: the first
    layer, which lacks a norm, is copied from the first, and each further one from the nearest layer of its own kind. So
    global and local attention keep the teacher's order, which transformers 4 needs. A list is taken as it is, and
    layers keep their kinds.

    Args:
        rule: as `layer_map` has it.
        student_layers: l.
        teacher: the teacher's configuration.

    Raises:
        UserError: where a list puts the first layer elsewhere, or another layer first.
    """
    wished = layer_map(rule, student_layers, teacher.num_hidden_layers)
    family = FAMILIES.get(teacher.model_type)
    if family is None or not family.first_stays:
        return wished
    kinds = layer_kinds(teacher) or [""] * teacher.num_hidden_layers
    if isinstance(rule, list):
        if rule[0] != 1 or 1 in rule[1:]:
            raise UserError(
                f"student.init is {rule}; the first layer of a {teacher.model_type} has no norm before its attention: "
                "the list must begin with 1, and have no other 1"
            )
        copied = [kinds[layer - 1] for layer in rule]
        if copied != kinds[: len(rule)]:
            log.warning(
                "student.init: layers %s are %s; transformers 4 knows no such order of global and local attention, "
                "version 5 does", rule, ", ".join("local" if kind == LOCAL else "global" for kind in copied),
            )  # fmt: skip
        return rule
    found, end = [], teacher.num_hidden_layers + 1
    for i in range(student_layers - 1, 0, -1):  # from the end, so that enough layers are left for those before
        options = [layer for layer in range(i + 1, end) if kinds[layer - 1] == kinds[i]]
        end = min(options, key=lambda layer: abs(layer - wished[i]))
        found.insert(0, end)
    if [1, *found] != wished:
        log.info("student.init: %s is layers %s of this teacher, not %s", rule, [1, *found], wished)
    return [1, *found]


def count_layers(model: PreTrainedModel) -> int:
    """Number of transformer layers."""
    return model.config.num_hidden_layers


def build_student(
    teacher: PreTrainedModel, spec: config.Student, seed: int = 0, sample: Sequence[Sequence[int]] | None = None
) -> PreTrainedModel:
    """Build a student of the teacher's family with the sizes of `spec`; sizes that are None are the teacher's.

    Copied layers are exact where only the number of layers changes. Otherwise only the weights whose sizes change are
    touched, as spec.narrow says. "random": they are drawn. "truncate": the first dimensions stay, of each head too, and
    the feed-forward neurons with the largest product of norms. "pca": see `_narrow`. "importance": as "pca", but whole
    heads and neurons are removed, the least important first (see `most_important`).

    Args:
        teacher: the model to copy from.
        spec: sizes; spec.init lists the layers to copy, or is "random" for a random start (a "blank" student).
        seed: of random weights.
        sample: token ids of texts that "pca" and "importance" are fitted on (about 8,000 and 4,000 tokens); None:
            random rows of the vocabulary.

    Raises:
        UserError: for sizes that do not fit together, or for a student with more layers, width or heads than its
            teacher, unless spec.init is "random".

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> import kdlib
        >>> from kdlib.config import Student
        >>> sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50)
        >>> teacher = BertModel(BertConfig(num_hidden_layers=4, **sizes))
        >>> kdlib.build_student(teacher, Student(layers=2)).config.num_hidden_layers
        2
    """
    sizes = _student_config(teacher, spec)
    if spec.init == "random":
        return _blank(teacher, sizes, seed)
    source = source_layers(spec.init, spec.layers, teacher.config)
    wide = _with_layers(teacher, source)
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = wide.config.layer_types
    if _sizes(wide.config) == _sizes(sizes):
        return wide
    if teacher.base_model is not teacher:
        raise UserError(f"cannot resize a {type(teacher).__name__}: student.init must be random")
    return _narrow(teacher, source, wide, _blank(teacher, sizes, seed), spec.narrow, sample)


def _key_heads(settings: PretrainedConfig) -> int | None:
    """The number of heads of keys and values where it is set apart; several heads of queries may share one."""
    return getattr(settings, "num_key_value_heads", None)


def _sizes(settings: PretrainedConfig) -> tuple[int, int, int]:
    """Width, heads, feed-forward width."""
    return settings.hidden_size, settings.num_attention_heads, getattr(settings, _ffn_key(settings))


def _ffn_key(settings: PretrainedConfig) -> str:
    """The config's key for the feed-forward width, also of a family that has no row in the table."""
    family = FAMILIES.get(settings.model_type)
    return family.ffn if family else "intermediate_size"


def _student_config(teacher: PreTrainedModel, spec: config.Student) -> PretrainedConfig:
    """The teacher's configuration with the student's sizes."""
    if spec.layers < 1:
        raise UserError(f"student.layers is {spec.layers}; must be at least 1")
    theirs = _sizes(teacher.config)
    hidden, heads, ffn = (b if a is None else a for a, b in zip((spec.hidden, spec.heads, spec.ffn), theirs))
    for key, mine, most in zip(("hidden", "heads", "ffn"), (hidden, heads, ffn), theirs):
        if mine > most and spec.init != "random":
            raise UserError(
                f"student.{key} is {mine}, the teacher's is {most}: more than there is to copy from; "
                "use less, or student.init=random"
            )
    if hidden % heads:
        raise UserError(f"student.hidden is {hidden}, which {heads} heads do not divide evenly (student.heads)")
    sizes = copy.deepcopy(teacher.config)
    sizes.num_hidden_layers, sizes.hidden_size, sizes.num_attention_heads = spec.layers, hidden, heads
    setattr(sizes, _ffn_key(sizes), ffn)
    if getattr(sizes, "layer_types", None):  # of a random start; a copied layer keeps its own
        sizes.layer_types = sizes.layer_types[: spec.layers]
    family, sharing = FAMILIES.get(sizes.model_type), theirs[1] // (_key_heads(sizes) or theirs[1])
    if heads % sharing:
        raise UserError(f"student.heads is {heads}; {sharing} heads of the teacher share a key: it must be a multiple")
    if family and family.rotary and hidden // heads % 2:
        raise UserError(f"student.hidden / student.heads is {hidden // heads}; rotary positions need an even number")
    for key, value in (
        ("attention_head_size", hidden // heads), ("pooler_hidden_size", hidden),  # DeBERTa's
        ("head_dim", hidden // heads), ("num_key_value_heads", heads // sharing),  # EuroBERT's
    ):  # fmt: skip
        if getattr(sizes, key, None) is not None:
            setattr(sizes, key, value)
    if (embedded := getattr(sizes, "embedding_size", None)) == theirs[0]:  # ELECTRA's, else narrower than the states
        sizes.embedding_size = hidden
    elif embedded == hidden and spec.init != "random":
        raise UserError(
            f"student.hidden is {hidden}, which is the width of this {sizes.model_type}'s embeddings: it would lose "
            "their projection to the states; take another width"
        )
    return sizes


def _blank(teacher: PreTrainedModel, sizes: PretrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(teacher)._from_config(sizes).eval()


def _with_layers(teacher: PreTrainedModel, source: list[int]) -> PreTrainedModel:
    """An exact copy of the teacher with only the layers `source` (1 = first)."""
    shorter = copy.deepcopy(teacher.config)
    shorter.num_hidden_layers = len(source)
    if getattr(shorter, "layer_types", None):
        shorter.layer_types = [shorter.layer_types[layer - 1] for layer in source]
    layer = re.compile(rf"^(.*{re.escape(family_of(teacher.config.model_type).layers)}\.)(\d+)(\..*)$")
    state, seen = {}, set()
    for name, value in teacher.state_dict().items():
        match = layer.match(name)
        if match is None:
            state[name] = value
            continue
        seen.add(int(match[2]))
        for i, teacher_layer in enumerate(source):
            if int(match[2]) == teacher_layer - 1:
                state[f"{match[1]}{i}{match[3]}"] = value
    if len(seen) != count_layers(teacher):
        raise UserError(f"cannot copy layers of a {type(teacher).__name__}: student.init must be random")
    return with_state(type(teacher), shorter, state)


def _narrow(
    teacher: PreTrainedModel,
    source: list[int],
    wide: PreTrainedModel,
    start: PreTrainedModel,
    how: str,
    sample: Sequence[Sequence[int]] | None,
) -> PreTrainedModel:
    """Fill `start`, which has the student's sizes, from `wide`, a copy of the teacher's layers `source`.

    Width: the residual stream is projected by a basis [width, new width] with orthonormal columns: the first axes
    ("truncate") or the principal directions of the teacher's states ("pca"), as in SliceGPT (Ashkboos et al. 2024) and
    BiStil (Ansell et al. 2023). Weights that read the stream are multiplied by the basis, weights that write it by its
    transpose. A LayerNorm's bias is projected too; its gain g becomes the diagonal of basis^T diag(g) basis. The states
    are then the teacher's projected, about sqrt(new width / width) as long; a learned projection corrects the length.
    Heads: see `_narrow_heads`. Feed-forward neurons: those with the largest product of the norms of their weights (a
    gated layer's neuron has three), or the most important ones.
    """
    names = family_of(teacher.config.model_type)
    (width, heads, ffn), (new_width, new_heads, new_ffn) = _sizes(wide.config), _sizes(start.config)
    state = {name: value.float() for name, value in wide.state_dict().items()}
    layers = [f"{names.layers}.{i}." for i in range(len(source))]
    if how == "random":
        changed = [*names.attention] * (new_heads != heads) + [*names.up, names.down] * (new_ffn != ffn)
        changed = [next((whole for whole, parts in names.fused.items() if n in parts), n) for n in changed]
        drawn = {f"{layer}{name}.{kind}" for layer in layers for name in changed for kind in ("weight", "bias")}
        kept = {} if new_width != width else {name: value for name, value in state.items() if name not in drawn}
        start.load_state_dict(start.state_dict() | kept)
        return start
    basis = torch.eye(width, new_width)
    if how != "truncate" and new_width < width:
        basis = _principal(teacher, source, new_width, sample)
    chosen = None
    if how == "importance":
        if names.rotary and new_heads != heads:
            raise UserError(f"student.narrow: importance removes no heads of a {wide.config.model_type}; keep {heads}")
        chosen = most_important(wide.to(teacher.device), new_heads, new_ffn, sample)
    for i, prefix in enumerate(layers):
        _split(state, prefix, names)
        if (new_heads, new_width) != (heads, width):
            if names.rotary:
                _narrow_rotary_heads(state, prefix, names, wide.config, start.config, basis, reduce=how != "truncate")
            else:
                groups = [[head] for head in chosen[i][0]] if chosen else np.array_split(np.arange(heads), new_heads)
                _narrow_heads(state, prefix, names, heads, groups, basis, reduce=how != "truncate")
        if new_ffn != ffn:
            down = f"{prefix}{names.down}.weight"
            ups = [f"{prefix}{name}.weight" for name in names.up]
            strength = torch.stack([state[up].norm(dim=1) for up in ups]).prod(0) * state[down].norm(dim=0)
            kept = chosen[i][1] if chosen else strength.topk(new_ffn).indices.sort().values
            for name in [*ups, *(up.removesuffix("weight") + "bias" for up in ups)]:
                if name in state:
                    state[name] = state[name][kept]
            state[down] = state[down][:, kept]
        _join(state, prefix, names)
    for name in [n for n in state if n.endswith("relative_attention_bias.weight") and new_heads != heads]:  # MPNet's
        groups = np.array_split(np.arange(heads), new_heads)
        state[name] = torch.stack([state[name][:, group].mean(1) for group in groups], 1)
    gains = {f"{name}.weight" for name, module in start.named_modules() if _is_norm(module)}
    for name, value in start.state_dict().items():
        through = basis.square() if name in gains else basis
        for axis, (old, new) in enumerate(zip(state[name].shape, value.shape, strict=True)):
            if old != new:  # heads and neurons fit now; the axes that still differ belong to the residual stream
                state[name] = (state[name].movedim(axis, -1) @ through).movedim(-1, axis)
    start.load_state_dict(state)
    return start


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _split(state: dict[str, torch.Tensor], prefix: str, names: Family) -> None:
    """Split the fused matrices of a layer into their parts, in place."""
    for whole, parts in names.fused.items():
        for kind in ("weight", "bias"):
            if (fused := state.pop(f"{prefix}{whole}.{kind}", None)) is not None:
                state |= {f"{prefix}{part}.{kind}": value for part, value in zip(parts, fused.chunk(len(parts)))}


def _join(state: dict[str, torch.Tensor], prefix: str, names: Family) -> None:
    """Undo `_split`."""
    for whole, parts in names.fused.items():
        for kind in ("weight", "bias"):
            if f"{prefix}{parts[0]}.{kind}" in state:
                state[f"{prefix}{whole}.{kind}"] = torch.cat([state.pop(f"{prefix}{part}.{kind}") for part in parts])


@torch.no_grad()
def _principal(
    teacher: PreTrainedModel, source: list[int], size: int, sample: Sequence[Sequence[int]] | None
) -> torch.Tensor:
    """Principal directions, about the origin, of the teacher's states on a sample, strongest first.

    The states after the embeddings, after the layers `source` and after their attention have equal weight, as have
    DeBERTa's relative positions. Where layers begin with a norm, the states are those that norms read, each divided by
    its length. Returns float [width, size] with orthonormal columns.
    """
    names = family_of(teacher.config.model_type)
    read = [teacher.get_submodule(f"{names.layers}.{layer - 1}") for layer in source]
    if not names.states:
        read.insert(0, teacher.embeddings)
    norms = [module for part in read for module in part.modules() if _is_norm(module)]
    moments: dict[nn.Module, torch.Tensor] = {}

    def add(norm: nn.Module, read: tuple, states: torch.Tensor) -> None:
        real = (read[0] if names.states else states)[mask.bool()].double()
        if names.states:
            real = F.normalize(real, dim=-1)
        if real.shape[-1] != teacher.config.hidden_size:  # of narrower embeddings
            return
        moments[norm] = moments.get(norm, 0) + real.T @ real

    hooks = [norm.register_forward_hook(add) for norm in norms]
    training = teacher.training
    teacher.eval()
    try:
        for ids, mask in sample_batches(teacher, sample, SAMPLE_TOKENS):
            teacher(input_ids=ids, attention_mask=mask)
    finally:
        teacher.train(training)
        for hook in hooks:
            hook.remove()
    if getattr(teacher.config, "relative_attention", False):
        positions = teacher.encoder.get_rel_embedding().double()
        moments[teacher.encoder] = positions.T @ positions
    total = sum(moment / moment.trace() for moment in moments.values())
    return torch.linalg.eigh(total)[1].flip(1)[:, :size].float().cpu()


def _narrow_heads(
    state: dict[str, torch.Tensor],
    prefix: str,
    names: Family,
    heads: int,
    groups: Sequence[Sequence[int]],
    basis: torch.Tensor,
    reduce: bool,
) -> None:
    """Map the heads of one layer onto fewer or smaller ones, in place; heads in no group are removed.

    A new head replaces a group of heads: it uses the mean of their scores and carries the values of all of them,
    exactly where it is large enough for them side by side. Otherwise the products of queries and keys, and of values
    and output, are approximated by SVD (reduce), or the first dimensions stay.
    """
    width, new_width = basis.shape
    size, new_size = width // heads, new_width // len(groups)
    queries, keys = (
        [f"{prefix}{n}" for n in side if f"{prefix}{n}.weight" in state] for side in (names.query, names.key)
    )
    value, out = prefix + names.value, prefix + names.out
    made: dict[str, list[torch.Tensor]] = {}

    for group in groups:
        inner = torch.from_numpy(
            (np.asarray(group)[:, None] * size + np.arange(size)).ravel()
        )  # their dimensions, side by side

        def read(module: str, inner: torch.Tensor = inner) -> torch.Tensor:
            """Weight and bias, as a matrix from the narrow stream and a constant: [inner, new width + 1]."""
            weight, bias = (state[f"{module}.weight"][inner], state[f"{module}.bias"][inner])
            return torch.cat([weight @ basis, bias.unsqueeze(1)], 1)

        asked, answered = inner_maps(
            *(torch.cat([read(m) for m in side], 1) for side in (queries, keys)), new_size, reduce
        )
        carried, written = inner_maps(read(value), state[f"{out}.weight"][:, inner].T @ basis, new_size, reduce)
        asked = asked * (new_size / size) ** 0.5 / len(group)  # scores are divided by the root of a head's size
        maps = {**dict.fromkeys(queries, asked), **dict.fromkeys(keys, answered), value: carried}
        for module, through in maps.items():
            for kind in ("weight", "bias"):
                made.setdefault(f"{module}.{kind}", []).append(through @ state[f"{module}.{kind}"][inner])
        made.setdefault(f"{out}.weight", []).append(state[f"{out}.weight"][:, inner] @ written.T)
    state.update({name: torch.cat(parts, 1 if name == f"{out}.weight" else 0) for name, parts in made.items()})


def _narrow_rotary_heads(
    state: dict[str, torch.Tensor],
    prefix: str,
    names: Family,
    wide: PretrainedConfig,
    start: PretrainedConfig,
    basis: torch.Tensor,
    reduce: bool,
) -> None:
    """Map the heads of one layer with rotary positions onto fewer or smaller ones, in place.

    Dimension j of a head is rotated together with j + half its size, j / half of the way to the lowest frequency. So
    queries and keys cannot be mixed as in `_narrow_heads`: a smaller head keeps the pairs whose frequencies are those
    of its own pairs, and its scores are enlarged, since the pairs that stay stand for all. Of fewer heads, a new one is
    the strongest of its neighbours, by the product of the norms of values and output; heads that share a key stay
    together. Values and output are approximated as in `_narrow_heads`.
    """
    size, new_size = wide.hidden_size // wide.num_attention_heads, start.hidden_size // start.num_attention_heads
    keys, new_keys = (_key_heads(c) or c.num_attention_heads for c in (wide, start))
    sharing = wide.num_attention_heads // keys
    pairs = torch.arange(new_size // 2) * size // new_size
    pairs = torch.cat([pairs, pairs + size // 2])
    query, key, value, out = (f"{prefix}{name}" for name in (names.query[0], names.key[0], names.value, names.out))
    heads = {name: _by_head(state, name, size) for name in (query, key, value)}
    written = state[f"{out}.weight"].unflatten(1, (-1, size)).movedim(1, 0)  # [heads, width, size]
    strength = heads[value].flatten(1).norm(dim=1) * written.unflatten(0, (keys, sharing)).flatten(1).norm(dim=1)
    kept = [int(group[strength[group].argmax()]) for group in map(torch.tensor, np.array_split(range(keys), new_keys))]
    made: dict[str, list[torch.Tensor]] = {name: [] for name in (query, key, value, out)}
    for head in kept:
        made[key].append(heads[key][head][pairs])
        outs = written[head * sharing : (head + 1) * sharing]
        read = torch.cat([heads[value][head][:, :-1] @ basis, heads[value][head][:, -1:]], 1)
        carried, through = inner_maps(read, torch.cat([o.T @ basis for o in outs], 1), new_size, reduce)
        made[value].append(carried @ heads[value][head])
        for i, o in enumerate(outs):
            made[query].append(heads[query][head * sharing + i][pairs] * (size / new_size) ** 0.5)
            made[out].append(o @ through.T)
    for name in (query, key, value):
        joined = torch.cat(made[name])
        state[f"{name}.weight"] = joined[:, :-1]
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = joined[:, -1]
    state[f"{out}.weight"] = torch.cat(made[out], 1)


def _by_head(state: dict[str, torch.Tensor], name: str, size: int) -> torch.Tensor:
    """A projection's weight with its bias, which may be absent, as last column: [heads, size, width + 1]."""
    weight = state[f"{name}.weight"]
    bias = state.get(f"{name}.bias", torch.zeros(len(weight)))
    return torch.cat([weight, bias.unsqueeze(1)], 1).unflatten(0, (-1, size))


def inner_maps(left: torch.Tensor, right: torch.Tensor, size: int, reduce: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps from an inner space of n dimensions to one of `size`, both [size, n].

    With left [n, a] and right [n, b], (map left)^T (map right) approximates left^T right. With `reduce` it is the best
    approximation of rank `size` (Eckart and Young 1936), balanced between the two; else the first dimensions stay.
    Additional dimensions repeat on the left and are 0 on the right, so the product stays the same and can be learned.
    """
    n = len(left)
    if n <= size or not reduce:
        places = torch.arange(size)
        plain = torch.eye(n)[places % n]
        return plain, plain * (places < n).unsqueeze(1)
    left, right = _root(left), _root(right)
    u, strength, v = torch.linalg.svd(left @ right)
    scale = strength[:size].rsqrt().unsqueeze(1)
    return (scale * v[:size] @ right).float(), (scale * u[:, :size].T @ left).float()


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric root of matrix @ matrix.T in double precision, never singular."""
    square = matrix.double() @ matrix.double().T
    square.diagonal().add_(1e-9 * square.diagonal().mean())
    values, vectors = torch.linalg.eigh(square)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
