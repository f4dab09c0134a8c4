"""Pruning a model's folder as files: nothing is loaded, and neither torch nor transformers is needed for it.

The embedding rows of kept pieces are copied out of the safetensors files, and the tokenizer is renumbered as the JSON
that it is. Which pieces to keep, pruning in memory, and the proof that nothing changed: `vocabulary`.
"""

import gc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from kdlib.errors import UserError
from kdlib.store import new_folder, write_json
from kdlib.weights import HEAD_FILE, copy_tensors, read_header, runs, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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


def prune_files(
    source: str | Path, target: str | Path, ids: Sequence[int], tokenizer: "PreTrainedTokenizerFast | None" = None
) -> None:
    """Write to `target` what `prune_model` and `prune_tokenizer` make of the model folder `source`; no model is built.

    Of tensors by vocabulary the rows `ids` are read from the safetensors files (one, or shards with an index), all
    other tensors are copied byte for byte: each keeps its name and data type, and memory is what a buffer takes.
    tokenizer: the full one, if it is at hand; else it is read from `source`. `target` is whole or absent; an older
    folder there is replaced. Raises UserError for a source that is no such folder or of no known kind.
    """
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise UserError(f"{target}: cannot be pruned into itself")
    tensors, settings = stored_tensors(source), _config(source)
    old_rows = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("word_embeddings.weight")}
    if len(old_rows) != 1:
        raise UserError(f"{source}: must have one tensor word_embeddings.weight")
    new, old_pad = new_ids(ids), settings["pad_token_id"]
    check_rows(new, min(old_rows))
    settings |= renumbered(settings, new)
    kept = runs(list(new))
    rows = {name: kept for name, t in tensors.items() if BY_ROW.fullmatch(name) and t.shape[0] in old_rows}
    if "roberta" in settings["model_type"]:  # positions are numbered from the pad id on: as in `prune_model`
        if settings["pad_token_id"] is None:
            raise UserError(f"{source}: the padding piece, {old_pad}, must be kept: positions are counted from its id")
        shift = old_pad - settings["pad_token_id"]
        settings["max_position_embeddings"] -= shift
        rows |= {n: [(shift, t.shape[0])] for n, t in tensors.items() if n.endswith("position_embeddings.weight")}
    with new_folder(target) as folder:
        write_json(folder / "config.json", settings)
        copy_tensors(folder / "model.safetensors", tensors, rows, {"format": "pt"})
        if (source / HEAD_FILE).is_file():
            head, metadata = read_header(source / HEAD_FILE)
            copy_tensors(folder / HEAD_FILE, head, {"bias": kept}, metadata)
        if tokenizer is not None or not _prune_stored_tokenizer(source, folder, new):
            from kdlib import vocabulary  # which builds tokenizers, for those whose files do not say all

            vocabulary.save_pruned_tokenizer(tokenizer or vocabulary.full_tokenizer(source), ids, folder)


def _config(source: Path) -> dict[str, Any]:
    """What the folder's config.json says, with the special ids that it leaves to its family."""
    try:
        settings = _read((source / "config.json").read_bytes())
        kind = str(settings["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source}: no config of a model ({str(error).splitlines()[0]})") from None
    if kind not in FAMILIES:
        raise UserError(f"{source}: a model of kind {kind!r}; known are {', '.join(FAMILIES)}")
    settings = {"max_position_embeddings": 512} | FAMILIES[kind] | settings
    for name in ("pad_token_id", "max_position_embeddings"):
        if type(settings[name]) is not int and (settings[name] is not None or "roberta" in kind):
            raise UserError(f"{source}: no config of a model ({name} is {settings[name]!r}, must be a whole number)")
    return settings


def _read(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError for what is none."""
    found = from_json(text, cache_strings="none")  # twice as fast as json's, where there are a million strings
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def new_ids(ids: Sequence[int]) -> dict[int, int]:
    """The new id of each kept one, ascending."""
    return {old: i for i, old in enumerate(sorted(int(i) for i in ids))}


def check_rows(new: dict[int, int], rows: int) -> None:
    """Raises UserError where a kept id has no embedding row."""
    if max(new) >= rows:
        raise UserError(f"the tokenizer has ids up to {max(new)}, the model only {rows} embedding rows")


def renumbered(settings: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    """What changes in a config: the vocabulary's size and the special ids."""
    special = {k: v for k, v in settings.items() if re.fullmatch(r"\w+_token_id", k) and isinstance(v, int)}
    return {"vocab_size": len(new)} | {key: new.get(value) for key, value in special.items()}


def _prune_stored_tokenizer(source: Path, target: Path, new: dict[int, int]) -> bool:
    """Write the pruned tokenizer of a folder from its tokenizer.json; False, with nothing written, where that file is
    absent or does not say all."""
    if any((source / name).exists() for name in ("added_tokens.json", "chat_template.jinja")):
        return False
    try:
        spec = parse_tokenizer((source / "tokenizer.json").read_bytes())
        files = [n for n in ("tokenizer_config.json", "special_tokens_map.json") if (source / n).is_file()]
        settings = {name: _read((source / name).read_bytes()) for name in files}
        vocabulary = spec["model"]["vocab"]
        if isinstance(vocabulary, dict):
            pieces = {i: piece for piece, i in vocabulary.items() if i in new}
        else:
            pieces = {i: vocabulary[i][0] for i in new if i < len(vocabulary)}
        pieces |= {token["id"]: token["content"] for token in spec["added_tokens"] if token["id"] in new}
        for described in settings.values():
            added = described.pop("added_tokens_decoder", None)
            if added is not None:
                kept = {int(i): token for i, token in added.items() if int(i) in new}
                if any(pieces[i] != token["content"] for i, token in kept.items()):
                    return False
                described["added_tokens_decoder"] = {str(new[i]): token for i, token in kept.items()}
        named = set().union(*map(_special_tokens, settings.values()))
        if len(pieces) < len(new) or not named <= set(pieces.values()):
            return False
        spec = prune_spec(spec, new) | {"truncation": None, "padding": None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # old formats
        return False
    for name, described in settings.items():
        write_json(target / name, portable(described))
    (target / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    return True


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json's contents under a class name that transformers 4 knows too, and without how it was
    loaded here."""
    unknown = settings.get("tokenizer_class") == "TokenizersBackend"
    settings = settings | ({"tokenizer_class": "PreTrainedTokenizerFast"} if unknown else {})
    return {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}


def _special_tokens(settings: dict[str, Any]) -> set[str]:
    """The tokens named in a tokenizer_config.json or special_tokens_map.json: a reader adds those it does not find."""
    found: list = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        more = settings.get(key) or []
        found += more.values() if isinstance(more, dict) else more
    return {
        value["content"] if isinstance(value, dict) else value for value in found if value not in (None, True, False)
    }


def parse_tokenizer(text: str | bytes) -> dict[str, Any]:
    """A tokenizer.json's contents, checked to be of a kind that can be pruned. Raises UserError for other kinds."""
    collecting = gc.isenabled()
    gc.disable()  # hundreds of thousands of new objects would set it off again and again, for nine tenths of the time
    try:
        spec = _read(text)
    finally:
        if collecting:
            gc.enable()
    model = spec["model"]
    if model["type"] not in ("Unigram", "WordPiece", "BPE"):
        raise UserError(f"cannot prune a {model['type']} tokenizer; known are Unigram, WordPiece and BPE")
    marks = (model.get("continuing_subword_prefix") or "") + (model.get("end_of_word_suffix") or "")
    if marks != ("##" if model["type"] == "WordPiece" else ""):
        raise UserError(f"cannot prune a {model['type']} tokenizer that marks parts of words by {marks!r}")
    return spec


def prune_spec(spec: dict, new: dict[int, int]) -> dict:
    """What a tokenizer.json holds, changed in place to the pieces that `new` numbers."""
    model = spec["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][i] for i in new if i < len(model["vocab"])]
        if model["unk_id"] is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {piece: new[i] for piece, i in model["vocab"].items() if i in new}
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
    """A post-processor with its token ids renumbered, whatever its type nests them in."""
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
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
