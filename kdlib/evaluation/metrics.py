"""Scores with intervals: the metrics of a task, the counts they are made of, and the resampling of counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from seqeval.metrics.sequence_labeling import get_entities

from kdlib.data.tasks import Task

METRICS = {  # the metrics of each kind of task, the headline first
    "classify": ("accuracy", "macro_f1"),
    "pair": ("accuracy", "macro_f1"),
    "multilabel": ("macro_f1", "micro_f1", "accuracy"),  # accuracy: all labels of an item are right
    "tokens": (
        "f1",
        "accuracy",
    ),  # f1 and precision of entities, as in seqeval: kind and both ends are right; accuracy of tags
}
CHUNK = 100  # bootstrap resamples drawn at a time, so that memory does not grow with their number


@dataclass
class Metric:
    """A score as a function of sums over test items, so that items can be resampled.

    Args:
        name: "accuracy", "f1", "macro_f1" or "micro_f1"; or a mean, such as "similarity".
        items: float [items, k], what each test item adds to the sums. F1: for each class the true positives, the
            predicted and the gold. Accuracy: how many are right, and of how many. Other means: the value, and 1.
    """

    name: str
    items: np.ndarray

    def score(self, sums: np.ndarray) -> np.ndarray:
        """Sums [..., k] -> score [...]. Macro F1 counts a class that is nowhere as 0."""
        if not self.name.endswith("f1"):
            return sums[..., 0] / sums[..., 1]
        hits, predicted, gold = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
        return (2 * hits / np.maximum(predicted + gold, 1)).mean(-1)

    @property
    def value(self) -> float:
        """The score of all items."""
        return float(self.score(self.items.sum(0)))


def headline(kind: str) -> str:
    """The metric that a task of this kind is judged by."""
    return METRICS[kind][0]


def score(task: Task, predicted: Sequence[Any] | np.ndarray) -> list[Metric]:
    """The metrics of a task, the headline first.

    Args:
        task: its test targets are the gold answers.
        predicted: one label index per item; for multilabel [items, labels] of 0/1; for tokens a list of label indices
            per item.
    """
    counts = (_count_tags if task.kind == "tokens" else _count_labels)(task, predicted)
    return [Metric(name, counts[name]) for name in METRICS[task.kind]]


def _count_tags(task: Task, predicted: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
    """With a class for every word (no tag O, as for parts of speech) each word is an entity: f1 is the accuracy."""
    entities, right = [], []
    spans = (lambda tags: get_entities([task.labels[tag] for tag in tags])) if "O" in task.labels else enumerate
    for pair in zip(task.test.targets, predicted, strict=True):
        gold, found = (set(spans(tags)) for tags in pair)
        entities.append([len(gold & found), len(found), len(gold)])
        right.append([sum(a == b for a, b in zip(*pair, strict=False)), len(pair[0])])
    return {"f1": np.array(entities, float), "accuracy": np.array(right, float)}


def _count_labels(task: Task, predicted: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
    gold, found = np.asarray(task.test.targets), np.asarray(predicted)
    right = gold == found
    if task.kind == "multilabel":
        right = right.all(1)
    else:
        classes = np.arange(len(task.labels))
        gold, found = gold[:, None] == classes, found[:, None] == classes
    counts = np.stack([gold & found, found, gold], -1).astype(float)  # [items, classes, 3]
    return {
        "macro_f1": counts.reshape(len(gold), -1),
        "micro_f1": counts.sum(1),
        "accuracy": np.stack([right, np.ones_like(right)], 1).astype(float),
    }


def summary(runs: Sequence[Metric], resamples: int = 1000) -> dict[str, Any]:
    """Metric, value, low, high and n of a row of results: the mean over `runs`, one per seed, with its interval."""
    low, high = interval(runs, resamples)
    mean = float(np.mean([run.value for run in runs]))
    return dict(metric=runs[0].name, value=mean, low=low, high=high, n=len(runs[0].items))


def interval(runs: Sequence[Metric], resamples: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean over seeds; seeds and test items are resampled together.

    Args:
        runs: the same metric on the same items, one per seed.
        resamples: number of bootstrap samples.
        seed: fixes what is drawn.
        level: share of the samples within the interval.

    References:
        Efron and Tibshirani (1993), *An Introduction to the Bootstrap*, ch. 13.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(resampled(runs, resamples, seed), [tail, 1 - tail])
    return float(low), float(high)


def resampled(runs: Sequence[Metric], resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Bootstrap samples [resamples] of the mean over seeds; arguments as `interval`.

    The same seed draws the same items for every model, so that differences between models are paired.
    """
    rng = np.random.default_rng(seed)
    count = len(runs[0].items)
    sums: list[list[np.ndarray]] = [[] for _ in runs]
    for start in range(0, resamples, CHUNK):
        weights = _draw_counts(rng, min(CHUNK, resamples - start), count)
        for run, chunks in zip(runs, sums, strict=True):
            chunks.append(weights @ run.items)
    chosen = rng.integers(0, len(runs), (resamples, len(runs)))
    scores = np.stack([run.score(np.concatenate(chunks)) for run, chunks in zip(runs, sums, strict=True)], axis=1)
    return np.take_along_axis(scores, chosen, axis=1).mean(axis=1)


def _draw_counts(rng: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    """How many times each of `count` items is in each resample: float [resamples, count].

    Counting drawn items is five times as fast as a multinomial draw.
    """
    drawn = rng.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)


def share_interval(hits: np.ndarray) -> dict[str, float]:
    """The share of True in `hits` with its Wilson 95% interval: value, low, high."""
    found = binomtest(int(np.sum(hits)), len(hits)).proportion_ci(method="wilson")
    return dict(value=float(np.mean(hits)), low=float(found.low), high=float(found.high))
