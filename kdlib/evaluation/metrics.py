"""Scores with intervals: every metric is a function of sums over test items, so that items can be resampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from kdlib.data.tasks import Task

CHUNK = 100  # bootstrap resamples drawn at a time, so that memory does not grow with their number


@dataclass
class Metric:
    """items: float [items, k], what each test item adds to the sums that the score `name` is a function of: how many
    are right, of how many (accuracy), or for each class the true positives, the predicted, the gold (F1)."""

    name: str
    items: np.ndarray

    def score(self, sums: np.ndarray) -> np.ndarray:
        """Sums [..., k] -> score [...]."""
        return _share(sums) if self.name == "accuracy" else _f1(sums)

    @property
    def value(self) -> float:
        return float(self.score(self.items.sum(0)))


def _f1(sums: np.ndarray) -> np.ndarray:
    """Mean F1 over classes; sums [..., classes * 3] of true positives, predicted, gold.

    A class that is nowhere counts 0.
    """
    hits, predicted, gold = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    return (2 * hits / np.maximum(predicted + gold, 1)).mean(-1)


def _share(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def score(task: Task, predicted: Sequence) -> list[Metric]:
    """The task's metrics, the headline one first.

    classify and pair: accuracy, macro F1. multilabel: macro F1, micro F1, accuracy (all labels of an item right).
    tokens: entity F1 as seqeval counts it (an entity is right if kind and both ends are), accuracy of tags.
    predicted: one label index per item; for multilabel [items, labels] of 0/1; for tokens a list of indices per item.
    """
    gold = task.test.targets
    if task.kind == "tokens":
        pairs = [_entity_counts(g, p, task.labels) for g, p in zip(gold, predicted, strict=True)]
        right = [[sum(a == b for a, b in zip(g, p)), len(g)] for g, p in zip(gold, predicted)]
        return [Metric("f1", np.array(pairs, float)), Metric("accuracy", np.array(right, float))]
    gold, predicted = np.asarray(gold), np.asarray(predicted)
    if task.kind == "multilabel":
        hot_gold, hot_predicted = gold, predicted
        exact = (gold == predicted).all(1)
    else:
        classes = np.arange(len(task.labels))
        hot_gold, hot_predicted = (gold[:, None] == classes), (predicted[:, None] == classes)
        exact = gold == predicted
    counts = np.stack([hot_gold & hot_predicted, hot_predicted, hot_gold], -1).astype(float)  # [items, classes, 3]
    macro = Metric("macro_f1", counts.reshape(len(gold), -1))
    micro = Metric("micro_f1", counts.sum(1))
    accuracy = Metric("accuracy", np.stack([exact, np.ones_like(exact)], 1).astype(float))
    return [macro, micro, accuracy] if task.kind == "multilabel" else [accuracy, macro]


def _entity_counts(gold: Sequence[int], predicted: Sequence[int], labels: list[str]) -> list[int]:
    true, found = (set(get_entities([labels[i] for i in tags])) for tags in (gold, predicted))
    return [len(true & found), len(found), len(true)]


def headline(kind: str) -> str:
    """The metric a task of this kind is judged by."""
    return {"tokens": "f1", "multilabel": "macro_f1"}.get(kind, "accuracy")


def interval(runs: Sequence[Metric], resamples: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean over seeds, resampling seeds and test items together.

    runs: the same metric on the same items, one per seed. Follows the paired-items scheme of Efron and
    Tibshirani (1993), ch. 13.
    """
    samples = resampled(runs, resamples, seed)
    tail = (1 - level) / 2
    return float(np.quantile(samples, tail)), float(np.quantile(samples, 1 - tail))


def resampled(runs: Sequence[Metric], resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Bootstrap samples [resamples] of the mean over seeds. The same seed draws the same items for every model, so
    that differences between models are paired."""
    rng = np.random.default_rng(seed)
    count = len(runs[0].items)
    sums: list[list[np.ndarray]] = [[] for _ in runs]
    for start in range(0, resamples, CHUNK):
        weights = _times(rng, min(CHUNK, resamples - start), count)
        for run, chunks in zip(runs, sums):
            chunks.append(weights @ run.items)
    chosen = rng.integers(0, len(runs), (resamples, len(runs)))
    scores = np.stack([run.score(np.concatenate(chunks)) for run, chunks in zip(runs, sums)], axis=1)
    return np.take_along_axis(scores, chosen, axis=1).mean(axis=1)


def _times(rng: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    """How many times each of `count` items is in each resample: float [resamples, count].

    Counting what was drawn is five times as fast as a multinomial draw.
    """
    drawn = rng.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)


def share_interval(hits: np.ndarray) -> dict[str, float]:
    """A share with its Wilson 95% interval: value, low, high."""
    n, p, z = len(hits), float(np.mean(hits)), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return dict(value=p, low=float(middle - half), high=float(middle + half))
