"""Tokenizers and their files, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlib.data.lazy import parts
from kdlib.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer without the truncation left by calls, under a class name that transformers 4 knows."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = portable(json.loads(file.read_text("utf-8")))
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")


def token_list(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokenizer's tokens by id."""
    vocabulary = tokenizer.get_vocab()
    tokens = [""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        tokens[index] = token
    return tokens


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], batch: int = 4096) -> Iterator[list[int]]:
    """The token ids of each text, without special tokens; `batch` texts are read at a time."""
    backend = tokenizer.backend_tokenizer
    for part in parts(texts, batch):
        backend.no_padding()  # an earlier call may have left it on
        backend.no_truncation()
        for encoding in backend.encode_batch_fast(part, add_special_tokens=False):
            yield encoding.ids


def full_tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, as transformers builds it. Raises UserError where none can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the readers raise a dozen kinds; people need one line
        raise UserError(f"{source}: no tokenizer that can be read ({str(error).splitlines()[0]})") from None


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of a tokenizer_config.json in a form that transformers 4 can read.

    The class name is one that version 4 knows. How the tokenizer was loaded is left out.
    """
    unknown = settings.get("tokenizer_class") == "TokenizersBackend"
    settings = settings | ({"tokenizer_class": "PreTrainedTokenizerFast"} if unknown else {})
    return {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
