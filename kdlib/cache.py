"""The teacher's hidden states on disk: computed once, read by every epoch, every ablation arm and every later run."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdlib.batches import budget_batches
from kdlib.device import autocast
from kdlib.encoder import TOKENS_PER_BATCH, Encoder, pad
from kdlib.errors import UserError
from kdlib.progress import track
from kdlib.store import fingerprint, new_folder, write_json


@dataclass
class TeacherStates:
    """Half-precision states of texts, memory-mapped: float16 [tokens of all texts, layers, hidden]; `starts` says at
    which token each text begins."""

    states: np.ndarray
    starts: np.ndarray

    def rows(self, text: int, length: int) -> np.ndarray:
        """States of one text: float16 [length, layers, hidden]."""
        start = self.starts[text]
        return self.states[start : start + length]


def gigabytes(tokens: int, layers: int, hidden: int) -> float:
    """Size on disk of the states of so many tokens."""
    return tokens * layers * hidden * 2 / 1e9


def teacher_states(
    root: Path, teacher: Encoder, ids: Sequence[Sequence[int]], layers: Sequence[int], budget: float
) -> TeacherStates | None:
    """The states of `layers` (1 = first) for tokenised texts, from the cache under `root` or computed into it.

    budget: in gigabytes; None is returned where the states would take more, or the disk has no room: then the teacher
    runs live. The key covers the teacher's weights, the ids and the layers, so that nothing stale is ever read.
    """
    lengths = np.array([len(row) for row in ids])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shape = (int(starts[-1]), len(layers), teacher.hidden)
    size = gigabytes(*shape)
    folder = root / _key(teacher, ids, layers)
    file = folder / "states.f16"
    if not (file.is_file() and file.stat().st_size == 2 * int(np.prod(shape))):
        root.mkdir(parents=True, exist_ok=True)
        if size > budget or size * 1e9 > shutil.disk_usage(root).free * 0.9:
            return None
        with new_folder(folder) as work:
            _compute(work / file.name, teacher, ids, layers, starts, shape)
            write_json(
                work / "cache.json",
                {"texts": len(ids), "shape": shape, "layers": list(layers), "teacher": teacher.name},
            )
    return TeacherStates(np.memmap(file, np.float16, "r", shape=shape), starts[:-1])


def _key(teacher: Encoder, ids: Sequence[Sequence[int]], layers: Sequence[int]) -> str:
    sums = [float(p.detach().double().sum()) for p in teacher.model.parameters()]
    return fingerprint(teacher.bf16, sums, [np.asarray(row).tolist() for row in ids], list(layers))


@torch.inference_mode()
def _compute(path: Path, teacher: Encoder, ids, layers, starts, shape) -> None:
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here and now, not a crash while writing
            os.posix_fallocate(file.fileno(), 0, 2 * int(np.prod(shape)))
    out = np.memmap(path, np.float16, "r+" if path.stat().st_size else "w+", shape=shape)
    device = next(teacher.model.parameters()).device
    for batch in track(budget_batches([len(row) for row in ids], TOKENS_PER_BATCH), "caching the teacher's states"):
        tokens, mask = pad([ids[i] for i in batch], teacher.tokenizer.pad_token_id)
        with autocast(device, teacher.bf16):
            hidden = teacher.model(
                input_ids=tokens.to(device), attention_mask=mask.to(device), output_hidden_states=True
            ).hidden_states
        states = torch.stack([hidden[layer] for layer in layers], 2).to(torch.float16).cpu()
        if not torch.isfinite(states).all():
            raise UserError("the teacher's states do not fit half precision; set distill.cache=false")
        for r, i in enumerate(batch):
            out[starts[i] : starts[i + 1]] = states[r, : len(ids[i])].numpy()
    out.flush()
