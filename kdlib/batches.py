"""Batches by token budget: texts of like length together, so that almost no time goes into padding."""

import random
from collections.abc import Iterator, Sequence

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
        self.lengths, self.budget, self.seed, self.epoch = list(lengths), budget, seed, 0
        self._batches = self._plan()

    def _plan(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), BUCKET):
            bucket = sorted(order[start : start + BUCKET], key=lambda i: self.lengths[i])
            batches += budget_batches(self.lengths, self.budget, bucket)
        return batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self._batches)
        random.Random(f"{self.seed}-{self.epoch}").shuffle(batches)
        return iter(batches)

    def real_share(self) -> float:
        """Share of the tokens computed on that are not padding."""
        padded = sum(len(batch) * max(self.lengths[i] for i in batch) for batch in self._batches)
        return sum(self.lengths) / padded
