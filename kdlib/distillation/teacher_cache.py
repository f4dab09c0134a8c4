"""The teacher's hidden states on disk: computed once, and read by every epoch, ablation arm and later run.

A folder holds the states of one list of texts under one teacher. Each layer is a file, so that students of other depths
share layers: `layer-03.f16`, with its size and checksum in `layer-03.json`.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdlib.batching import budget_batches, pad, tokens_per_batch
from kdlib.device import autocast
from kdlib.errors import UserError
from kdlib.files import checksum, clear_unfinished, locked, new_file, write_json
from kdlib.models.encoder import Encoder, layer_states
from kdlib.progress import track

log = logging.getLogger(__name__)
SPARE = 0.9  # share of the free disk that a cache may take


@dataclass
class TeacherStates:
    """Half-precision states of texts, memory-mapped.

    Attributes:
        layers: layer (0 = embeddings, n = after layer n) -> float16 [tokens of all texts, hidden].
        starts: int [texts], the first token of each text.
    """

    layers: dict[int, np.ndarray]
    starts: np.ndarray

    def part(self, places: Sequence[int]) -> "TeacherStates":
        """The states of some of the texts."""
        return TeacherStates(self.layers, self.starts[np.asarray(places, int)])

    def batch(self, layer: int, texts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """One layer's states of some texts, padded with zeros: float16 [texts, longest, hidden]."""
        states = self.layers[layer]
        out = np.zeros((len(texts), max(lengths), states.shape[1]), np.float16)
        for row, start, length in zip(out, self.starts[np.asarray(texts, int)], lengths):
            row[:length] = states[start : start + length]
        return torch.from_numpy(out)


def gigabytes(tokens: int, layers: int, hidden: int) -> float:
    """Size on disk of the states of so many tokens."""
    return tokens * layers * hidden * 2 / 1e9


def teacher_states(
    root: Path, teacher: Encoder, ids: Sequence[np.ndarray], layers: Sequence[int], budget: float
) -> TeacherStates | None:
    """The teacher's states for tokenised texts, from the cache in `root` or computed into it.

    The folder is named by the teacher's weights and the ids, so stale states are never read. Missing layers are
    computed in one pass. A damaged file is named in a warning and computed again.

    Args:
        root: the run's cache folder.
        teacher: in eval mode.
        ids: token ids of each text.
        layers: 0 = embeddings, 1 = after the first layer.
        budget: gigabytes that the folder may take.

    Returns:
        The states. None, with a warning, where the budget or the disk is too small; then the teacher runs live.

    Raises:
        UserError: where `root` cannot be written.
    """
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shape = (int(starts[-1]), teacher.hidden)
    folder = root / _key(teacher, ids, lengths)
    files = {layer: folder / f"layer-{layer:02}.f16" for layer in sorted(set(layers))}
    with locked(folder):
        missing = {layer: file for layer, file in files.items() if not _whole(file, 2 * shape[0] * shape[1])}
        if missing and not (_fits(folder, missing, shape, budget) and _make(missing, teacher, ids, starts, shape)):
            return None
    # As plain arrays: slicing a memmap costs several times as much, at every step.
    mapped = {layer: np.asarray(np.memmap(file, np.float16, "r", shape=shape)) for layer, file in files.items()}
    return TeacherStates(mapped, starts[:-1])


def _key(teacher: Encoder, ids: Sequence[np.ndarray], lengths: np.ndarray) -> str:
    """A SHA-256 of all that the states depend on: weights, settings and ids."""
    settings = teacher.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype"):  # of the folder, not of the model
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps([teacher.bf16, settings], sort_keys=True, default=str).encode())
    for name, value in teacher.model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(lengths.astype("<i8"))
    for row in ids:
        digest.update(np.asarray(row, "<i4"))
    return digest.hexdigest()[:32]


def _whole(file: Path, size: int) -> bool:
    """Whether a layer's file has the size and checksum it was written with; a damaged one gives a warning."""
    if not file.is_file():
        return False
    try:
        kept = json.loads(file.with_suffix(".json").read_text("utf-8"))
        sound = file.stat().st_size == size == kept["bytes"] and checksum(file) == kept["crc32"]
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        log.warning("%s: torn or corrupted; the teacher's states are computed again", file)
    return sound


def _fits(folder: Path, missing: dict[int, Path], shape: tuple[int, int], budget: float) -> bool:
    """Whether the missing layers fit the budget and the disk; if not, a warning says so."""
    new = gigabytes(shape[0], len(missing), shape[1])
    others = set(folder.glob("layer-*.f16")) - set(missing.values())
    total = new + sum(file.stat().st_size for file in others) / 1e9
    if total > budget:
        log.warning(
            "the teacher's states take %.2f GB, distill.cache_gigabytes is %.2f: the teacher runs live, at every step",
            total,
            budget,
        )
        return False
    for file in missing.values():  # files of killed processes can be as large as the cache
        clear_unfinished(file.parent, file.stem, file.suffix)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free * SPARE / 1e9
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot write there ({error.strerror})") from None
    if new > free:
        _tell_full(folder.parent, new)
    return new <= free


def _tell_full(root: Path, size: float) -> None:
    log.warning("%s: no room for the teacher's states (%.2f GB): the teacher runs live, at every step", root, size)


def _make(files: dict[int, Path], teacher: Encoder, ids, starts: np.ndarray, shape: tuple[int, int]) -> bool:
    """Compute layers in one pass and write their files. False where the disk was full."""
    try:
        with contextlib.ExitStack() as stack:
            work = {layer: stack.enter_context(new_file(file)) for layer, file in files.items()}
            write_states(work, teacher, ids, starts, shape)
            kept = {layer: {"bytes": path.stat().st_size, "crc32": checksum(path)} for layer, path in work.items()}
        for layer, file in files.items():
            write_json(file.with_suffix(".json"), kept[layer])
    except UserError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _tell_full(next(iter(files.values())).parent, gigabytes(shape[0], len(files), shape[1]))
        return False
    return True


@torch.inference_mode()
def write_states(files: dict[int, Path], teacher: Encoder, ids, starts: np.ndarray, shape: tuple[int, int]) -> None:
    """Run the teacher once over the texts and write the hidden states of each layer into its file."""
    out = {}
    for layer, path in files.items():
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk then raises an error here, not a crash later
                os.posix_fallocate(file.fileno(), 0, 2 * shape[0] * shape[1])
            else:
                file.truncate(2 * shape[0] * shape[1])
        out[layer] = np.memmap(path, np.float16, "r+", shape=shape)
    device = next(teacher.model.parameters()).device
    for batch in track(budget_batches([len(row) for row in ids], tokens_per_batch()), "caching the teacher's states"):
        tokens, mask = pad([ids[i] for i in batch], teacher.tokenizer.pad_token_id)
        with autocast(device, teacher.bf16):
            hidden = layer_states(teacher.model, input_ids=tokens.to(device), attention_mask=mask.to(device))
        for layer, states in out.items():
            found = hidden[layer].to(torch.float16).cpu()
            if not torch.isfinite(found).all():
                raise UserError("the teacher's states do not fit half precision; set distill.cache=false")
            for row, i in zip(found.numpy(), batch):
                states[starts[i] : starts[i + 1]] = row[: len(ids[i])]
    for states in out.values():
        states.flush()
