"""Batches by token budget: texts of like length together, so that almost no time goes into padding."""

import random
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

BUCKET = 4096  # texts that are sorted by length together; larger wastes less, smaller shuffles better


def budget_batches(lengths: Sequence[int], budget: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Indices grouped so that rows x longest row stays within `budget` tokens; a longer text is a batch alone.

    order: the order to fill batches in; default by length, longest first (so that memory peaks at once).
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
    """A batch sampler: shuffled buckets, sorted inside, cut by token budget, the batches shuffled.

    Every epoch holds each index once, in the same batches; their order is the epoch's own, fixed by `seed` and the
    epoch, so that a resumed run finds its place again.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int = 0):
        self.lengths, self.budget, self.seed, self.epoch = np.asarray(lengths, np.int32), budget, seed, 0
        self.order, self.ends = self._plan()

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """The indices, batch by batch, and where each batch ends: 4 bytes a text, lists would be twenty times that."""
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
        """Share of the tokens computed on that are not padding."""
        padded = sum(len(batch) * int(self.lengths[batch].max()) for batch in map(self._batch, range(len(self))))
        return int(self.lengths.sum(dtype=np.int64)) / padded


def tokens_per_batch() -> int:
    """Tokens that one batch holds where nothing is trained.

    On a CPU the states of one layer should fit into the caches; a GPU wants larger batches.
    """
    return 4096 if torch.cuda.is_available() else 1024


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [batch, longest] and attention mask of the same shape, both int64."""
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
    """A padded batch by the model's own names, each int64 [batch, longest].

    Input_ids, attention_mask and, unless `types` is None, token_type_ids.
    """
    tokens, mask = pad(ids, pad_id)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    return inputs if types is None else inputs | {"token_type_ids": pad(types, 0)[0]}
