"""Batches by token budget: how much of what is computed on is text."""

import numpy as np

from benchmarks.common import main, row, workshop
from benchmarks.reference import BATCH, LENGTH
from kdlib.batching import BudgetSampler


def measure(quick: bool = False) -> list[dict]:
    job = workshop(500 if quick else 10**9)
    lengths = np.array([len(ids) for ids in job.train.ids])
    shuffled = np.random.default_rng(0).permutation(lengths)
    random = [shuffled[start : start + BATCH] for start in range(0, len(shuffled), BATCH)]
    padded = sum(len(batch) * batch.max() for batch in random)
    ours = BudgetSampler(lengths.tolist(), job.spec.batch_tokens).real_share()
    how = f"{len(lengths):,} texts of the corpus, {lengths.mean():.0f} tokens on average, 5 to 95%: "
    how += "{:.0f} to {:.0f}".format(*np.quantile(lengths, [0.05, 0.95]))
    other = f"of {BATCH} texts at random"
    return [
        row("share of real tokens in the kit's batches", ours, unit="share", at_least=0.95, note=how),
        row(f"share of real tokens, compared with batches {other}", ours, lengths.sum() / padded, "share"),
        row(f"share of real tokens, compared with texts padded to {LENGTH}", ours,
            np.minimum(lengths, LENGTH).sum() / (len(lengths) * LENGTH), "share"),
    ]  # fmt: skip


if __name__ == "__main__":
    main(measure)
