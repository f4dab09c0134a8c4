"""The benchmark: encoders side by side, by linear probe and by fine-tuning, over seeds, with intervals."""

from collections.abc import Sequence

import numpy as np

from kdlib import config
from kdlib.encoder import Encoder
from kdlib.finetune import finetune
from kdlib.metrics import Metric, interval, resampled
from kdlib.probe import linear_probe, task_vectors, train_targets
from kdlib.tasks import Task


def probe_runs(encoder: Encoder, task: Task, spec: config.Benchmark) -> list[list[Metric]]:
    """Linear probes on the last layer's states, one list of metrics per seed."""
    task = task.small(spec.probe_rows, spec.probe_test_rows)
    train, test, places = task_vectors(encoder, task)
    targets = train_targets(encoder, task)
    return [linear_probe(task, train[:, 0], targets, test[:, 0], places, seed, spec.probe_share) for seed in spec.seeds]


def finetune_runs(encoder: Encoder, task: Task, spec: config.Benchmark) -> list[list[Metric]]:
    """Fine-tuning runs, one list of metrics per seed."""
    return [finetune(encoder, task, spec, seed) for seed in spec.seeds]


def rows_of(runs: Sequence[Sequence[Metric]], spec: config.Benchmark, **labels) -> list[dict]:
    """Result rows: per seed the score with its interval over test items, and (seed empty) the mean over seeds with an
    interval over seeds and items together."""
    rows = []
    for k in range(len(runs[0])):
        metrics = [run[k] for run in runs]
        shared = dict(metric=metrics[0].name, n=len(metrics[0].items), **labels)
        for seed, metric in zip(spec.seeds, metrics):
            low, high = interval([metric], spec.bootstrap)
            rows.append(shared | dict(seed=seed, value=metric.value, low=low, high=high))
        low, high = interval(metrics, spec.bootstrap)
        rows.append(shared | dict(value=float(np.mean([m.value for m in metrics])), low=low, high=high))
    return rows


def average_row(runs: dict[str, Sequence[Sequence[Metric]]], spec: config.Benchmark, **labels) -> dict:
    """The mean over tasks of the headline score, with a bootstrap interval; tasks are resampled independently."""
    headline = {task: [run[0] for run in task_runs] for task, task_runs in runs.items()}
    value = float(np.mean([[m.value for m in metrics] for metrics in headline.values()]))
    samples = np.mean([resampled(metrics, spec.bootstrap, seed=i) for i, metrics in enumerate(headline.values())], 0)
    low, high = np.quantile(samples, [0.025, 0.975])
    return dict(
        task="average",
        metric="score",
        value=value,
        low=float(low),
        high=float(high),
        n=sum(len(m[0].items) for m in headline.values()),
        **labels,
    )


def compare(encoders: dict[str, Encoder], tasks: Sequence[Task], spec: config.Benchmark, method: str) -> list[dict]:
    """All encoders on all tasks. method: "probe" or "finetune"."""
    run = {"probe": probe_runs, "finetune": finetune_runs}[method]
    rows = []
    for name, encoder in encoders.items():
        runs = {task.name: run(encoder, task, spec) for task in tasks}
        for task, task_runs in runs.items():
            rows += rows_of(task_runs, spec, model=name, method=method, task=task)
        rows.append(average_row(runs, spec, model=name, method=method))
    return rows
