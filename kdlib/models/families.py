"""Families of models: what the kit knows of each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def positions(config: PreTrainedConfig) -> int:
    """How many tokens a text may have at most; RoBERTa and XLM-R number positions from after the pad id."""
    shift = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return config.max_position_embeddings - shift


# The families whose files are known, and the special ids that a config of theirs means where it names none.
FAMILIES = {
    "bert": {"pad_token_id": 0},
    "xlm-roberta": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "distilbert": {"pad_token_id": 0},
    "deberta-v2": {"pad_token_id": 0},
}
# Tensors with a row for every piece, by their names in the files of these families: the embeddings, and of the
# masked-language head the decoder (BERT and DeBERTa-v2; RoBERTa and XLM-R; DistilBERT) and the bias beside it.
BY_ROW = re.compile(
    r"(.+\.)?(word_embeddings\.weight|(predictions|lm_head)\.(bias|decoder\.(weight|bias))|vocab_projector\.(weight|bias))"
)
