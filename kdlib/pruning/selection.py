"""Vocabulary pruning: choose the embedding rows to keep.

A multilingual vocabulary holds the words of a hundred languages; one language uses a small part of it. We keep the
tokens that a corpus and a word list use, every special token, and the single characters that spell unseen words.
"""

import functools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from fontTools import unicodedata as unicode_scripts
from transformers import PreTrainedTokenizerFast

from kdlib.errors import UserError
from kdlib.models.tokenizer_files import token_ids, token_list
from kdlib.pruning.tokenizer import tokenizer_spec
from kdlib.pruning.tokenizer_json import merged_pair

NEUTRAL_SCRIPTS = {"Zyyy", "Zinh"}  # digits, punctuation, symbols, emoji; combining marks
SPACE_MARKS = ("▁", "##", "Ġ")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # tokens that spell unknown characters byte by byte


@dataclass
class Selection:
    """The tokens to keep, with the reason for each.

    Attributes:
        ids: kept ids of the full tokenizer, ascending; the position in this list is the new id.
        reason: for each kept id "special", "corpus", "character", "wordlist", "merge" (other BPE tokens are built of
            it) or "unused" (where nothing is pruned).
        counts: int64 [vocabulary], how often the corpus uses each token of the full vocabulary.
        dropped: tokens of the corpus left out because of `max_rows`; 0 means exact on every corpus text.
    """

    ids: list[int]
    reason: dict[int, str]
    counts: np.ndarray
    dropped: int


def keep_all(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Selection:
    """Keep every token, for a student with the teacher's whole vocabulary. Tokens absent from `texts` are "unused"."""
    counts, special = count_tokens(tokenizer, texts), set(tokenizer.all_special_ids)
    ids = list(range(len(counts)))
    reason = {i: "special" if i in special else "corpus" if counts[i] else "unused" for i in ids}
    return Selection(ids, reason, counts, 0)


def count_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], batch: int = 4096) -> np.ndarray:
    """How often each token occurs in `texts`: int64 [vocabulary]. Special tokens are not added."""
    return _count(tokenizer, texts, len(token_list(tokenizer)), batch)


def _count(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], size: int, batch: int = 4096) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    for ids in token_ids(tokenizer, texts, batch):
        np.add.at(counts, ids, 1)
    return counts


_script = functools.cache(unicode_scripts.script)


def script_of(token: str) -> set[str]:
    """Unicode scripts (ISO 15924 codes) of a token, without digits, punctuation, symbols and combining marks."""
    return {_script(char) for char in _bare(token)} - NEUTRAL_SCRIPTS


def _bare(token: str) -> str:
    if BYTE.fullmatch(token):
        return ""
    for mark in SPACE_MARKS:
        if token.startswith(mark) and len(token) > len(mark):
            return token[len(mark) :]
    return token


def word_list(language: str, size: int | None = None) -> list[str]:
    """The words of wordfreq for a language, most frequent first, each followed by its capitalised form.

    Args:
        language: an ISO 639 code, such as "tgl", "ceb" or "id".
        size: number of words at most; default all.

    Returns:
        The words; none for a language that wordfreq lacks.

    Raises:
        UserError: for an invalid code.
    """
    import langcodes
    import wordfreq
    from langcodes.tag_parser import LanguageTagError

    try:
        code, _distance = langcodes.closest_match(language, list(wordfreq.available_languages()), max_distance=9)
    except LanguageTagError:
        raise UserError(f"language {language!r} is not an ISO 639 code (such as tgl, ceb or id)") from None
    if code == "und":
        return []
    words = wordfreq.top_n_list(code, 10**9)[:size]
    return [form for word in words for form in dict.fromkeys((word, word.capitalize()))]


def select_tokens(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    words: Sequence[str] = (),
    extra: Sequence[str] = (),
    characters: str = "scripts",
    max_rows: int | None = None,
    counts: np.ndarray | None = None,
) -> Selection:
    """Choose the tokens to keep.

    Tokens are claimed in this order: special tokens; single characters, so that words in their scripts do not become
    unknown; tokens of `extra` and `texts`; tokens of `words`, until `max_rows` is reached. Corpus tokens are left out,
    rarest first, only where the earlier groups alone exceed `max_rows`.

    Args:
        tokenizer: the full tokenizer.
        texts: the corpus.
        words: a word list, most important first.
        extra: further texts to keep exact, such as prefixes.
        characters: "scripts" keeps characters of the scripts in `texts` and neutral ones (digits, punctuation,
            symbols); "all" keeps those of every script.
        max_rows: embedding rows at most; None: no limit.
        counts: those of `count_tokens` for `texts`, where they are known; then `texts` is not read.

    Raises:
        UserError: where `texts` is empty, or `max_rows` leaves no room for special tokens and characters.
    """
    spec = tokenizer_spec(tokenizer)
    model = spec["model"]
    kind = model["type"]
    by_byte = any("ByteLevel" in json.dumps(spec.get(step)) for step in ("pre_tokenizer", "normalizer"))
    tokens = token_list(tokenizer)
    counts = _count(tokenizer, texts, len(tokens)) if counts is None else counts
    if not counts.any():
        raise UserError("vocabulary: the corpus has no text to choose tokens from")
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

    ancestors = _Merges(model) if kind == "BPE" else None
    claim(sorted(_specials(tokenizer, model)), "special")
    used = np.flatnonzero(counts)
    # Byte-level BPE spells every byte with its own letter; those letters say nothing about scripts.
    scripts = set().union(*(script_of(tokens[i]) for i in used if i not in reason)) | NEUTRAL_SCRIPTS
    claim(
        (
            i
            for i, p in enumerate(tokens)
            if _is_character(p, kind) and (characters == "all" or by_byte or script_of(p) <= scripts)
        ),
        "character",
    )
    claim((i for ids in token_ids(tokenizer, extra) for i in ids), "corpus")
    if max_rows is not None and len(reason) > max_rows:
        raise UserError(
            f"vocabulary.max_rows is {max_rows:,}; special tokens and single characters alone need {len(reason):,}"
        )
    dropped = 0
    for i in sorted(used, key=lambda i: -counts[i]):
        if int(i) not in reason and not claim([int(i)], "corpus", max_rows):
            dropped += 1
    for word_ids in token_ids(tokenizer, words):
        if not claim(word_ids, "wordlist", max_rows):
            break
    return Selection(sorted(reason), reason, counts, dropped)


def select_by_coverage(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    words: Sequence[str] = (),
    extra: Sequence[str] = (),
    characters: str = "scripts",
    max_rows: int | None = None,
    *,
    coverage: float,
    heldout: Sequence[Iterable[str]],
) -> Selection:
    """Keep as few tokens as cover a share of the running tokens of held-out texts, in the order of `select_tokens`.

    Args:
        tokenizer: see `select_tokens`, also for the others to `max_rows`, all of which is used where it does not reach.
        texts: the corpus.
        words: a word list.
        extra: further texts to keep exact.
        characters: "scripts" or "all".
        max_rows: embedding rows at most.
        coverage: the share, between 0 and 1.
        heldout: texts of each language. The share is reached in each of them, or a warning says how much is.
    """
    more = (words, extra, characters)
    whole = select_tokens(tokenizer, texts, *more, max_rows)
    order = np.array(list(whole.reason))
    goals, size = [], sum(why in ("special", "character") for why in whole.reason.values())
    for lines in heldout:
        counts = _count(tokenizer, lines, len(whole.counts))
        covered = np.cumsum(counts[order]) / max(1, counts.sum())
        if covered[-1] < coverage:
            told = f"vocabulary.coverage {coverage} is not reached: all rows cover {covered[-1]:.4f}"
            warnings.warn(told, stacklevel=2)
            return whole
        goals.append((counts, coverage * counts.sum()))
        size = max(size, int(np.searchsorted(covered, coverage)) + 1)
    for rows in range(size, len(order)):  # a BPE token and what it is merged from may not fit into `size`
        found = select_tokens(tokenizer, (), *more, rows, whole.counts)
        if all(counts[found.ids].sum() >= goal for counts, goal in goals):
            return found
    return whole


def _specials(tokenizer: PreTrainedTokenizerFast, model: dict) -> set[int]:
    """Special tokens, also undeclared ones: the model's unknown token and those the post-processor adds.

    Tokens that users added to a tokenizer count as special, also words: the tokenizer's model cannot spell them.
    """
    unknown = model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model.get("unk_token"))
    added = set(tokenizer.added_tokens_decoder)
    around = tokenizer("").input_ids + tokenizer("", "").input_ids
    return {*tokenizer.all_special_ids, *added, *around} | ({unknown} - {None})


def _is_character(token: str, kind: str) -> bool:
    if kind == "WordPiece" and token.startswith("##"):
        return len(token) == 3
    return len(token) == 1 or BYTE.fullmatch(token) is not None


class _Merges:
    """The tokens that a BPE token is merged from."""

    def __init__(self, model: dict):
        self.parents: dict[int, set[int]] = {}
        vocabulary = model["vocab"]
        for left, right in map(merged_pair, model["merges"]):
            if left + right in vocabulary:
                self.parents.setdefault(vocabulary[left + right], set()).update((vocabulary[left], vocabulary[right]))

    def closure(self, ids: Iterable[int], known: dict[int, str]) -> list[int]:
        """`ids` and all tokens that they are merged from, without the known ones."""
        found: dict[int, None] = {}
        waiting = list(ids)
        while waiting:
            i = waiting.pop()
            if i not in known and i not in found:
                found[i] = None
                waiting.extend(self.parents.get(i, ()))
        return list(found)


def main_script(token: str) -> str:
    """The script of a token: "neutral" for digits, punctuation and symbols, "mixed" for several scripts."""
    scripts = script_of(token)
    return "neutral" if not scripts else scripts.pop() if len(scripts) == 1 else "mixed"


def coverage_curve(selection: Selection, counts: np.ndarray, points: int = 40) -> list[tuple[int, float]]:
    """The share of a text's running tokens that the first n rows cover.

    Rows are in the order of claim: special tokens and characters, corpus tokens by frequency, then the word list.

    Args:
        selection: the kept tokens.
        counts: int [vocabulary], how often the text uses each token.
        points: number of sizes n.
    """
    first = [i for i in selection.ids if selection.reason[i] in ("special", "character")]
    by_use = sorted(
        (i for i in selection.ids if selection.reason[i] in ("corpus", "merge")), key=lambda i: -selection.counts[i]
    )
    rest = [i for i, why in selection.reason.items() if why in ("wordlist", "unused")]
    covered = np.cumsum(counts[first + by_use + rest]) / max(1, counts.sum())
    sizes = np.unique(np.geomspace(max(1, len(first)), len(covered), points).round().astype(int))
    return [(int(size), float(covered[size - 1])) for size in sizes]
