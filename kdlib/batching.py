"""Batches with a token budget. Texts of similar length share a batch, so that there is little padding."""

import random
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

BUCKET = 4096  # texts that are sorted by length together: more means less padding, fewer means a better shuffle


def budget_batches(lengths: Sequence[int], budget: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Group indices so that rows x longest row is at most `budget`. A longer text is a batch of its own.

    Args:
        lengths: tokens of each text.
        budget: tokens of a batch, padding included.
        order: the order in which batches are filled; default longest first, so that memory peaks at the start.

    Returns:
        The indices of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i]) if order is None else order
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if batches and longest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


class BudgetSampler(Sampler[list[int]]):
    """A batch sampler with a token budget: shuffled buckets, sorted by length inside, and the batches shuffled.

    Every epoch has the same batches in an order that depends on `seed` and the epoch, so that a run can resume.

    Args:
        lengths: tokens of each text.
        budget: tokens of a batch, padding included.
        seed: of the buckets and of the order.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int = 0):
        self.lengths, self.budget, self.seed, self.epoch = np.asarray(lengths, np.int32), budget, seed, 0
        self.order, self.ends = self._plan()

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """The indices, batch by batch, and where each batch ends. 4 bytes a text; lists need twenty times that."""
        order = array("i", range(len(self.lengths)))
        random.Random(self.seed).shuffle(order)
        ends, done = array("q"), 0
        for start in range(0, len(order), BUCKET):
            bucket = order[start : start + BUCKET]
            lengths = self.lengths[bucket].tolist()
            places = sorted(range(len(bucket)), key=lengths.__getitem__)
            for batch in budget_batches(lengths, self.budget, places):
                done += len(batch)
                ends.append(done)
            order[start : start + BUCKET] = array("i", (bucket[place] for place in places))
        return np.frombuffer(order, np.int32), np.frombuffer(ends, np.int64)

    def _batch(self, number: int) -> list[int]:
        return self.order[self.ends[number - 1] if number else 0 : self.ends[number]].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order of the batches."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[list[int]]:
        numbers = array("q", range(len(self)))
        random.Random(f"{self.seed}-{self.epoch}").shuffle(numbers)
        return map(self._batch, numbers)

    def real_share(self) -> float:
        """The share of the computed tokens that are not padding."""
        padded = sum(len(batch) * int(self.lengths[batch].max()) for batch in map(self._batch, range(len(self))))
        return int(self.lengths.sum(dtype=np.int64)) / padded


def tokens_per_batch() -> int:
    """Tokens of a batch without training: on a CPU the states of a layer should fit into its caches."""
    return 4096 if torch.cuda.is_available() else 1024


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of token ids. Returns ids and attention mask, both int64 [batch, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = torch.as_tensor(row)
        mask[r, : len(row)] = 1
    return ids, mask


def model_inputs(
    ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, pad_id: int
) -> dict[str, torch.Tensor]:
    """Pad a batch and name its parts as models do.

    Args:
        ids: token ids of each text.
        types: token types of each text, or None for a model without them.
        pad_id: id of the padding token.

    Returns:
        input_ids, attention_mask and perhaps token_type_ids, each int64 [batch, longest].
    """
    tokens, mask = pad(ids, pad_id)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    return inputs if types is None else inputs | {"token_type_ids": pad(types, 0)[0]}
