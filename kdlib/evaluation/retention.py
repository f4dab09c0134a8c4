"""What a model keeps of the teacher above chance, and how much room a task leaves."""

from collections.abc import Sequence

import numpy as np

from kdlib import config
from kdlib.data.tasks import Task
from kdlib.evaluation.baselines import chance
from kdlib.evaluation.benchmark import Trial
from kdlib.evaluation.metrics import Metric, resampled

CONTROLS = ("tf-idf", "static", "static SIF", "random weights")  # what a task must need a trained transformer to beat
AVERAGES = {"average": "all tasks", "with room": "tasks with room"}


def retention_rows(trials: Sequence[Trial], tasks: Sequence[Task], spec: config.Benchmark) -> list[dict]:
    """Chance, room and retention of a method's trials.

    Retention is (model - chance) / (teacher - chance). Its interval is over seeds and test items and includes the
    teacher's own uncertainty, since both scores are computed on the same resamples.

    Args:
        trials: of one method, the teacher's among them.
        tasks: the tasks of the trials.
        spec: rows and resamples.

    Returns:
        Rows by task of metric chance (model "chance"), room (model "teacher", arm: the best of `CONTROLS`; how much
        better the teacher is) and retention of each model; retention of the task "average", the mean over tasks of
        what is above chance, and of "with room", over the tasks whose room is surely above zero. Retention is left out
        where the teacher is not surely better than chance.
    """
    by_task: dict[str, dict[str, list[Metric]]] = {}
    for trial in trials:
        by_task.setdefault(trial.task, {}).setdefault(trial.model, []).append(trial.metrics[0])
    method = dict(method=trials[0].method) if trials else {}
    rows, above, roomy = [], {}, []
    for number, task in enumerate(task for task in tasks if task.name in by_task):
        labels, models = method | dict(task=task.name), by_task[task.name]
        guess = chance(task.small(spec.probe_rows, spec.probe_test_rows))[:1]
        rows.append(labels | dict(model="chance", metric="chance", value=guess[0].value, n=len(guess[0].items)))
        # The same seed draws the same items for each.
        drawn = {name: _spread(runs, spec, number) for name, runs in models.items()}
        base = _spread(guess, spec, number)
        if "teacher" not in drawn:
            continue
        found = {name: drawn[name] for name in CONTROLS if name in drawn}
        if found:
            best = max(found, key=lambda name: found[name][0])
            room = drawn["teacher"] - np.max(list(found.values()), axis=0)
            rows.append(
                labels | dict(model="teacher", arm=best, metric="room", n=len(guess[0].items)) | _interval(room)
            )
            if rows[-1]["low"] > 0:
                roomy.append(task.name)
        above[task.name] = {name: values - base for name, values in drawn.items()}
        rows += _retained({task.name: above[task.name]}, labels)
    rows += _retained(above, method | dict(task="average"))
    if roomy:
        rows += _retained({name: above[name] for name in roomy}, method | dict(task="with room"), len(roomy))
    return rows


def _spread(runs: Sequence[Metric], spec: config.Benchmark, seed: int) -> np.ndarray:
    """The mean over seeds, then its resamples: float [1 + resamples]."""
    return np.r_[np.mean([run.value for run in runs]), resampled(runs, spec.bootstrap, seed)]


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return dict(value=float(values[0]), low=float(low), high=float(high))


def _retained(above: dict[str, dict[str, np.ndarray]], labels: dict, n: int | None = None) -> list[dict]:
    """Rows of the share of what is above chance, [1 + resamples] by task and model, that each model keeps."""
    if not above:
        return []
    names = [name for name in next(iter(above.values())) if all(name in models for models in above.values())]
    means = {name: np.mean([models[name] for models in above.values()], axis=0) for name in names}
    if np.quantile(means["teacher"][1:], 0.025) <= 0:
        return []
    count = {} if n is None else dict(n=n)
    return [
        labels | dict(model=name, metric="retention") | count | _interval(means[name] / means["teacher"])
        for name in names
    ]
