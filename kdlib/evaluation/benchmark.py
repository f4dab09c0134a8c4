"""The benchmark: encoders side by side, by linear probe and by fine-tuning, over seeds, with intervals."""

import functools
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdlib import config
from kdlib.data.tasks import Task
from kdlib.evaluation.finetuning import Tokens, finetune
from kdlib.evaluation.metrics import Metric, interval, resampled
from kdlib.evaluation.probing import linear_probe, task_vectors, train_targets
from kdlib.files import fingerprint, new_file
from kdlib.models.encoder import Encoder

log = logging.getLogger(__name__)
# seed, examples per class, a folder for checkpoints -> the task's metrics
Attempt = Callable[[int, int | None, Path | None], list[Metric]]


@dataclass
class Trial:
    """One encoder trained on one task with one seed: its metrics, which hold what each test item adds to the score.

    x: examples per class (method "fewshot"), else None.
    """

    model: str
    task: str
    method: str
    seed: int
    metrics: list[Metric]
    x: int | None = None


def _probing(encoder: Encoder, task: Task, spec: config.Benchmark) -> Attempt:
    task = task.small(spec.probe_rows, spec.probe_test_rows)
    train, test, places = task_vectors(encoder, task)
    targets = train_targets(encoder, task)
    return lambda seed, *_: linear_probe(task, train[:, 0], targets, test[:, 0], places, seed, spec.probe_share)


def _finetuning(encoder: Encoder, task: Task, spec: config.Benchmark) -> Attempt:
    tokens = Tokens(encoder, spec.finetune_max_length)

    def attempt(seed: int, count: int | None, work: Path | None) -> list[Metric]:
        if count is None:
            drawn, steps = task.small(spec.finetune_rows, spec.finetune_test_rows, seed), 0
        else:
            drawn, steps = task.few(count, spec.finetune_test_rows, seed), spec.fewshot_steps
        return finetune(encoder, drawn, spec, seed, tokens, steps, work)

    return attempt


METHODS = {"probe": _probing, "finetune": _finetuning, "fewshot": _finetuning}
_TUNING = ["test_rows", "head", "epochs", "rate", "batch", "max_length", "fp16"]
SETTINGS = {  # the keys of the profile's benchmark section that a trial's result depends on
    "probe": ["probe_share", "probe_rows", "probe_test_rows"],
    "finetune": [f"finetune_{key}" for key in [*_TUNING, "rows"]] + ["freeze_embeddings"],
    "fewshot": [f"finetune_{key}" for key in _TUNING] + ["freeze_embeddings", "fewshot_steps"],
}


def run_trials(
    encoders: Mapping[str, Encoder | Callable[[], Encoder]],
    tasks: Sequence[Task],
    spec: config.Benchmark,
    method: str,
    folder: Path | None = None,
    keys: Mapping[str, str] | None = None,
) -> list[Trial]:
    """Every encoder on every task with every seed.

    method: "probe" (a linear probe on the last layer), "finetune", or "fewshot" (fine-tuning on spec.fewshot examples
    per class, see `Task.few` and `sizes`). What is drawn, training rows and order, depends on the seed alone, so that
    the trials of two encoders are paired.

    encoders: by the name to show; one given as a function is made when it is first needed, and not at all where all its
    trials are kept. folder: where each trial is kept as soon as it is done; what is there is not run again. keys (with
    a folder): for every encoder a fingerprint of all that its vectors depend on; the task's rows and the settings that
    matter are added to it here.
    """
    settings = [getattr(spec, key) for key in SETTINGS[method]]
    contents = {task.name: _content(task) for task in tasks} if folder else {}
    trials = []
    for name, given in encoders.items():
        load = functools.cache(given if callable(given) else lambda given=given: given)
        for task in tasks:
            attempt = None
            for x, seed in itertools.product(fewshot_sizes(task, spec) if method == "fewshot" else [None], spec.seeds):
                about = dict(model=name, task=task.name, method=method, x=x, seed=seed)
                key = folder and fingerprint(keys[name], contents[task.name], method, settings, x, seed)
                file, work = (folder / f"{key}.npz", folder / f"{key}-checkpoints") if folder else (None, None)
                metrics = load_metrics(file) if file else None
                if metrics is None:
                    attempt = attempt or METHODS[method](load(), task, spec)
                    metrics = attempt(seed, x, work)
                    if file:
                        save_metrics(file, metrics, about)
                if work:
                    shutil.rmtree(work, ignore_errors=True)
                trials.append(Trial(metrics=metrics, **about))
    return trials


def fewshot_sizes(task: Task, spec: config.Benchmark) -> list[int]:
    """The examples per class that few-shot trials of a task take: spec.fewshot, where the largest class has so many;
    every larger size comes to all rows, which are taken once, under the number of the largest class."""
    largest = max(Counter(name for target in task.train.targets for name in task.classes(target)).values())
    return sorted({min(size, largest) for size in spec.fewshot})


def _content(task: Task) -> str:
    return fingerprint(task.kind, task.labels, task.train.texts, task.train.targets, task.test.texts, task.test.targets)


def save_metrics(file: Path, metrics: Sequence[Metric], about: dict) -> None:
    """Keep a trial's metrics, items and all; `about` says whose they are to people who look."""
    with new_file(file) as path:
        items = {metric.name: metric.items for metric in metrics}
        np.savez_compressed(path, about=np.array(json.dumps(about)), **items)


def load_metrics(file: Path) -> list[Metric] | None:
    """The metrics kept in a file; None where there is none, or it is damaged (zip files carry checksums)."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            return [Metric(name, kept[name]) for name in kept.files if name != "about"]
    except Exception as error:  # a dozen kinds, and for all of them the trial is run again
        if file.exists():
            log.warning("%s: damaged (%s); the trial is run again", file, type(error).__name__)
        return None


def trial_rows(trials: Sequence[Trial], spec: config.Benchmark) -> list[dict]:
    """Result rows of trials: `rows_of` every model, task and size, and where a model has all of its tasks at a size,
    their `average_row`."""
    runs: dict[tuple, dict[str, list[list[Metric]]]] = {}
    tasks: dict[tuple, set[str]] = {}
    for trial in trials:
        runs.setdefault((trial.model, trial.method, trial.x), {}).setdefault(trial.task, []).append(trial.metrics)
        tasks.setdefault((trial.model, trial.method), set()).add(trial.task)
    out = []
    for (model, method, x), by_task in runs.items():
        labels = dict(model=model, method=method) | ({} if x is None else dict(x=x))
        for task, task_runs in by_task.items():
            out += score_rows(task_runs, spec, task=task, **labels)
        if by_task.keys() == tasks[model, method]:
            out.append(average_row(by_task, spec, **labels))
    return out


def score_rows(runs: Sequence[Sequence[Metric]], spec: config.Benchmark, **labels) -> list[dict]:
    """Result rows: per seed the score with its interval over test items, and (seed empty) the mean over seeds with an
    interval over seeds and items together."""
    rows = []
    for k in range(len(runs[0])):
        metrics = [run[k] for run in runs]
        shared = dict(metric=metrics[0].name, n=len(metrics[0].items), **labels)
        for seed, metric in zip(spec.seeds, metrics, strict=True):
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


def probe_runs(encoder: Encoder, task: Task, spec: config.Benchmark) -> list[list[Metric]]:
    """Linear probes of one encoder on one task, one list of metrics per seed."""
    return [trial.metrics for trial in run_trials({encoder.name: encoder}, [task], spec, "probe")]
