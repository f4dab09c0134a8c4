"""Vocabulary pruning: fewer embedding rows, the same token sequences and the same hidden states.

A multilingual vocabulary holds the words of a hundred languages; one language uses a small part of it. The
pieces that a corpus and a word list use are kept, with every special token and the single characters that
any unseen word can be spelled with; tokenizer and embeddings are renumbered together.
"""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from fontTools import unicodedata as unicode_scripts
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from kdlib.encoder import Encoder
from kdlib.errors import UserError

NEUTRAL_SCRIPTS = {"Zyyy", "Zinh"}  # digits, punctuation, symbols, emoji; combining marks
SPACE_MARKS = ("▁", "##", "Ġ")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # pieces that spell unknown characters byte by byte


@dataclass
class Selection:
    """Which pieces stay, and why.

    ids: kept token ids of the full tokenizer, ascending; a piece's place in this list is its new id.
    reason: for each kept id "special", "corpus", "character", "wordlist" or "merge" (a BPE piece that others are
        built of).
    counts: int64 [vocabulary], how often the corpus uses each piece of the full vocabulary.
    dropped: how many pieces the corpus uses that `max_rows` left no room for; 0 means exact on every corpus text.
    """

    ids: list[int]
    reason: dict[int, str]
    counts: np.ndarray
    dropped: int


def piece_list(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokenizer's pieces by id."""
    pieces = [""] * (max(tokenizer.get_vocab().values()) + 1)
    for piece, index in tokenizer.get_vocab().items():
        pieces[index] = piece
    return pieces


def count_pieces(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], batch: int = 4096) -> np.ndarray:
    """How often each piece occurs in `texts`: int64 [vocabulary]; special tokens are not added."""
    counts = np.zeros(len(piece_list(tokenizer)), np.int64)
    pending: list[str] = []

    def flush() -> None:
        if not pending:
            return
        # The public call, not the backend: it switches off any padding that an earlier call left on.
        for ids in tokenizer(pending, add_special_tokens=False, verbose=False).input_ids:
            np.add.at(counts, ids, 1)
        pending.clear()

    for text in texts:
        pending.append(text)
        if len(pending) == batch:
            flush()
    flush()
    return counts


def script_of(piece: str) -> set[str]:
    """Unicode scripts (ISO 15924 codes) of a piece, without digits, punctuation, symbols and combining marks."""
    return {unicode_scripts.script(char) for char in _bare(piece)} - NEUTRAL_SCRIPTS


def _bare(piece: str) -> str:
    if BYTE.fullmatch(piece):
        return ""
    for mark in SPACE_MARKS:
        if piece.startswith(mark) and len(piece) > len(mark):
            return piece[len(mark) :]
    return piece


def word_list(language: str, size: int | None = None) -> list[str]:
    """wordfreq's words for a language, most frequent first, each followed by its capitalised form.

    `language`: any ISO 639 code ("tgl", "ceb", "id"); `size`: at most so many words, default all. A language
    that wordfreq does not have gives an empty list: then the corpus alone decides. Raises UserError for what is no
    code.
    """
    import langcodes
    import wordfreq

    try:
        code, distance = langcodes.closest_match(language, list(wordfreq.available_languages()), max_distance=9)
    except langcodes.LanguageTagError:
        raise UserError(f"language {language!r} is not an ISO 639 code (such as tgl, ceb or id)") from None
    if code == "und":
        return []
    words = wordfreq.top_n_list(code, 10**9)[:size]
    return [form for word in words for form in dict.fromkeys((word, word.capitalize()))]


def select(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    words: Sequence[str] = (),
    extra: Sequence[str] = (),
    characters: str = "scripts",
    max_rows: int | None = None,
) -> Selection:
    """Choose the pieces to keep.

    Order of claim: special tokens; single characters (so that no word in their scripts falls to the unknown token
    more often than before); the pieces of `extra` (prefixes) and of `texts`; then the words of `words`, in their
    order, until `max_rows` is reached. Only if the first three exceed `max_rows` are corpus pieces left out, rarest
    first.

    characters: "scripts" keeps single characters of every script that `texts` use and all script-neutral ones
    (digits, punctuation, symbols, emoji); "all" keeps those of every script (13,828 in XLM-R, most of them Chinese).

    Raises UserError if `texts` is empty or `max_rows` has no room for the special tokens and characters.
    """
    model = _model(tokenizer)
    kind = model["type"]
    pieces = piece_list(tokenizer)
    counts = count_pieces(tokenizer, texts)
    if not counts.any():
        raise UserError("vocabulary: the corpus has no text to choose pieces by")
    reason: dict[int, str] = {}

    def claim(ids: Iterable[int], why: str, limit: int | None = None) -> bool:
        """Keep `ids` unless they exceed `limit`; says whether they fitted."""
        new = asked = {i: None for i in ids if i not in reason}
        if kind == "BPE":
            new = ancestors.closure(asked, reason)
        if limit is not None and len(reason) + len(new) > limit:
            return False
        for i in new:
            reason[i] = why if i in asked else "corpus" if counts[i] else "merge"
        return True

    ancestors = _Merges(tokenizer) if kind == "BPE" else None
    claim(sorted(_specials(tokenizer, model)), "special")
    used = np.flatnonzero(counts)
    scripts = set().union(*(script_of(pieces[i]) for i in used if i not in reason)) | NEUTRAL_SCRIPTS
    claim(
        (
            i
            for i, p in enumerate(pieces)
            if _is_character(p, kind) and (characters == "all" or _in_scripts(p, scripts, kind))
        ),
        "character",
    )
    claim((i for text in extra for i in tokenizer(text, add_special_tokens=False).input_ids), "corpus")
    if max_rows is not None and len(reason) > max_rows:
        raise UserError(
            f"vocabulary.max_rows is {max_rows:,}; special tokens and single characters alone need {len(reason):,}"
        )
    dropped = 0
    for i in sorted(used, key=lambda i: -counts[i]):
        if int(i) not in reason and not claim([int(i)], "corpus", max_rows):
            dropped += 1
    for piece_ids in tokenizer(list(words), add_special_tokens=False).input_ids if words else ():
        if not claim(piece_ids, "wordlist", max_rows):
            break
    return Selection(sorted(reason), reason, counts, dropped)


def _specials(tokenizer: PreTrainedTokenizerFast, model: dict) -> set[int]:
    """Special tokens, declared or not: also the model's unknown token and what the post-processor puts around texts."""
    unknown = model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model["unk_token"])
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    around = tokenizer("").input_ids + tokenizer("", "").input_ids
    return {*tokenizer.all_special_ids, *added, *around} | ({unknown} - {None})


def _is_character(piece: str, kind: str) -> bool:
    if kind == "WordPiece" and piece.startswith("##"):
        return len(piece) == 3
    return len(piece) == 1 or BYTE.fullmatch(piece) is not None


def _in_scripts(piece: str, scripts: set[str], kind: str) -> bool:
    # Byte-level BPE spells every byte with a letter of its own: those letters say nothing about scripts.
    return kind == "BPE" or script_of(piece) <= scripts


class _Merges:
    """Which pieces a BPE piece is merged from."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        model = _model(tokenizer)
        self.parents: dict[int, set[int]] = {}
        vocabulary = model["vocab"]
        for left, right in map(_pair, model["merges"]):
            if left + right in vocabulary:
                self.parents.setdefault(vocabulary[left + right], set()).update((vocabulary[left], vocabulary[right]))

    def closure(self, ids: Iterable[int], known: dict[int, str]) -> list[int]:
        """`ids` and all that they are merged from, without those already known."""
        found: dict[int, None] = {}
        waiting = list(ids)
        while waiting:
            i = waiting.pop()
            if i not in known and i not in found:
                found[i] = None
                waiting.extend(self.parents.get(i, ()))
        return list(found)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _model(tokenizer: PreTrainedTokenizerFast) -> dict:
    if not tokenizer.is_fast:
        raise UserError(f"cannot prune a {type(tokenizer).__name__}: it is not a fast tokenizer")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] not in ("Unigram", "WordPiece", "BPE"):
        raise UserError(f"cannot prune a {model['type']} tokenizer; known are Unigram, WordPiece and BPE")
    marks = (model.get("continuing_subword_prefix") or "") + (model.get("end_of_word_suffix") or "")
    if marks != ("##" if model["type"] == "WordPiece" else ""):
        raise UserError(f"cannot prune a {model['type']} tokenizer that marks parts of words by {marks!r}")
    return model


def prune_tokenizer(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer with only the pieces `ids` (ascending), numbered 0..len(ids)-1.

    Normaliser, pre-tokenizer, decoder, casing and special tokens stay as they were; the ids inside the
    post-processor are renumbered too, since transformers 4 reads them from the file.
    """
    ids = sorted(int(i) for i in ids)
    new = {old: i for i, old in enumerate(ids)}
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][i] for i in ids if i < len(model["vocab"])]
        if model["unk_id"] is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {piece: new[i] for piece, i in model["vocab"].items() if i in new}
    if model["type"] == "BPE":
        kept = model["vocab"]
        pairs = map(_pair, model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if a in kept and b in kept and a + b in kept]
    spec["added_tokens"] = [{**token, "id": new[token["id"]]} for token in spec["added_tokens"] if token["id"] in new]
    spec["post_processor"] = _renumber(spec["post_processor"], new)
    if spec["padding"]:  # left on by an earlier call
        spec["padding"]["pad_id"] = new.get(spec["padding"]["pad_id"], 0)
    pruned = copy.deepcopy(tokenizer)
    pruned._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    return pruned


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


def prune_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> PreTrainedModel:
    """The same model with only the embedding rows `ids`; decoder rows and bias go with them, ties stay tied.

    `tokenizer` is the full one: it says which special ids of the config to renumber. Hidden states of the
    pruned model on pruned ids equal the full model's bit for bit.
    """
    ids = sorted(int(i) for i in ids)
    new = {old: i for i, old in enumerate(ids)}
    rows = torch.tensor(ids)
    old_rows = model.get_input_embeddings().weight.shape[0]
    if ids[-1] >= old_rows:
        raise UserError(f"the tokenizer has ids up to {ids[-1]}, the model only {old_rows} embedding rows")
    config = copy.deepcopy(model.config)
    config.vocab_size = len(ids)
    for key, value in config.to_dict().items():
        if re.fullmatch(r"\w+_token_id", key) and isinstance(value, int):
            setattr(config, key, new.get(value))
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    by_row = {id(p) for p in (embedding, *(head.parameters() if head is not None else ())) if len(p) == old_rows}
    shifted = [  # RoBERTa numbers positions from the pad id on
        f"{name}.weight" for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]  # fmt: skip
    shift = model.config.pad_token_id - config.pad_token_id if shifted else 0
    if shift:
        config.max_position_embeddings -= shift
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        beside = name.endswith(("lm_head.bias", "predictions.bias"))  # a bias that need not be the head's own
        if id(value) in by_row or beside:
            value = value[rows]
        state[name] = (value[shift:] if name in shifted else value).detach()
    return with_state(type(model), config, state).train(model.training)


def with_state(kind: type[PreTrainedModel], config: AutoConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of class `kind` holding copies of `state`; ties are made again, every weight must be there."""
    model = kind._from_config(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise ValueError(f"weights do not fit {kind.__name__}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def main_script(piece: str) -> str:
    """The script a piece is written in, "neutral" for digits, punctuation and symbols, "mixed" for several."""
    scripts = script_of(piece)
    return "neutral" if not scripts else scripts.pop() if len(scripts) == 1 else "mixed"


def coverage_curve(selection: Selection, counts: np.ndarray, points: int = 40) -> list[tuple[int, float]]:
    """Share of a text's running tokens that the first n rows cover, for n up to the selection's size.

    Rows come in the order they would be claimed: special tokens and characters, then the corpus's pieces by frequency,
    then the word list's. counts: int [vocabulary], how often the text in question uses each piece.
    """
    first = [i for i in selection.ids if selection.reason[i] in ("special", "character")]
    by_use = sorted(
        (i for i in selection.ids if selection.reason[i] in ("corpus", "merge")), key=lambda i: -selection.counts[i]
    )
    rest = [i for i, why in selection.reason.items() if why == "wordlist"]
    covered = np.cumsum(counts[first + by_use + rest]) / max(1, counts.sum())
    sizes = np.unique(np.geomspace(max(1, len(first)), len(covered), points).round().astype(int))
    return [(int(size), float(covered[size - 1])) for size in sizes]


def prove(full: Encoder, pruned: Encoder, ids: np.ndarray, texts: list[str], states_of: int = 100) -> pd.DataFrame:
    """The proof that pruning changed nothing, as a table of claim, checked, holds.

    Ids: on every text the pruned ids, mapped back, are the full tokenizer's. Weights: every weight is the full model's,
    for tables by vocabulary the kept rows of it; with the first claim that settles every text. States: on the first
    `states_of` texts, seen to be so: every hidden state is equal bit for bit, in fp32.
    """
    same = 0
    for start in range(0, len(texts), 8192):
        part = texts[start : start + 8192]
        before, after = (encoder.tokenize(part) for encoder in (full, pruned))
        same += sum(np.array_equal(ids[b.ids], a.ids) for a, b in zip(before, after))
    small, rows = pruned.model.state_dict(), torch.as_tensor(np.asarray(ids).copy())
    weights = sum(_same_weights(name, value, small.get(name), rows) for name, value in full.model.state_dict().items())
    equal, sample = 0, texts[:states_of]
    device = next(full.model.parameters()).device
    for text in sample:
        states = []
        for encoder in (full, pruned):
            row = torch.tensor([encoder.tokenize([text])[0].ids], device=device)
            with torch.inference_mode():
                output = encoder.model(input_ids=row, attention_mask=torch.ones_like(row), output_hidden_states=True)
            states.append(output.hidden_states)
        equal += states[0][0].shape == states[1][0].shape and all(torch.equal(a, b) for a, b in zip(*states))
    claims = [
        ("texts whose token ids map exactly", len(texts), same),
        ("weight tensors that are the teacher's", len(full.model.state_dict()), weights),
        ("texts whose hidden states are equal bit for bit", len(sample), int(equal)),
    ]
    return pd.DataFrame(claims, columns=["claim", "checked", "holds"])


def _same_weights(name: str, full: torch.Tensor, pruned: torch.Tensor | None, rows: torch.Tensor) -> bool:
    if pruned is not None and full.shape != pruned.shape:
        # RoBERTa's positions are numbered from the pad id on and move with it; all else goes by vocabulary.
        full = full[-len(pruned) :] if "position_embeddings" in name else full[rows.to(full.device)]
    return pruned is not None and torch.equal(full, pruned)
