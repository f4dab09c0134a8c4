"""Tokenised texts, memory-mapped: tokenised once, and read by every stage, ablation arm and later run."""

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdlib.data.lazy import parts
from kdlib.files import fingerprint, flaw, locked, new_folder, seal
from kdlib.models.encoder import Encoder
from kdlib.models.masking import maskable_tokens, word_numbers

log = logging.getLogger(__name__)
KINDS = {"lengths": np.int32, "starts": np.int64, "ids": np.int32, "maskable": np.bool_, "words": np.int32}


@dataclass
class Ragged(Sequence):
    """Rows of different lengths in one flat array, which may be a file: row i is values[starts[i] :][: lengths[i]].

    Attributes:
        values: the numbers.
        starts: int64 [rows].
        lengths: int32 [rows].
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        start = self.starts[i]
        return self.values[start : start + self.lengths[i]]

    def part(self, places: Sequence[int]) -> "Ragged":
        """Some of the rows, with the same values."""
        chosen = np.asarray(places, int)
        return Ragged(self.values, self.starts[chosen], self.lengths[chosen])


def tokenise(
    encoder: Encoder, texts: Iterable[str], fields: Sequence[str] = (), root: Path | None = None
) -> dict[str, Ragged]:
    """Tokenise texts with the encoder's prefix, truncated at its max_length.

    Args:
        encoder: its tokenizer is used.
        texts: read at most twice, and never held in memory as a whole.
        fields: more arrays: "maskable" (bool, the tokens that may be masked), "words" (int32, the word of each token,
            -1 for none).
        root: a cache folder for the arrays, named by all they depend on; None keeps them in memory.

    Returns:
        "ids" (int32) and the other fields.

    Raises:
        UserError: where `root` cannot be written.
    """
    fields = ["ids", *fields]
    names = ["starts", "lengths", *fields]
    if root is None:
        found = list(encoded(encoder, texts, fields))
        arrays = {
            n: np.concatenate([np.zeros(0, KINDS[n]), *(part[n] for part in found)], dtype=KINDS[n]) for n in names
        }
    else:
        folder = Path(root) / "tokens" / _key(encoder, texts, fields)
        if not _whole(folder):
            with locked(folder) as alone:
                if alone or not _whole(folder):
                    with new_folder(folder) as work:
                        _write(work, encoded(encoder, texts, fields), names)
                        seal(work)
        arrays = {name: _mapped(folder / name, KINDS[name]) for name in names}
    return {name: Ragged(arrays[name], arrays["starts"], arrays["lengths"]) for name in fields}


def encoded(encoder: Encoder, texts: Iterable[str], fields: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Flat arrays of some thousand texts at a time."""
    done = 0
    for some in parts(texts):
        encodings = encoder.tokenize(some)  # with a thread per core
        rows = {"ids": [np.asarray(e.ids, np.int32) for e in encodings]}
        if "maskable" in fields:
            rows["maskable"] = maskable_tokens(encoder.tokenizer, encodings, encoder.prefix)
        if "words" in fields:
            rows["words"] = word_numbers(encodings)
        lengths = np.array([len(row) for row in rows["ids"]], np.int32)
        ends = done + np.cumsum(lengths, dtype=np.int64)
        found = {name: np.concatenate(rows[name]).astype(KINDS[name]) for name in fields}
        yield {"starts": ends - lengths, "lengths": lengths} | found
        done = ends[-1]


def _key(encoder: Encoder, texts: Iterable[str], fields: Sequence[str]) -> str:
    """A hash of the texts, the tokenizer, the prefix and max_length."""
    backend = encoder.tokenizer.backend_tokenizer
    backend.no_truncation()  # earlier calls may have left them on
    backend.no_padding()
    digest = hashlib.sha256(backend.to_str().encode())
    for some in parts(texts):
        digest.update("\0".join([*some, ""]).encode("utf-8", "surrogatepass"))
    return fingerprint(digest.hexdigest(), encoder.prefix, encoder.max_length, sorted(fields))


def _write(folder: Path, found: Iterable[dict[str, np.ndarray]], names: Sequence[str]) -> None:
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
        for part in found:
            for name, file in files.items():
                part[name].tofile(file)


def _whole(folder: Path) -> bool:
    """Whether the files are as they were written; a damaged one gives a warning."""
    if not folder.is_dir():
        return False
    wrong = flaw(folder)
    if wrong:
        log.warning("%s: %s; the texts are tokenised again", folder, wrong)
    return not wrong


def _mapped(file: Path, kind: type) -> np.ndarray:
    """A file's values, read when needed. A plain array, since slicing a memmap is several times slower."""
    if not file.stat().st_size:  # which cannot be mapped
        return np.zeros(0, kind)
    return np.asarray(np.memmap(file, kind, "c"))
