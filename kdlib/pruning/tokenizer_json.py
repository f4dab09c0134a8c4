"""Prune a tokenizer as JSON."""

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from kdlib.errors import UserError

if TYPE_CHECKING:
    pass


def read_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for other JSON."""
    found = from_json(text, cache_strings="none")  # twice as fast as json for a million strings
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def new_ids(ids: Sequence[int]) -> dict[int, int]:
    """The new id of each kept id."""
    return {old: i for i, old in enumerate(sorted(int(i) for i in ids))}


def parse_tokenizer(text: str | bytes) -> dict[str, Any]:
    """Parse a tokenizer.json. Raises UserError for a kind that cannot be pruned."""
    collecting = gc.isenabled()
    gc.disable()  # garbage collection of so many new objects would take nine tenths of the time
    try:
        spec = read_object(text)
    finally:
        if collecting:
            gc.enable()
    model = spec["model"]
    if model["type"] not in ("Unigram", "WordPiece", "BPE"):
        raise UserError(f"cannot prune a {model['type']} tokenizer; supported are Unigram, WordPiece and BPE")
    marks = (model.get("continuing_subword_prefix") or "") + (model.get("end_of_word_suffix") or "")
    if marks != ("##" if model["type"] == "WordPiece" else ""):
        raise UserError(f"cannot prune a {model['type']} tokenizer that marks parts of words by {marks!r}")
    return spec


def prune_spec(spec: dict, new: dict[int, int]) -> dict:
    """Reduce the contents of a tokenizer.json, in place, to the tokens that `new` numbers."""
    model = spec["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][i] for i in new if i < len(model["vocab"])]
        if model["unk_id"] is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    if model["type"] == "BPE":
        kept = model["vocab"]
        pairs = map(merged_pair, model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if a in kept and b in kept and a + b in kept]
    spec["added_tokens"] = [{**token, "id": new[token["id"]]} for token in spec["added_tokens"] if token["id"] in new]
    spec["post_processor"] = _renumber(spec["post_processor"], new)
    if spec.get("padding"):  # left on by an earlier call
        spec["padding"]["pad_id"] = new.get(spec["padding"]["pad_id"], 0)
    return spec


def _renumber(node, new: dict[int, int]):
    """A post-processor with its token ids renumbered at any depth."""
    if isinstance(node, dict):
        out = {key: _renumber(value, new) for key, value in node.items()}
        if isinstance(node.get("ids"), list):  # TemplateProcessing
            out["ids"] = [new[i] for i in node["ids"]]
        for key in ("sep", "cls"):  # BertProcessing, RobertaProcessing: ["</s>", 2]
            if isinstance(node.get(key), list):
                out[key] = [node[key][0], new[node[key][1]]]
        return out
    return [_renumber(item, new) for item in node] if isinstance(node, list) else node


def merged_pair(merge: str | list[str]) -> tuple[str, str]:
    """The two tokens that a merge joins."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
