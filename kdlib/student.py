"""Student building: a smaller encoder of the teacher's kind, started from the teacher's weights."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kdlib import config
from kdlib.encoder import pad
from kdlib.errors import UserError
from kdlib.vocabulary import with_state

LAYER = re.compile(r"^(.*(?:encoder|transformer)\.layer\.)(\d+)(\..*)$")
SAMPLE_TOKENS = 8192  # of the sample that a narrower student is fitted on


@dataclass(frozen=True)
class Names:
    """Where a family keeps what changes with the sizes: modules of a layer, and of the model.

    query, key: the projections, the content's first; all share the inner space of the heads. norms: of the attention
    and of the layer. ffn: the key of the configuration that holds the width of the feed-forward layers.
    """

    layers: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: str
    out: str
    up: str
    down: str
    norms: tuple[str, str]
    ffn: str = "intermediate_size"


_BERT = Names(
    "encoder.layer", ("attention.self.query",), ("attention.self.key",), "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense", ("attention.output.LayerNorm", "output.LayerNorm"),
)  # fmt: skip
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "deberta-v2": Names(
        "encoder.layer", ("attention.self.query_proj", "attention.self.pos_query_proj"),
        ("attention.self.key_proj", "attention.self.pos_key_proj"), "attention.self.value_proj",
        "attention.output.dense", "intermediate.dense", "output.dense",
        ("attention.output.LayerNorm", "output.LayerNorm"),
    ),
    "distilbert": Names(
        "transformer.layer", ("attention.q_lin",), ("attention.k_lin",), "attention.v_lin", "attention.out_lin",
        "ffn.lin1", "ffn.lin2", ("sa_layer_norm", "output_layer_norm"), "hidden_dim",
    ),
}  # fmt: skip


def layer_map(init: str | list[int], student_layers: int, teacher_layers: int) -> list[int]:
    """Which teacher layer (1 = first) each student layer is copied from and compared with.

    init: "alternate" (every n-th, the last among them), "first", "last", or the layers themselves. A random start
    has no source layers; it is compared with the alternate ones. Cruz and Aji's student layer i is compared with
    teacher layer i * L / l, which is "alternate".
    """
    if isinstance(init, list):
        if len(init) != student_layers:
            raise UserError(f"student.init names {len(init)} layers for a student of {student_layers}")
        if not all(1 <= layer <= teacher_layers for layer in init):
            raise UserError(f"student.init is {init}; the teacher's layers are 1 to {teacher_layers}")
        return init
    if init not in ("alternate", "first", "last", "random"):
        raise UserError(f"student.init is {init!r}; must be alternate, first, last, random or a list of layers")
    if student_layers > teacher_layers:
        raise UserError(f"student.layers is {student_layers}; the teacher has only {teacher_layers}")
    if init == "first":
        return list(range(1, student_layers + 1))
    if init == "last":
        return list(range(teacher_layers - student_layers + 1, teacher_layers + 1))
    return [(i + 1) * teacher_layers // student_layers for i in range(student_layers)]


def count_layers(model: PreTrainedModel) -> int:
    """Number of transformer layers."""
    return model.config.num_hidden_layers


def build_student(
    teacher: PreTrainedModel,
    spec: config.Student,
    seed: int = 0,
    sample: Sequence[Sequence[int]] | None = None,
) -> PreTrainedModel:
    """A student of the teacher's family with the sizes of `spec`; sizes that are None are the teacher's.

    spec.init: "alternate", "first", "last" or a list of teacher layers (1 = first) copies those layers and everything
    outside the layers (embeddings, pooler), exactly where no other size changes; "random" draws all weights anew with
    `seed` (a "blank" student). spec.narrow says what becomes of the copies where width, feed-forward width or heads
    are smaller than the teacher's; only the weights whose sizes change are touched:

    - "random": they are drawn anew, which for a smaller width means all.
    - "truncate": the first dimensions stay, of each head too; of the feed-forward neurons those with the largest
      product of the norms of what they read and write. Fewer heads: neighbours are joined.
    - "pca": as `_narrow` describes, fitted on `sample`, token ids of texts (of which about 8,000 tokens are used);
      without it, on random rows of the vocabulary.

    Raises UserError for sizes that do not fit, and for a student deeper, wider or with more heads than its teacher
    unless spec.init is "random".
    """
    sizes = _student_config(teacher, spec)
    if spec.init == "random":
        return _blank(teacher, sizes, seed)
    source = layer_map(spec.init, spec.layers, count_layers(teacher))
    wide = _with_layers(teacher, source)
    if _sizes(wide.config) == _sizes(sizes):
        return wide
    if _names(teacher) is None:
        raise UserError(f"cannot resize a {type(teacher).__name__}: student.init must be random")
    start = _blank(teacher, sizes, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _narrow(teacher, source, wide, start, spec.narrow, sample)


def _names(model: PreTrainedModel) -> Names | None:
    return FAMILIES.get(model.config.model_type) if model.base_model is model else None


def _sizes(model_config: PretrainedConfig) -> tuple[int, int, int]:
    """Width, heads, feed-forward width."""
    names = FAMILIES.get(model_config.model_type, _BERT)
    return model_config.hidden_size, model_config.num_attention_heads, getattr(model_config, names.ffn)


def _student_config(teacher: PreTrainedModel, spec: config.Student) -> PretrainedConfig:
    """The teacher's configuration with the student's sizes."""
    if spec.layers < 1:
        raise UserError(f"student.layers is {spec.layers}; must be at least 1")
    hidden, heads, ffn = (
        theirs if mine is None else mine for mine, theirs in zip((spec.hidden, spec.heads, spec.ffn), _sizes(teacher.config))
    )
    if spec.init != "random":
        for key, mine, theirs in zip(("hidden", "heads", "ffn"), (hidden, heads, ffn), _sizes(teacher.config)):
            if mine > theirs:
                raise UserError(
                    f"student.{key} is {mine}, the teacher's is {theirs}: more than there is to copy from; "
                    "use less, or student.init=random"
                )
    if hidden % heads:
        raise UserError(f"student.hidden is {hidden}, which {heads} heads do not divide evenly (student.heads)")
    sizes = copy.deepcopy(teacher.config)
    sizes.num_hidden_layers, sizes.hidden_size, sizes.num_attention_heads = spec.layers, hidden, heads
    setattr(sizes, FAMILIES.get(sizes.model_type, _BERT).ffn, ffn)
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = sizes.layer_types[: spec.layers]
    for key, value in {"attention_head_size": hidden // heads, "pooler_hidden_size": hidden}.items():  # DeBERTa
        if hasattr(sizes, key):
            setattr(sizes, key, value)
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
        shorter.layer_types = shorter.layer_types[: len(source)]
    state, seen = {}, set()
    for name, value in teacher.state_dict().items():
        match = LAYER.match(name)
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


# ---- experimental
FIT = "ls"
FFN = "norm"
FFN_MEAN = True
GROUP = "merge"
ROTATE = True
WEIGH = True
WEIGHV = True
SCALE = False


@dataclass
class _Seen:
    embedded: torch.Tensor
    inputs: list
    attended: list
    outputs: list
    active: list  # mean, mean square


@torch.inference_mode()
def _watch(teacher, names, source, ids, mask):
    keep = mask.bool()
    layers = [teacher.get_submodule(f"{names.layers}.{t - 1}") for t in source]
    found = {}
    hooks = []

    def tap(module, key, of_input=False, stats=False):
        def hook(m, inputs, output):
            x = (inputs[0] if of_input else output)[keep].float()
            found[key] = (x.mean(0), x.square().mean(0)) if stats else x
        hooks.append(module.register_forward_hook(hook))

    tap(teacher.get_submodule("embeddings.LayerNorm"), "embedded")
    for i, layer in enumerate(layers):
        tap(layer.get_submodule(names.query[0]), ("in", i), True)
        tap(layer.get_submodule(names.norms[0]), ("att", i))
        tap(layer.get_submodule(names.norms[1]), ("out", i))
        tap(layer.get_submodule(names.down), ("act", i), True, True)
    try:
        teacher(input_ids=ids, attention_mask=mask)
    finally:
        for h in hooks:
            h.remove()
    n = range(len(source))
    return _Seen(found["embedded"], [found["in", i] for i in n], [found["att", i] for i in n], [found["out", i] for i in n], [found["act", i] for i in n])


def _basis(states, width, extra=()):
    size = states[0].shape[1]
    moment = torch.zeros(size, size, dtype=torch.float64)
    for x in states:
        x = x.double()
        c = x.T @ x
        moment += c / c.trace()
    if not ROTATE:
        return torch.linalg.eigh(moment)[1].flip(1)[:, :width].float()
    ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    rest = moment - ones @ (ones.T @ moment)
    rest = rest - (rest @ ones) @ ones.T
    top = torch.linalg.eigh(rest)[1].flip(1)[:, : width - 1]
    basis = torch.cat([ones, top], 1)
    # Householder: e1 <-> 1/sqrt(width)
    v = torch.full((width, 1), -(width**-0.5), dtype=torch.float64)
    v[0] += 1
    basis = basis - 2 * (basis @ v) @ v.T / (v.T @ v)
    return basis.float()


def _root(moment):
    moment = moment + 1e-6 * moment.trace() / len(moment) * torch.eye(len(moment), dtype=moment.dtype)
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _reduce(left, right, size):
    n = len(left)
    a, b = _root(left.double()), _root(right.double())
    u, s, v = torch.linalg.svd(a @ b)
    r = min(size, n)
    tl = (v[:r] @ b) / s[:r, None].sqrt()
    tr = (u[:, :r].T @ a) / s[:r, None].sqrt()
    tl, tr = tl.float(), tr.float()
    if size > n:
        tl = torch.cat([tl, torch.randn(size - n, n) * n**-0.5 * 0.1])
        tr = torch.cat([tr, torch.zeros(size - n, n)])
    return tl, tr


def _narrow(teacher, source, wide, start, how, sample):
    names = FAMILIES[teacher.config.model_type]
    (width, heads, ffn), (new_width, new_heads, new_ffn) = _sizes(wide.config), _sizes(start.config)
    size, new_size = width // heads, new_width // new_heads
    state = {k: v.clone() for k, v in wide.state_dict().items()}
    if how == "random":
        raise NotImplementedError
    seen = basis = None
    if how == "pca":
        ids, mask = pad(sample, teacher.config.pad_token_id or 0)
        seen = _watch(teacher, names, source, ids, mask)
        if new_width < width:
            basis = _basis([seen.embedded, *seen.attended, *seen.outputs], new_width)
    elif new_width < width:
        basis = torch.eye(width, new_width)
    P = basis if basis is not None else torch.eye(width)
    for i in range(len(source)):
        pre = f"{names.layers}.{i}."
        g = lambda n: state[pre + n]
        if (new_heads, new_size) != (heads, size):
            Q, K, V, O = [], [], [], []
            qb, kb, vb = [], [], []
            ob = g(names.out + ".bias").clone()
            if how == "pca":
                x = seen.inputs[i]
                if basis is not None:
                    x = x @ P @ P.T
                q, k, v = (F.linear(x, g(n + ".weight"), g(n + ".bias")).unflatten(1, (heads, size)) for n in (names.query[0], names.key[0], names.value))
            W = {n: (g(n + ".weight").unflatten(0, (heads, size)), g(n + ".bias").unflatten(0, (heads, size))) for n in (names.query[0], names.key[0], names.value)}
            wo = g(names.out + ".weight").unflatten(1, (heads, size))
            if GROUP == "merge":
                groups = np.array_split(range(heads), new_heads)
            else:
                if how == "pca":
                    imp = [ (v[:, h] - v[:, h].mean(0)).square().sum() * 0 + ((v[:, h] - v[:, h].mean(0)) @ (P.T @ wo[:, h]).T).square().sum() for h in range(heads)]
                    order = sorted(torch.stack(imp).topk(new_heads).indices.tolist())
                else:
                    order = list(range(new_heads))
                groups = [[h] for h in order]
            for group in groups:
                group = list(group)
                n = len(group) * size
                cat = lambda t: t[:, group].reshape(len(t), n).double()
                if how == "pca":
                    if WEIGH:
                        tq, tk = _reduce(cat(q).T @ cat(q) / len(q), cat(k).T @ cat(k) / len(q), new_size)
                    else:
                        a = (W[names.query[0]][0][group].reshape(n, -1) @ P).double(); b = (W[names.key[0]][0][group].reshape(n, -1) @ P).double()
                        tq, tk = _reduce(a @ a.T, b @ b.T, new_size)
                    vv = cat(v); vm = vv.mean(0); vc = vv - vm
                    wog = wo[:, group].reshape(width, n)
                    po = (P.T @ wog).double()
                    if WEIGHV:
                        tv, to = _reduce(vc.T @ vc / len(vc), po.T @ po, new_size)
                    else:
                        wv_ = (W[names.value][0][group].reshape(n, -1) @ P).double()
                        tv, to = _reduce(wv_ @ wv_.T, po.T @ po, new_size)
                    ob += wog @ (vm.float() - to.T @ (tv @ vm.float()))
                else:
                    tq = tk = tv = to = torch.eye(new_size, n)
                    wog = wo[:, group].reshape(width, n)
                scale = (new_size / size) ** 0.5 / len(group)
                for t, n_, w_, b_, s in ((tq, names.query[0], Q, qb, scale), (tk, names.key[0], K, kb, 1), (tv, names.value, V, vb, 1)):
                    w_.append(t @ W[n_][0][group].reshape(n, -1) * s)
                    b_.append(t @ W[n_][1][group].reshape(n) * s)
                O.append(wog @ to.T)
            for n_, w_, b_ in ((names.query[0], Q, qb), (names.key[0], K, kb), (names.value, V, vb)):
                state[pre + n_ + ".weight"], state[pre + n_ + ".bias"] = torch.cat(w_), torch.cat(b_)
            state[pre + names.out + ".weight"] = torch.cat(O, 1); state[pre + names.out + ".bias"] = ob
        if new_ffn != ffn:
            wi, wd = g(names.up + ".weight"), g(names.down + ".weight")
            if FFN == "norm" or how != "pca":
                score = wi.norm(dim=1) * wd.norm(dim=0)
            else:
                m, sq = seen.active[i]
                score = (sq - m.square()).clamp(min=0).sqrt() * wd.norm(dim=0)
            kept = score.topk(new_ffn).indices.sort().values
            if how == "pca" and FFN_MEAN:
                gone = torch.ones(ffn, dtype=bool); gone[kept] = False
                state[pre + names.down + ".bias"] = g(names.down + ".bias") + wd[:, gone] @ seen.active[i][0][gone]
            state[pre + names.up + ".weight"] = wi[kept]
            state[pre + names.up + ".bias"] = g(names.up + ".bias")[kept]
            state[pre + names.down + ".weight"] = wd[:, kept]
    if basis is not None:
        for n_, t in state.items():
            if n_.startswith("embeddings.") and not "LayerNorm" in n_:
                state[n_] = t @ P
            elif "LayerNorm" in n_ or "layer_norm" in n_:
                state[n_] = t[:new_width] if how == "truncate" else (P.square().T @ t * ((width / new_width) ** 0.5 if SCALE else 1) if n_.endswith("weight") else P.T @ t)
            elif n_.endswith((names.out + ".weight", names.out + ".bias", names.down + ".weight", names.down + ".bias")):
                state[n_] = P.T @ t
            elif n_.endswith(".weight"):
                state[n_] = t @ P
            if n_.startswith("pooler"):
                state[n_] = P.T @ t if n_.endswith("bias") else P.T @ t @ P
    start.load_state_dict(state)
    if basis is not None and how == "pca" and FIT != "none":
        _fit(start, names, seen, P, ids, mask)
    return start


@torch.inference_mode()
def _fit(student, names, seen, P, ids, mask):
    keep = mask.bool()
    hooks = []

    def fit(norm, target):
        t = (target @ P).double()

        def hook(m, inputs, output):
            x = inputs[0]
            u = F.layer_norm(x, x.shape[-1:], eps=m.eps)
            uu = u[keep].double()
            um, tm = uu.mean(0), t.mean(0)
            uv = (uu - um).square().mean(0)
            if FIT == "ls":
                gain = ((uu - um) * (t - tm)).mean(0) / uv
            else:
                gain = ((t - tm).square().mean(0) / uv).sqrt()
            m.weight.data.copy_(gain.float()); m.bias.data.copy_((tm - gain * um).float())
            return F.layer_norm(x, x.shape[-1:], m.weight, m.bias, m.eps)
        hooks.append(norm.register_forward_hook(hook))

    fit(student.get_submodule("embeddings.LayerNorm"), seen.embedded)
    for i in range(len(seen.outputs)):
        layer = student.get_submodule(f"{names.layers}.{i}")
        fit(layer.get_submodule(names.norms[0]), seen.attended[i])
        fit(layer.get_submodule(names.norms[1]), seen.outputs[i])
    try:
        student(input_ids=ids, attention_mask=mask)
    finally:
        for h in hooks:
            h.remove()
