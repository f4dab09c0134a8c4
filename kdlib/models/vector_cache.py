"""Vectors of the texts that an encoder has read, kept for the run, so that no text is read twice."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from kdlib.files import fingerprint, locked, new_file

log = logging.getLogger(__name__)
ROOM = 2**29  # bytes of vectors kept for one encoder; further texts are read every time


class VectorCache:
    """Vectors by token ids, float32, in files.

    Of a text: the mean-pooled states of all layers [layers + 1, hidden]. Of a list of words: their states in the last
    layer [words, hidden].

    Args:
        folder: a folder for one encoder.
        ids: for a pruned encoder, the full vocabulary's id of each token. It then shares vectors with the full encoder,
            since both compute the same from the same tokens (`pruning.verify`).
    """

    def __init__(self, folder: Path, ids: np.ndarray | None = None):
        self.folder, self.ids = Path(folder), ids
        self.known: dict[bytes, np.ndarray] = {}
        self.read: set[Path] = set()

    def vectors(
        self,
        rows: Sequence[Sequence[int]],
        layers: Sequence[int],
        shape: tuple[int, int],
        make: Callable[[Sequence[int], Sequence[int]], np.ndarray],
    ) -> np.ndarray:
        """Vectors of tokenised texts.

        Args:
            rows: token ids of each text.
            layers: the wanted layers, 0 = embeddings.
            shape: (number of layers with the embeddings, hidden).
            make: computes the vectors of some texts (their numbers) at some layers. It is called for unknown texts, and
                for all layers where there is room to keep them.

        Returns:
            float32 [texts, layers, hidden].
        """
        names = [self._name(row) for row in rows]
        new = self._new(names)
        if not names or not self._room(len(new) * shape[0] * shape[1]):
            return make(range(len(rows)), layers)
        if new:
            self._keep(list(new), list(make(list(new.values()), range(shape[0]))))
        return np.stack([self.known[name][list(layers)] for name in names])

    def words(
        self,
        rows: Sequence[Sequence[int]],
        starts: Sequence[Sequence[int]],
        make: Callable[[Sequence[int]], np.ndarray],
    ) -> np.ndarray:
        """Last states of the words of tokenised texts.

        Args:
            rows: token ids of each text.
            starts: the first token of each word, for each text.
            make: computes the states of the words of some texts (their numbers); called for unknown texts.

        Returns:
            float32 [words of all texts, hidden].
        """
        if not rows:
            return make([])
        names = [self._name(row, places) for row, places in zip(rows, starts, strict=True)]
        read = list(self._new(names).values())
        made = self.keep_words([rows[i] for i in read], [starts[i] for i in read], make(read)) if read else {}
        return np.concatenate([made[name] if name in made else self.known[name] for name in names])

    def keep_words(
        self, rows: Sequence[Sequence[int]], starts: Sequence[Sequence[int]], states: np.ndarray
    ) -> dict[bytes, np.ndarray]:
        """Keep the words' last states [words of all texts, hidden] where there is room. Returns them by name."""
        names = [self._name(row, places) for row, places in zip(rows, starts, strict=True)]
        parts = np.split(np.ascontiguousarray(states), np.cumsum([len(places) for places in starts])[:-1])
        made = dict(zip(names, parts))
        new = {name: made[name] for name in self._new(names)}
        if new and self._room(sum(part.size for part in new.values())):
            self._keep(list(new), list(new.values()))
        return made

    def _new(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """The unknown names, and their positions in `names`."""
        self._look()
        return {name: i for i, name in enumerate(names) if name not in self.known}

    def _room(self, values: int) -> bool:
        """Whether there is room for so many more numbers."""
        return sum(kept.nbytes for kept in self.known.values()) + 4 * values <= ROOM

    def _name(self, row: Sequence[int], starts: Sequence[int] | None = None) -> bytes:
        ids = np.asarray(row, "<i4") if self.ids is None else self.ids[np.asarray(row)].astype("<i4")
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16)
        if starts is not None:
            digest.update(b"words" + np.asarray(starts, "<i4").tobytes())
        return digest.digest()

    def _look(self) -> None:
        """Read the files that other processes added to the folder."""
        for file in sorted(set(self.folder.glob("*.npz")) - self.read):
            self.read.add(file)
            try:
                with np.load(file, allow_pickle=False) as kept:  # zip files carry checksums
                    parts = np.split(kept["states"], np.cumsum(kept["counts"])[:-1])
                    self.known |= zip(map(bytes, kept["names"]), parts, strict=True)
            except Exception:  # readers raise a dozen kinds, and the texts are read again after any of them
                log.warning("%s: torn or corrupted; its texts are read again", file)

    def _keep(self, names: list[bytes], made: list[np.ndarray]) -> None:
        self.known |= zip(names, made)
        raw = np.frombuffer(b"".join(names), np.uint8).reshape(len(names), -1)
        file = self.folder / f"{fingerprint(raw.tobytes().hex())}.npz"
        with locked(file), new_file(file) as path:
            np.savez(path, names=raw, counts=np.array([len(part) for part in made]), states=np.concatenate(made))
        self.read.add(file)


def body_key(model: nn.Module, *about: object) -> str:
    """A fingerprint of an encoder's weights without its word embeddings, and of `about`.

    Pruning the vocabulary does not change it.
    """
    words = model.get_input_embeddings().weight
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if value is not words:
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy())
    return fingerprint(digest.hexdigest(), about)
