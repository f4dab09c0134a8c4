"""Baselines that read no text: guesses, and shared words."""

from collections.abc import Sequence

import numpy as np

from kdlib.data.tasks import Task
from kdlib.evaluation.metrics import Metric, score


def majority(task: Task) -> list[Metric]:
    """The score of always giving the answer that is most frequent in training."""
    if task.kind == "tokens":
        return score(task, [[0] * len(words) for words in task.test.texts])
    targets = np.asarray(task.train.targets)
    if task.kind == "multilabel":
        answer = (targets.mean(0) > 0.5).astype(int)
        return score(task, np.tile(answer, (len(task.test), 1)))
    return score(task, np.full(len(task.test), np.bincount(targets).argmax()))


def chance(task: Task, seed: int = 0) -> list[Metric]:
    """The best score of three guesses that read no text: what a score must be compared with.

    The guesses are the most frequent answer in training, every label (kind multilabel, where it has a high F1), and
    answers drawn as often as they are in training.
    """
    rng, targets = np.random.default_rng(seed), task.train.targets
    guesses = [majority(task)]
    if task.kind == "multilabel":
        guesses.append(score(task, np.ones((len(task.test), len(task.labels)), int)))
    if task.kind == "tokens":
        tags = np.array([tag for row in targets for tag in row])
        guesses.append(score(task, [rng.choice(tags, len(words)).tolist() for words in task.test.texts]))
    else:
        guesses.append(score(task, np.asarray(targets)[rng.integers(len(targets), size=len(task.test))]))
    return max(guesses, key=lambda metrics: metrics[0].value)


def word_overlap_retrieval(queries: Sequence[str], targets: Sequence[str]) -> np.ndarray:
    """Translation retrieval by shared words (Jaccard) alone: bool [rows], as `probing.retrieval`."""
    sides = [[set(text.lower().split()) for text in texts] for texts in (queries, targets)]
    nearest = [int(np.argmax([len(q & t) / max(1, len(q | t)) for t in sides[1]])) for q in sides[0]]
    return np.array(nearest) == np.arange(len(queries))
