"""Pruning a tokenizer in memory."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kdlib.errors import UserError
from kdlib.models.tokenizer_files import save_tokenizer
from kdlib.pruning.tokenizer_json import new_ids, parse_tokenizer, prune_spec


def tokenizer_spec(tokenizer: PreTrainedTokenizerFast) -> dict:
    """The contents of the tokenizer's tokenizer.json."""
    if not tokenizer.is_fast:
        raise UserError(f"cannot prune a {type(tokenizer).__name__}: it is not a fast tokenizer")
    return parse_tokenizer(tokenizer.backend_tokenizer.to_str())


def prune_tokenizer(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer with only the tokens `ids` (ascending), numbered from 0.

    Normaliser, pre-tokenizer, decoder, casing and special tokens stay the same. Ids inside the post-processor are
    renumbered, since transformers 4 reads them from the file.
    """
    spec = prune_spec(tokenizer_spec(tokenizer), new_ids(ids))
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    # The copy gets the new backend; copying the old one would be slow.
    return copy.deepcopy(tokenizer, {id(tokenizer.backend_tokenizer): backend})


def save_pruned_tokenizer(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], folder: Path) -> None:
    """Write the tokenizer of `prune_tokenizer` to a folder."""
    save_tokenizer(prune_tokenizer(tokenizer, ids), folder)
