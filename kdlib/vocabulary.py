"""Vocabulary pruning: fewer embedding rows, the same token sequences and the same hidden states.

A multilingual vocabulary holds the words of a hundred languages; one language uses a small part of it. The
pieces that a corpus and a word list use are kept, with every special token and the single characters that
any unseen word can be spelled with; tokenizer and embeddings are renumbered together.
"""

import copy
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fontTools import unicodedata as unicode_scripts
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from kdlib.batches import budget_batches
from kdlib.documents import parts
from kdlib.encoder import TOKENS_PER_BATCH, Encoder, model_inputs, save_tokenizer
from kdlib.errors import UserError
from kdlib.mlm import prune_head, save_head
from kdlib.prune import check_rows, merged_pair, new_ids, parse_tokenizer, prune_files, prune_spec, renumbered
from kdlib.store import new_folder
from kdlib.weights import HEAD_FILE, stored_tensors

NEUTRAL_SCRIPTS = {"Zyyy", "Zinh"}  # digits, punctuation, symbols, emoji; combining marks
SPACE_MARKS = ("▁", "##", "Ġ")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # pieces that spell unknown characters byte by byte


@dataclass
class Selection:
    """Which pieces stay, and why.

    ids: kept token ids of the full tokenizer, ascending; a piece's place in this list is its new id.
    reason: for each kept id "special", "corpus", "character", "wordlist", "merge" (a BPE piece that others are
        built of) or "unused" (where nothing is pruned).
    counts: int64 [vocabulary], how often the corpus uses each piece of the full vocabulary.
    dropped: how many pieces the corpus uses that `max_rows` left no room for; 0 means exact on every corpus text.
    """

    ids: list[int]
    reason: dict[int, str]
    counts: np.ndarray
    dropped: int


def everything(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Selection:
    """Every piece kept, for a student with the teacher's whole vocabulary; those `texts` never use are "unused"."""
    counts, special = count_pieces(tokenizer, texts), set(tokenizer.all_special_ids)
    ids = list(range(len(counts)))
    reason = {i: "special" if i in special else "corpus" if counts[i] else "unused" for i in ids}
    return Selection(ids, reason, counts, 0)


def piece_list(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokenizer's pieces by id."""
    vocabulary = tokenizer.get_vocab()
    pieces = [""] * (max(vocabulary.values()) + 1)
    for piece, index in vocabulary.items():
        pieces[index] = piece
    return pieces


def count_pieces(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], batch: int = 4096) -> np.ndarray:
    """How often each piece occurs in `texts`: int64 [vocabulary]; special tokens are not added."""
    return _count(tokenizer, texts, len(piece_list(tokenizer)), batch)


def _count(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], size: int, batch: int = 4096) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    for ids in token_ids(tokenizer, texts, batch):
        np.add.at(counts, ids, 1)
    return counts


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], batch: int = 4096) -> Iterator[list[int]]:
    """The token ids of each text, special tokens not added; texts are taken `batch` at a time as they are needed."""
    backend = tokenizer.backend_tokenizer
    for part in parts(texts, batch):
        backend.no_padding()  # an earlier call may have left it on
        backend.no_truncation()
        for encoding in backend.encode_batch_fast(part, add_special_tokens=False):
            yield encoding.ids


_script = functools.cache(unicode_scripts.script)


def script_of(piece: str) -> set[str]:
    """Unicode scripts (ISO 15924 codes) of a piece, without digits, punctuation, symbols and combining marks."""
    return {_script(char) for char in _bare(piece)} - NEUTRAL_SCRIPTS


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
    counts = _count(tokenizer, texts, len(pieces))
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

    ancestors = _Merges(model) if kind == "BPE" else None
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
    claim((i for ids in token_ids(tokenizer, extra) for i in ids), "corpus")
    if max_rows is not None and len(reason) > max_rows:
        raise UserError(
            f"vocabulary.max_rows is {max_rows:,}; special tokens and single characters alone need {len(reason):,}"
        )
    dropped = 0
    for i in sorted(used, key=lambda i: -counts[i]):
        if int(i) not in reason and not claim([int(i)], "corpus", max_rows):
            dropped += 1
    for piece_ids in token_ids(tokenizer, words):
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

    def __init__(self, model: dict):
        self.parents: dict[int, set[int]] = {}
        vocabulary = model["vocab"]
        for left, right in map(merged_pair, model["merges"]):
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


def _model(tokenizer: PreTrainedTokenizerFast) -> dict:
    return _spec(tokenizer)["model"]


def _spec(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What the tokenizer's tokenizer.json holds."""
    if not tokenizer.is_fast:
        raise UserError(f"cannot prune a {type(tokenizer).__name__}: it is not a fast tokenizer")
    return parse_tokenizer(tokenizer.backend_tokenizer.to_str())


def prune_tokenizer(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer with only the pieces `ids` (ascending), numbered 0..len(ids)-1.

    Normaliser, pre-tokenizer, decoder, casing and special tokens stay as they were; the ids inside the
    post-processor are renumbered too, since transformers 4 reads them from the file.
    """
    spec = prune_spec(_spec(tokenizer), new_ids(ids))
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    # The copy has the new backend wherever it had the old, which is slow to copy.
    return copy.deepcopy(tokenizer, {id(tokenizer.backend_tokenizer): backend})


def prune_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> PreTrainedModel:
    """The same model with only the embedding rows `ids`; decoder rows and bias go with them, ties stay tied.

    `tokenizer` is the full one: it says which special ids of the config to renumber. Hidden states of the
    pruned model on pruned ids equal the full model's bit for bit.
    """
    new = new_ids(ids)
    rows = torch.tensor(list(new))
    old_rows = model.get_input_embeddings().weight.shape[0]
    check_rows(new, old_rows)
    config = copy.deepcopy(model.config)
    for key, value in renumbered(config.to_dict(), new).items():
        setattr(config, key, value)
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


def full_tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, as transformers builds it. Raises UserError where there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the readers raise a dozen kinds; people need one line
        raise UserError(f"{source}: no tokenizer that can be read ({str(error).splitlines()[0]})") from None


def save_pruned_tokenizer(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], folder: Path) -> None:
    """Write what `prune_tokenizer` makes of the full tokenizer to `folder`."""
    save_tokenizer(prune_tokenizer(tokenizer, ids), folder)


def prune_encoder(encoder: Encoder, ids: Sequence[int], target: str | Path, source: Path | None = None) -> None:
    """Write the encoder with only the pieces `ids` as a Hugging Face folder at `target`, all of it or nothing.

    source: the folder that the encoder was loaded from (see `weights.weights_folder`). Where its files hold the model's
    weights, all and unchanged, these are taken from there (`prune_files`), else from memory (`prune_model`). The
    encoder's head, if any, is pruned with it.
    """
    with new_folder(target) as folder:
        if source is not None and _holds(source, encoder.model):
            prune_files(source, folder, ids, encoder.tokenizer)
        else:
            prune_model(encoder.model, encoder.tokenizer, ids).save_pretrained(folder)
            save_pruned_tokenizer(encoder.tokenizer, ids, folder)
        if encoder.head is not None:
            save_head(prune_head(encoder.head, ids), folder / HEAD_FILE)


def _holds(source: Path, model: PreTrainedModel) -> bool:
    """Whether a folder's files hold every weight of the model: none drawn anew, nor trained since, as biases tell."""
    modern = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm's weights in old files
    tensors = stored_tensors(source)
    stored = {re.sub(r"\.(gamma|beta)$", lambda end: modern[end[0]], name): name for name in tensors}
    vectors: dict[Path, dict[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        found = stored.get(name) or stored.get(f"{model.base_model_prefix}.{name}")
        if found is None:
            return False
        if value.dim() == 1:
            vectors.setdefault(tensors[found].file, {})[found] = value
    for file, values in vectors.items():
        with safe_open(file, "pt") as reader:
            if not all(torch.equal(reader.get_tensor(name).to(v), v) for name, v in values.items()):
                return False
    return True


def with_state(kind: type[PreTrainedModel], config: AutoConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of class `kind` holding copies of `state`; ties are made again, every weight must be there."""
    with no_init_weights():  # drawing weights that are overwritten takes longer than all the rest
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
    rest = [i for i, why in selection.reason.items() if why in ("wordlist", "unused")]
    covered = np.cumsum(counts[first + by_use + rest]) / max(1, counts.sum())
    sizes = np.unique(np.geomspace(max(1, len(first)), len(covered), points).round().astype(int))
    return [(int(size), float(covered[size - 1])) for size in sizes]


def prove(full: Encoder, pruned: Encoder, ids: np.ndarray, texts: Sequence[str], states_of: int = 100) -> pd.DataFrame:
    """The proof that pruning changed nothing, as a table of claim, checked, holds.

    Ids: on every text the pruned ids, mapped back, are the full tokenizer's. Weights: every weight is the full model's,
    for tables by vocabulary the kept rows of it; with the first claim that settles every text. States: on the first
    `states_of` texts, seen to be so: every hidden state is equal bit for bit, in fp32.
    """
    same = 0
    for part in parts(texts):
        before, after = (encoder.tokenize(part) for encoder in (full, pruned))
        same += sum(np.array_equal(ids[b.ids], a.ids) for a, b in zip(before, after))
    small, rows = pruned.model.state_dict(), torch.as_tensor(np.asarray(ids).copy())
    weights = sum(_same_weights(name, value, small.get(name), rows) for name, value in full.model.state_dict().items())
    sample = texts[:states_of]
    claims = [
        ("texts whose token ids map exactly", len(texts), same),
        ("weight tensors that are the teacher's", len(full.model.state_dict()), weights),
        ("texts whose hidden states are equal bit for bit", len(sample), _same_states(full, pruned, sample)),
    ]
    return pd.DataFrame(claims, columns=["claim", "checked", "holds"])


@torch.inference_mode()
def _same_states(full: Encoder, pruned: Encoder, texts: Sequence[str]) -> int:
    """How many texts have the same states in both, of every token at every layer."""
    ids = [[encoding.ids for encoding in encoder.tokenize(texts)] for encoder in (full, pruned)]
    alike = [i for i, (before, after) in enumerate(zip(*ids)) if len(before) == len(after)]
    equal = 0
    for batch in budget_batches([len(ids[0][i]) for i in alike], TOKENS_PER_BATCH):
        states = []
        for encoder, rows in zip((full, pruned), ids):
            inputs = model_inputs([rows[alike[i]] for i in batch], None, encoder.tokenizer.pad_token_id)
            inputs = {name: value.to(encoder.model.device) for name, value in inputs.items()}
            states.append(encoder.model(**inputs, output_hidden_states=True).hidden_states)
        layers = [(before == after).flatten(1).all(1) for before, after in zip(*states)]
        equal += int(torch.stack(layers).all(0).sum())
    return equal


def _same_weights(name: str, full: torch.Tensor, pruned: torch.Tensor | None, rows: torch.Tensor) -> bool:
    if pruned is not None and full.shape != pruned.shape:
        # RoBERTa's positions are numbered from the pad id on and move with it; all else goes by vocabulary.
        full = full[-len(pruned) :] if "position_embeddings" in name else full[rows.to(full.device)]
    return pruned is not None and torch.equal(full, pruned)
