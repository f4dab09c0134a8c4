"""Vectors of the texts that an encoder has read: kept for the run, so that the teacher reads no text twice."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from kdlib.store import fingerprint, new_file

log = logging.getLogger(__name__)
ROOM = 2**29  # bytes that are kept of one encoder; texts beyond that are read every time


class Memory:
    """Mean-pooled states of all layers, float32 [layers + 1, hidden] a text, by the ids of its tokens; in files.

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
        self._look()
        names = [self._name(row) for row in rows]
        new = {name: i for i, name in enumerate(names) if name not in self.known}
        if (len(self.known) + len(new)) * shape[0] * shape[1] * 4 > ROOM:
            return make(range(len(rows)), layers)
        if new:
            self._keep(list(new), make(list(new.values()), range(shape[0])))
        if not names:
            return make([], layers)
        return np.stack([self.known[name][list(layers)] for name in names])

    def _name(self, row: Sequence[int]) -> bytes:
        ids = np.asarray(row, "<i4") if self.ids is None else self.ids[np.asarray(row)].astype("<i4")
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()

    def _look(self) -> None:
        """Take up what others have added to the folder since."""
        for file in sorted(set(self.folder.glob("*.npz")) - self.read):
            self.read.add(file)
            try:
                with np.load(file, allow_pickle=False) as kept:  # zip files carry checksums
                    self.known |= zip(map(bytes, kept["names"]), kept["vectors"], strict=True)
            except Exception:  # a dozen kinds, and for all of them the texts are read again
                log.warning("%s: torn or corrupted; its texts are read again", file)

    def _keep(self, names: list[bytes], made: np.ndarray) -> None:
        self.known |= zip(names, made)
        raw = np.frombuffer(b"".join(names), np.uint8).reshape(len(names), -1)
        file = self.folder / f"{fingerprint(raw.tobytes().hex())}.npz"
        with new_file(file) as path:
            np.savez(path, names=raw, vectors=made)
        self.read.add(file)


def body_key(model: nn.Module, *about: object) -> str:
    """A fingerprint of an encoder's weights but for its word embeddings, so that pruning them leaves it as it is; and
    of `about`, all else that its vectors depend on."""
    words = model.get_input_embeddings().weight
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if value is not words:
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy())
    return fingerprint(digest.hexdigest(), about)
