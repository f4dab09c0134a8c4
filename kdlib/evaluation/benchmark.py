"""The benchmark: encoders side by side, by linear probe and by fine-tuning, over seeds, with intervals."""

import functools
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlib import config
from kdlib.data.tasks import Task
from kdlib.errors import UserError
from kdlib.evaluation.finetuning import Tokens, finetune
from kdlib.evaluation.metrics import Metric, resampled, summary
from kdlib.evaluation.probing import best_layer, linear_probe, task_vectors, train_targets
from kdlib.evaluation.tf_idf import TfIdf, tf_idf
from kdlib.files import fingerprint, new_file, read_or_none
from kdlib.models.encoder import Encoder

Model = Encoder | TfIdf  # a contestant

# train and test once: seed, examples per class (few-shot), folder of checkpoints -> metrics
Evaluate = Callable[[int, int | None, Path | None], list[Metric]]


@dataclass
class Trial:
    """One encoder trained on one task with one seed.

    Args:
        model: the name that results show.
        task: the task's name.
        method: one of `METHODS`.
        seed: of the trial.
        metrics: the headline first; they hold what each test item adds to the score.
        x: examples per class where the method is "fewshot", else None.
    """

    model: str
    task: str
    method: str
    seed: int
    metrics: list[Metric]
    x: int | None = None


def _probe(encoder: Model, task: Task, spec: config.Benchmark) -> Evaluate:
    task = task.small(spec.probe_rows, spec.probe_test_rows)
    if isinstance(encoder, TfIdf):
        evaluate = tf_idf(task, spec.probe_share)
        return lambda seed, *_: evaluate(seed)
    train, test, places = task_vectors(encoder, task)
    targets = train_targets(encoder, task)
    return lambda seed, *_: linear_probe(task, train[:, 0], targets, test[:, 0], places, seed, spec.probe_share)


def _best_layer(encoder: Model, task: Task, spec: config.Benchmark) -> Evaluate:
    assert isinstance(encoder, Encoder)
    task = task.small(spec.probe_rows, spec.probe_test_rows)
    train, test, places = task_vectors(encoder, task, range(encoder.layers + 1))
    targets = train_targets(encoder, task)
    best = best_layer(task, train, targets)
    layer = Metric("layer", np.array([[best, 1.0]]))
    return lambda seed, *_: [
        *linear_probe(task, train[:, best], targets, test[:, best], places, seed, spec.probe_share), layer
    ]  # fmt: skip


def _finetune(encoder: Model, task: Task, spec: config.Benchmark) -> Evaluate:
    tokens = None if isinstance(encoder, TfIdf) else Tokens(encoder, spec.finetune_max_length)

    def evaluate(seed: int, examples: int | None, work: Path | None) -> list[Metric]:
        if examples is None:
            drawn, steps = task.small(spec.finetune_rows, spec.finetune_test_rows, seed), 0
        else:
            drawn, steps = task.few(examples, spec.finetune_test_rows, seed), spec.fewshot_steps
        if isinstance(encoder, TfIdf) or tokens is None:
            return tf_idf(drawn)(seed)
        return finetune(encoder, drawn, spec, seed, tokens, steps, work)

    return evaluate


METHODS = {"probe": _probe, "best layer": _best_layer, "finetune": _finetune, "fewshot": _finetune}
# Settings that no trial depends on: the key has its own seed and size, and the others are used after the trials.
UNREAD = ("seeds", "fewshot", "margin", "latency_runs", "bootstrap")
UNREAD_BY = {  # settings that the trials of one method do not depend on, by prefix
    "probe": ("finetune_", "fewshot_", "freeze_embeddings"),
    "best layer": ("finetune_", "fewshot_", "freeze_embeddings"),
    "finetune": ("probe_", "fewshot_"),
    "fewshot": ("probe_", "finetune_rows"),
}


def trial_settings(spec: config.Benchmark, method: str) -> dict[str, Any]:
    """The settings that the result of a trial depends on. A new setting is one of them unless it is listed above."""
    unread = UNREAD_BY[method]
    return {name: value for name, value in spec if name not in UNREAD and not name.startswith(unread)}


def run_trials(
    encoders: Mapping[str, Model | Callable[[], Model]],
    tasks: Sequence[Task],
    spec: config.Benchmark,
    method: str,
    folder: Path | None = None,
    keys: Mapping[str, str] | None = None,
) -> list[Trial]:
    """Every encoder on every task with every seed.

    What is drawn, training rows and order, depends on the seed alone, so that the trials of two encoders are paired.

    Args:
        encoders: by display name. One that is given as a function is loaded when it is first needed, and not at
            all where all its trials are kept.
        tasks: what is trained and tested on.
        spec: seeds, sizes and settings.
        method: "probe" (a linear probe on the last layer), "best layer" (on the layer that does best on a quarter of
            the training rows; its number is a metric too), "finetune", or "fewshot" (fine-tuning on `spec.fewshot`
            examples per class, see `Task.few` and `fewshot_sizes`).
        folder: where each trial is kept as soon as it is done; what is there is not run again.
        keys: with a folder, for each encoder a fingerprint of all that its vectors depend on. Task rows and settings
            are added here.
    """
    settings, contents = trial_settings(spec, method), {task.name: _content(task) for task in tasks if folder}
    trials = []
    for name, given in encoders.items():
        load = functools.cache(given if callable(given) else lambda given=given: given)
        for task in tasks:
            sizes = fewshot_sizes(task, spec) if method == "fewshot" else [None]
            key = fingerprint(keys[name], contents[task.name], method, settings) if folder and keys else ""
            evaluate = functools.cache(lambda load=load, task=task: METHODS[method](load(), task, spec))
            for x, seed in itertools.product(sizes, spec.seeds):
                about = dict(model=name, task=task.name, method=method, x=x, seed=seed)
                file = folder / f"{fingerprint(key, x, seed)}.npz" if folder else None
                work = file and file.with_name(f"{file.stem}-checkpoints")
                metrics = load_metrics(file) if file else None
                if metrics is None:
                    metrics = evaluate()(seed, x, work)
                    if file:
                        save_metrics(file, metrics, about)
                if work:
                    shutil.rmtree(work, ignore_errors=True)
                trials.append(Trial(name, task.name, method, seed, metrics, x))
    return trials


def fewshot_sizes(task: Task, spec: config.Benchmark) -> list[int]:
    """The examples per class that few-shot trials of a task take.

    These are `spec.fewshot` as far as the largest class has so many. Larger sizes mean all rows, which are taken once,
    under the size of the largest class.
    """
    largest = max(Counter(name for target in task.train.targets for name in task.classes(target)).values())
    return sorted({min(size, largest) for size in spec.fewshot})


def _content(task: Task) -> str:
    return fingerprint(task.kind, task.labels, task.train.texts, task.train.targets, task.test.texts, task.test.targets)


def save_metrics(file: Path, metrics: Sequence[Metric], about: dict) -> None:
    """Write the metrics of a trial with their items, and `about`, which tells a reader what the file is."""
    with new_file(file) as path:
        items: dict[str, Any] = {metric.name: metric.items for metric in metrics}
        np.savez_compressed(path, about=np.array(json.dumps(about)), **items)


def load_metrics(file: Path) -> list[Metric] | None:
    """The metrics kept in a file; None where it is absent or, with a warning, damaged (zip files have checksums)."""

    def read(path: Path) -> list[Metric]:
        with np.load(path, allow_pickle=False) as kept:
            return [Metric(name, kept[name]) for name in kept.files if name != "about"]

    return read_or_none(file, read, "the trial is run again")


def save_trials(file: Path, trials: Sequence[Trial]) -> None:
    """Write trials with their metrics' items into one file."""
    about = [dict(vars(trial), metrics=[metric.name for metric in trial.metrics]) for trial in trials]
    items = {f"{i} {metric.name}": metric.items for i, trial in enumerate(trials) for metric in trial.metrics}
    np.savez_compressed(file, about=np.array(json.dumps(about)), **items)


def load_trials(file: Path) -> list[Trial]:
    """Read what `save_trials` wrote. Raises UserError for a damaged file."""

    def read(path: Path) -> list[Trial]:
        with np.load(path, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            for i, trial in enumerate(about):
                trial["metrics"] = [Metric(name, kept[f"{i} {name}"]) for name in trial["metrics"]]
        return [Trial(**trial) for trial in about]

    trials = read_or_none(file, read, "its trials are run again")
    if trials is None:
        raise UserError(f"{file}: cannot be read; remove its folder, and run the same command again")
    return trials


def trial_rows(trials: Sequence[Trial], spec: config.Benchmark) -> list[dict]:
    """Result rows of trials: `score_rows` of each model, task and size, and the `average_row` over tasks.

    There is an average at the sizes that all tasks of the model have.
    """
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


def score_rows(runs: Sequence[Sequence[Metric]], spec: config.Benchmark, **labels: Any) -> list[dict]:
    """Rows of each seed's score and (seed empty) of the mean over seeds, for each metric.

    Args:
        runs: the metrics of one task, a list per seed.
        spec: its seeds, and the number of bootstrap samples. Intervals of one seed are over test items, those of the
            mean over seeds and items together.
        labels: columns that all rows have.
    """
    rows = []
    for metrics in zip(*runs, strict=True):
        for seed, metric in zip(spec.seeds, metrics, strict=True):
            rows.append(labels | dict(seed=seed) | summary([metric], spec.bootstrap))
        rows.append(labels | summary(metrics, spec.bootstrap))
    return rows


def average_row(runs: Mapping[str, Sequence[Sequence[Metric]]], spec: config.Benchmark, **labels: Any) -> dict:
    """The mean over tasks of the headline score, with a bootstrap interval; tasks are resampled independently.

    Args:
        runs: by task, a list of metrics per seed.
        spec: the number of bootstrap samples.
        labels: columns that the row has too.
    """
    headlines = [[run[0] for run in task_runs] for task_runs in runs.values()]
    value = float(np.mean([[metric.value for metric in metrics] for metrics in headlines]))
    samples = np.mean([resampled(metrics, spec.bootstrap, seed=i) for i, metrics in enumerate(headlines)], 0)
    low, high = (float(bound) for bound in np.quantile(samples, [0.025, 0.975]))
    count = sum(len(metrics[0].items) for metrics in headlines)
    return labels | dict(task="average", metric="score", value=value, low=low, high=high, n=count)
