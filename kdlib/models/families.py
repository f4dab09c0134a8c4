"""Families of models. All that kdlib knows of a family is its row here.

Neither torch nor transformers is imported, so that files can be pruned without them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kdlib.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LOCAL = "sliding_attention"  # the kind of a layer whose tokens see only their neighbours


@dataclass(frozen=True)
class Head:
    """The names of a masked-language head in checkpoints: dense layer, norm, owner of the bias, output matrix."""

    dense: str
    norm: str
    owner: str
    decoder: str = ""

    @property
    def output(self) -> str:
        """The output matrix, with a row for every token."""
        return self.decoder or f"{self.owner}.decoder.weight"


@dataclass(frozen=True)
class Family:
    """A family of models, named by transformers' `model_type`.

    A name that ends in a number is that part of a fused matrix: "attn.Wqkv.1" has the second third of its rows.

    Args:
        special_ids: the special ids of a config that names none.
        head: the head of a masked model; `newer_head`: that of a config with `legacy: false`; None: a head that kdlib
            does not read.
        activation: the config's key for the head's activation; "": GELU.
        words: the end of the name of the word embeddings, which have a row for every token; `output`: of other tensors
            that have.
        layers: the list of layers; the following names are relative to a layer.
        query: the projections of the queries; the first is the text's. `key`: those of the keys.
        value, out: the other two attention projections.
        up, down: the feed-forward projections; `up` names both of a gated layer.
        ffn: the config's key for the feed-forward width.
        positions_from_pad: whether position ids start after the pad id.
        states: "" where layers end with a norm (BERT). Else states between layers have no norm yet, and are compared
            after "layer" (LayerNorm) or "rms" (RMSNorm).
        rotary: whether queries and keys are rotated by their position.
        first_stays: whether the first layer differs from the others, so that a student's first is copied from it.
    """

    special_ids: dict[str, int]
    head: Head | None
    newer_head: Head | None = None
    activation: str = "hidden_act"
    words: str = "word_embeddings.weight"
    output: tuple[str, ...] = ()
    layers: str = "encoder.layer"
    query: tuple[str, ...] = ("attention.self.query",)
    key: tuple[str, ...] = ("attention.self.key",)
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    up: tuple[str, ...] = ("intermediate.dense",)
    down: str = "output.dense"
    ffn: str = "intermediate_size"
    positions_from_pad: bool = False
    states: str = ""
    rotary: bool = False
    first_stays: bool = False
    row_tensors: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        heads = [head for head in (self.head, self.newer_head) if head]
        ends = [f"{h.owner}.bias" for h in heads] + [h.output for h in heads]
        ends += [h.output.removesuffix("weight") + "bias" for h in heads]
        object.__setattr__(self, "row_tensors", (self.words, *dict.fromkeys(ends), *self.output))

    @property
    def attention(self) -> tuple[str, ...]:
        """All attention projections of a layer."""
        return (*self.query, *self.key, self.value, self.out)

    @property
    def fused(self) -> dict[str, list[str]]:
        """The fused matrices of a layer, and the names of their parts."""
        found: dict[str, list[str]] = {}
        for name in (*self.query, *self.key, self.value, *self.up):
            whole, _, part = name.rpartition(".")
            if part.isdigit():
                found.setdefault(whole, []).append(name)
        return found

    def has_rows(self, name: str) -> bool:
        """Whether a tensor of this name has a row for every token of the vocabulary."""
        return name.endswith(tuple(f".{end}" for end in self.row_tensors)) or name in self.row_tensors


_BERT_HEAD = Head("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions")
_ROBERTA_HEAD = Head("lm_head.dense", "lm_head.layer_norm", "lm_head")
_ROBERTA = Family(
    {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, _ROBERTA_HEAD, activation="", positions_from_pad=True
)
_LLAMA_LAYERS = dict(  # as gte and EuroBERT have them, too
    layers="layers", query=("self_attn.q_proj",), key=("self_attn.k_proj",), value="self_attn.v_proj",
    out="self_attn.o_proj", up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj", rotary=True,
)  # fmt: skip
FAMILIES = {
    "bert": Family({"pad_token_id": 0}, _BERT_HEAD),
    "xlm-roberta": _ROBERTA,
    "roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "xlm-roberta-xl": replace(_ROBERTA, states="layer"),
    "distilbert": Family(
        {"pad_token_id": 0}, Head("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.weight"),
        activation="activation", layers="transformer.layer", query=("attention.q_lin",), key=("attention.k_lin",),
        value="attention.v_lin", out="attention.out_lin", up=("ffn.lin1",), down="ffn.lin2", ffn="hidden_dim",
    ),
    "deberta-v2": Family(
        {"pad_token_id": 0}, _BERT_HEAD,
        Head("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm", "lm_predictions.lm_head"),
        query=("attention.self.query_proj", "attention.self.pos_query_proj"),
        key=("attention.self.key_proj", "attention.self.pos_key_proj"), value="attention.self.value_proj",
    ),
    "electra": Family(
        {"pad_token_id": 0},
        Head("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head",
             "generator_lm_head.weight"),
        activation="",
    ),
    "mpnet": Family(
        {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, _ROBERTA_HEAD, activation="",
        positions_from_pad=True, query=("attention.attn.q",), key=("attention.attn.k",), value="attention.attn.v",
        out="attention.attn.o",
    ),
    "rembert": Family(
        {"pad_token_id": 0, "bos_token_id": 312, "eos_token_id": 313}, None,
        output=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    ),
    "modernbert": Family(
        {"pad_token_id": 50283, "bos_token_id": 50281, "eos_token_id": 50282, "cls_token_id": 50281,
         "sep_token_id": 50282},
        Head("head.dense", "head.norm", "decoder", "decoder.weight"), activation="classifier_activation",
        words="tok_embeddings.weight", layers="layers", query=("attn.Wqkv.0",), key=("attn.Wqkv.1",),
        value="attn.Wqkv.2", out="attn.Wo", up=("mlp.Wi.0", "mlp.Wi.1"), down="mlp.Wo", states="layer", rotary=True,
        first_stays=True,
    ),
    "eurobert": Family(
        {"pad_token_id": 128001, "bos_token_id": 128000, "eos_token_id": 128001, "mask_token_id": 128002}, None,
        words="embed_tokens.weight", output=("lm_head.weight", "lm_head.bias"), states="rms", **_LLAMA_LAYERS,
    ),
    "gte": Family({"pad_token_id": 1}, _ROBERTA_HEAD, activation="", **_LLAMA_LAYERS),
}  # fmt: skip


def family_of(kind: str, where: str = "this model") -> Family:
    """The row of a `model_type`. Raises UserError with the known families for an unknown one."""
    if kind not in FAMILIES:
        more = "; gte-multilingual has a version in this format, alibaba-nlp-community/gte-multilingual-base"
        raise UserError(
            f"{where}: a model of kind {kind!r}; supported are {', '.join(FAMILIES)}{more if kind == 'new' else ''}"
        )
    return FAMILIES[kind]


def layer_kinds(config: PreTrainedConfig) -> list[str] | None:
    """The kind of attention of each layer, global ("full_attention") or LOCAL; None where all are alike."""
    kinds = getattr(config, "layer_types", None)
    return list(kinds) if kinds and len(set(kinds)) > 1 else None


def older_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 has to find in a ModernBERT's config.json; version 5 has other names for it.

    Version 4 knows global layers by one number only, each n-th. Layers in another order have no such number; version 5
    alone reads them right.
    """
    kinds, rotations = settings.get("layer_types"), settings.get("rope_parameters")
    if settings.get("model_type") != "modernbert" or not kinds or not rotations:
        return {}
    places = [i for i, kind in enumerate(kinds) if kind != LOCAL]
    step = places[1] if len(places) > 1 else max(len(kinds), settings.get("global_attn_every_n_layers") or 1)
    found = {"global_attn_every_n_layers": step} if places == list(range(0, len(kinds), step)) else {}
    for key, kind in (("global_rope_theta", "full_attention"), ("local_rope_theta", LOCAL)):
        if (rotations.get(kind) or {}).get("rope_theta"):
            found[key] = rotations[kind]["rope_theta"]
    return found


def positions(config: PreTrainedConfig) -> int:
    """The number of tokens a text may have."""
    shift = config.pad_token_id + 1 if family_of(config.model_type).positions_from_pad else 0
    return config.max_position_embeddings - shift
