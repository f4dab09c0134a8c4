"""Prune a model's folder as files, without loading the model. Needs neither torch nor transformers.

The embedding rows of kept tokens are copied out of the safetensors files. The tokenizer is renumbered as JSON.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlib.errors import UserError
from kdlib.files import new_folder, write_json
from kdlib.models.families import family_of, older_settings
from kdlib.models.safetensors_files import HEAD_FILE, copy_tensors, read_header, runs, stored_tensors
from kdlib.models.tokenizer_files import portable
from kdlib.pruning.tokenizer_json import new_ids, parse_tokenizer, prune_spec, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prune_files(
    source: str | Path, target: str | Path, ids: Sequence[int], tokenizer: "PreTrainedTokenizerFast | None" = None
) -> None:
    """Write the folder that `prune_model` and `prune_tokenizer` would give, without building a model.

    Rows are read from the safetensors files (one, or shards with an index) through a small buffer. All other tensors
    are copied byte for byte.

    Args:
        source: the model folder.
        target: the folder to write; it is complete or absent, and an older one is replaced.
        ids: token ids to keep, ascending.
        tokenizer: the full tokenizer, if it is loaded already.

    Raises:
        UserError: for a source that is no such folder or of an unknown kind.
    """
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise UserError(f"{target}: source and target are the same folder")
    tensors, settings = stored_tensors(source), _config(source)
    family = family_of(settings["model_type"])
    old_rows = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(family.words)}
    if len(old_rows) != 1:
        raise UserError(f"{source}: must have one tensor {family.words}")
    new, old_pad = new_ids(ids), settings["pad_token_id"]
    check_rows(new, min(old_rows))
    settings |= renumbered(settings, new)
    kept = runs(list(new))
    rows = {name: kept for name, t in tensors.items() if family.has_rows(name) and t.shape[0] in old_rows}
    if family.positions_from_pad:  # positions move with the pad id, as in `prune_model`
        if settings["pad_token_id"] is None:
            raise UserError(f"{source}: the padding token, {old_pad}, must be kept: positions are counted from its id")
        shift = old_pad - settings["pad_token_id"]
        settings["max_position_embeddings"] -= shift
        rows |= {n: [(shift, t.shape[0])] for n, t in tensors.items() if n.endswith("position_embeddings.weight")}
    with new_folder(target) as folder:
        write_json(folder / "config.json", settings | older_settings(settings))
        copy_tensors(folder / "model.safetensors", tensors, rows, {"format": "pt"})
        if (source / HEAD_FILE).is_file():
            head, metadata = read_header(source / HEAD_FILE)
            copy_tensors(folder / HEAD_FILE, head, {"bias": kept}, metadata)
        if tokenizer is not None or not _prune_stored_tokenizer(source, folder, new):
            from kdlib.models.tokenizer_files import (
                full_tokenizer,  # builds tokenizers, for those whose files are incomplete
            )
            from kdlib.pruning.tokenizer import save_pruned_tokenizer

            save_pruned_tokenizer(tokenizer or full_tokenizer(source), ids, folder)


def _config(source: Path) -> dict[str, Any]:
    """The folder's config.json, with the special ids that it leaves to its family's defaults."""
    try:
        settings = read_object((source / "config.json").read_bytes())
        kind = str(settings["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source}: no config of a model ({str(error).splitlines()[0]})") from None
    family = family_of(kind, str(source))
    settings = {"max_position_embeddings": 512} | family.special_ids | settings
    for name in ("pad_token_id", "max_position_embeddings"):
        if type(settings[name]) is not int and (settings[name] is not None or family.positions_from_pad):
            raise UserError(f"{source}: no config of a model ({name} is {settings[name]!r}, must be a whole number)")
    return settings


def check_rows(new: dict[int, int], rows: int) -> None:
    """Raise UserError where a kept id has no embedding row."""
    if max(new) >= rows:
        raise UserError(f"the tokenizer has ids up to {max(new)}, the model only {rows} embedding rows")


def renumbered(settings: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    """The fields of a config that pruning changes: vocabulary size and special ids, of which some are lists."""
    special = {k: v for k, v in settings.items() if re.fullmatch(r"\w+_token_id", k) and isinstance(v, int | list)}
    return {"vocab_size": len(new)} | {
        key: [new[i] for i in value if i in new] if isinstance(value, list) else new.get(value)
        for key, value in special.items()
    }


def _prune_stored_tokenizer(source: Path, target: Path, new: dict[int, int]) -> bool:
    """Prune the tokenizer.json of a folder. False, with nothing written, where the file is absent or incomplete."""
    if any((source / name).exists() for name in ("added_tokens.json", "chat_template.jinja")):
        return False
    try:
        spec = parse_tokenizer((source / "tokenizer.json").read_bytes())
        files = [n for n in ("tokenizer_config.json", "special_tokens_map.json") if (source / n).is_file()]
        settings = {name: read_object((source / name).read_bytes()) for name in files}
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, dict):
            tokens = {i: token for token, i in vocab.items() if i in new}
        else:
            tokens = {i: vocab[i][0] for i in new if i < len(vocab)}
        tokens |= {token["id"]: token["content"] for token in spec["added_tokens"] if token["id"] in new}
        for described in settings.values():
            added = described.pop("added_tokens_decoder", None)
            if added is not None:
                kept = {int(i): token for i, token in added.items() if int(i) in new}
                if any(tokens[i] != token["content"] for i, token in kept.items()):
                    return False
                described["added_tokens_decoder"] = {str(new[i]): token for i, token in kept.items()}
        named = set().union(*map(_special_tokens, settings.values()))
        if len(tokens) < len(new) or not named <= set(tokens.values()):
            return False
        spec = prune_spec(spec, new) | {"truncation": None, "padding": None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # old formats
        return False
    for name, described in settings.items():
        write_json(target / name, portable(described))
    (target / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    return True


def _special_tokens(settings: dict[str, Any]) -> set[str]:
    """The tokens named in a tokenizer_config.json or special_tokens_map.json: a reader adds those it does not find."""
    found: list = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        more = settings.get(key) or []
        found += more.values() if isinstance(more, dict) else more
    return {
        value["content"] if isinstance(value, dict) else value for value in found if value not in (None, True, False)
    }
