"""Families of models. All that kdlib knows of a family is its row here.

Neither torch nor transformers is imported, so that files can be pruned without them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdlib.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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

    Args:
        special_ids: the special ids of a config that names none.
        head: the head of a masked model; `newer_head`: that of a config with `legacy: false`.
        activation: the config's key for the head's activation; "": GELU.
        layers: the list of layers; the following names are relative to a layer.
        query: the projections of the queries; the first is the text's. `key`: those of the keys.
        value, out: the other two attention projections.
        up, down: the feed-forward projections.
        ffn: the config's key for the feed-forward width.
        positions_from_pad: whether position ids start after the pad id.
    """

    special_ids: dict[str, int]
    head: Head
    newer_head: Head | None = None
    activation: str = "hidden_act"
    layers: str = "encoder.layer"
    query: tuple[str, ...] = ("attention.self.query",)
    key: tuple[str, ...] = ("attention.self.key",)
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    ffn: str = "intermediate_size"
    positions_from_pad: bool = False
    row_tensors: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        heads = [head for head in (self.head, self.newer_head) if head]
        ends = [f"{h.owner}.bias" for h in heads] + [h.output for h in heads]
        ends += [h.output.removesuffix("weight") + "bias" for h in heads]
        object.__setattr__(self, "row_tensors", ("word_embeddings.weight", *dict.fromkeys(ends)))

    @property
    def attention(self) -> tuple[str, ...]:
        """All attention projections of a layer."""
        return (*self.query, *self.key, self.value, self.out)

    def has_rows(self, name: str) -> bool:
        """Whether a tensor of this name has a row for every token of the vocabulary."""
        return name.endswith(tuple(f".{end}" for end in self.row_tensors)) or name in self.row_tensors


_BERT_HEAD = Head("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions")
_ROBERTA = Family(
    {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    Head("lm_head.dense", "lm_head.layer_norm", "lm_head"), activation="", positions_from_pad=True,
)  # fmt: skip
FAMILIES = {
    "bert": Family({"pad_token_id": 0}, _BERT_HEAD),
    "xlm-roberta": _ROBERTA,
    "roberta": _ROBERTA,
    "distilbert": Family(
        {"pad_token_id": 0}, Head("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.weight"),
        activation="activation", layers="transformer.layer", query=("attention.q_lin",), key=("attention.k_lin",),
        value="attention.v_lin", out="attention.out_lin", up="ffn.lin1", down="ffn.lin2", ffn="hidden_dim",
    ),
    "deberta-v2": Family(
        {"pad_token_id": 0}, _BERT_HEAD,
        Head("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm", "lm_predictions.lm_head"),
        query=("attention.self.query_proj", "attention.self.pos_query_proj"),
        key=("attention.self.key_proj", "attention.self.pos_key_proj"), value="attention.self.value_proj",
    ),
}  # fmt: skip


def family_of(kind: str, where: str = "this model") -> Family:
    """The row of a `model_type`. Raises UserError with the known families for an unknown one."""
    if kind not in FAMILIES:
        raise UserError(f"{where}: a model of kind {kind!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def positions(config: PreTrainedConfig) -> int:
    """The number of tokens a text may have."""
    shift = config.pad_token_id + 1 if family_of(config.model_type).positions_from_pad else 0
    return config.max_position_embeddings - shift
