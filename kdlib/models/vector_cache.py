"""What an encoder has read: kept for the run, so that the teacher reads no text twice."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from kdlib.files import fingerprint, new_file

log = logging.getLogger(__name__)
ROOM = 2**29  # bytes that are kept of one encoder; texts beyond that are read every time


class VectorCache:
    """What an encoder made of the texts it read, by the ids of their tokens, float32, in files.

    The mean-pooled states of all layers of a text [layers + 1, hidden]; of a list of words their states in the last
    one [words, hidden].

    folder: for one encoder alone. ids: of an encoder with a pruned vocabulary, the whole vocabulary's id of each of its
    own; so it remembers what the whole encoder has read, and the other way round, since both compute the same from the
    same pieces (`vocabulary.prove`).
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
        """Vectors of tokenised texts: float32 [texts, layers, hidden].

        layers: which are asked for, 0 = embeddings. shape: (all layers, embeddings among them; hidden). make: gives the
        vectors of the texts at some places, of some layers; called for what is not known yet, and for all layers then
        where there is room to keep them.
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
        """Last states of the words of tokenised texts: float32 [words of all texts, hidden].

        starts: at which token of its text each word begins. make: gives the states of the words of the texts at some
        places; called for what is not known yet.
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
        """Remember the words' last states [words of all texts, hidden], where there is room; gives them by name."""
        names = [self._name(row, places) for row, places in zip(rows, starts, strict=True)]
        parts = np.split(np.ascontiguousarray(states), np.cumsum([len(places) for places in starts])[:-1])
        made = dict(zip(names, parts))
        new = {name: made[name] for name in self._new(names)}
        if new and self._room(sum(part.size for part in new.values())):
            self._keep(list(new), list(new.values()))
        return made

    def _new(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """What is not known yet, and where in `names` it is."""
        self._look()
        return {name: i for i, name in enumerate(names) if name not in self.known}

    def _room(self, values: int) -> bool:
        """Whether so many more can be kept."""
        return sum(kept.nbytes for kept in self.known.values()) + 4 * values <= ROOM

    def _name(self, row: Sequence[int], starts: Sequence[int] | None = None) -> bytes:
        ids = np.asarray(row, "<i4") if self.ids is None else self.ids[np.asarray(row)].astype("<i4")
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16)
        if starts is not None:
            digest.update(b"words" + np.asarray(starts, "<i4").tobytes())
        return digest.digest()

    def _look(self) -> None:
        """Take up what others have added to the folder since."""
        for file in sorted(set(self.folder.glob("*.npz")) - self.read):
            self.read.add(file)
            try:
                with np.load(file, allow_pickle=False) as kept:  # zip files carry checksums
                    parts = np.split(kept["states"], np.cumsum(kept["counts"])[:-1])
                    self.known |= zip(map(bytes, kept["names"]), parts, strict=True)
            except Exception:  # a dozen kinds, and for all of them the texts are read again
                log.warning("%s: torn or corrupted; its texts are read again", file)

    def _keep(self, names: list[bytes], made: list[np.ndarray]) -> None:
        self.known |= zip(names, made)
        raw = np.frombuffer(b"".join(names), np.uint8).reshape(len(names), -1)
        file = self.folder / f"{fingerprint(raw.tobytes().hex())}.npz"
        with new_file(file) as path:
            np.savez(path, names=raw, counts=np.array([len(part) for part in made]), states=np.concatenate(made))
        self.read.add(file)


def body_key(model: nn.Module, *about: object) -> str:
    """A fingerprint of an encoder's weights but for its word embeddings, so that pruning them leaves it as it is.

    And of `about`, all else that its vectors depend on.
    """
    words = model.get_input_embeddings().weight
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if value is not words:
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy())
    return fingerprint(digest.hexdigest(), about)
