"""Figures: every one draws from a tidy table, twice the same bytes, with labels; a table with gaps says what is missing."""

import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kdlib import figures
from kdlib.errors import UserError
from kdlib.store import COLUMNS, read_results

TASKS = {"topic": "accuracy", "sentiment": "accuracy", "dengue": "macro_f1", "entailment": "accuracy", "entities": "f1"}
ITEMS = {"topic": 204, "sentiment": 400, "dengue": 400, "entailment": 400, "entities": 317}
SKILL = {"teacher": 0.80, "pruned teacher": 0.797, "student": 0.76, "no distillation": 0.52, "from scratch": 0.45}
LAYERS = 12


def scored(rng, value, n):
    """A score with the interval that n items would give it."""
    value = float(np.clip(value + rng.normal(0, 0.01), 0.05, 0.98))
    half = 1.96 * np.sqrt(value * (1 - value) / n)
    return {"value": value, "low": max(value - half, 0), "high": min(value + half, 1), "n": n}


def make_probe(rng, tasks, languages):
    rows = []
    for i, language in enumerate(languages):
        for metric, value in (("fertility", 1.2 + 0.13 * i), ("unknown_rate", 0.0002 * i), ("split_words", 0.3 + 0.05 * i)):
            rows.append({"language": language, "metric": metric, "value": value, "method": "parallel"})
    rows += [{"metric": "vocabulary_share", "value": 0.07}, {"metric": "vocabulary_used", "value": 17012}]
    for k, (task, metric) in enumerate(tasks.items()):
        common = {"task": task, "metric": metric, "method": "layer probe"}
        for layer in range(LAYERS + 1):
            value = 0.5 + 0.05 * k + 0.25 * np.sin(np.pi * (layer + 2) / (LAYERS + 5))
            rows.append(common | {"layer": layer} | scored(rng, value, ITEMS.get(task, 100)))
        rows.append(common | {"model": "majority", "value": 0.2 + 0.08 * k, "n": ITEMS.get(task, 100)})
    for i, language in enumerate(languages[1:]):
        common = {"language": language, "metric": "retrieval"}
        for layer in range(LAYERS + 1):
            value = 0.15 + 0.8 * layer / LAYERS - 0.12 * i * (layer / LAYERS)
            rows.append(common | {"method": "plain", "layer": layer} | scored(rng, value, 500))
            rows.append(common | {"method": "centred", "layer": layer} | scored(rng, value + 0.1, 500))
        rows.append(common | {"model": "word overlap", "method": "baseline"} | scored(rng, 0.1 + 0.08 * i, 500))
    for i in range(LAYERS + 1):
        for j in range(LAYERS + 1):
            rows.append({"metric": "cka", "layer": i, "x": j, "value": float(np.exp(-abs(i - j) / 14))})
    return rows


def make_prune(rng):
    rows = []
    for model, count in (("teacher", 250037), ("pruned teacher", 20400)):
        sizes = {"parameters": 21.5e6 + 384 * count, "megabytes": (21.5e6 + 384 * count) * 4 / 1e6, "rows": count}
        rows += [{"model": model, "metric": metric, "value": value} for metric, value in sizes.items()]
    scripts = ["Latn", "Cyrl", "Hani", "neutral", "Arab", "Hang", "Deva", "Grek", "Thai", "Hebr", "Beng", "Taml", "Cans"]
    for i, script in enumerate(scripts):
        kept = {"Latn": 17500, "neutral": 2900}.get(script, 0)
        rows.append({"metric": "rows_kept", "arm": script, "value": kept})
        rows.append({"metric": "rows_cut", "arm": script, "value": int(130000 / (i + 1) ** 1.2) - kept // 9})
    for method, loss in (("corpus", 0.0), ("heldout", 0.02)):
        for count in (500, 1000, 2000, 5000, 10000, 20400, 50000, 250037):
            value = min(1 - loss, 0.45 + 0.4 * np.log10(count / 300) / 1.2)
            rows.append({"metric": "coverage", "method": method, "x": count, "value": value})
    return [{"model": "pruned teacher"} | row for row in rows]


def make_distill(rng):
    rows = []
    for step in range(0, 701, 7):
        for method in ("train", "heldout") if step % 87 < 7 else ("train",):
            hidden = 1.1 * np.exp(-step / 90) + 0.07 + 0.01 * (method == "heldout") + abs(rng.normal(0, 0.004))
            values = {"hidden": hidden, "sentence": hidden * 0.2, "loss": hidden * 1.05}
            common = {"method": method, "x": step * 1.3, "n": step}
            rows += [common | {"metric": metric, "value": value} for metric, value in values.items()]
    return [{"model": "student"} | row for row in [*rows, {"metric": "tokens_per_second", "value": 1900.0}]]


def make_benchmark(rng, tasks, models):
    rows = []
    for m, (model, skill) in enumerate(models.items()):
        for method, gain in (("probe", 0.0), ("finetune", 0.04)):
            for k, (task, metric) in enumerate(tasks.items()):
                for name in dict.fromkeys((metric, "accuracy", "macro_f1")):
                    common = {"model": model, "method": method, "task": task, "metric": name}
                    for seed in (0, 1, 2, None):
                        rows.append(common | {"seed": seed} | scored(rng, skill + gain + 0.03 * (k - 2), ITEMS.get(task, 100)))
            average = {"model": model, "method": method, "task": "average", "metric": "score"}
            rows += [average | {"seed": seed} | scored(rng, skill + gain, 1700) for seed in (0, 1, 2, None)]
        size = {"teacher": 117.5e6, "pruned teacher": 29.3e6}.get(model, 15.0e6)
        rows += [{"model": model, "metric": metric, "value": size * scale} for metric, scale in (("parameters", 1), ("megabytes", 4e-6))]
        for device, speed in (("cpu", 1.0), ("cuda", 0.1)):
            value = speed * (30 if m < 2 else 11)
            spread = {"low": value * 0.9, "high": value * 1.15}
            rows.append({"model": model, "method": device, "metric": "latency_ms", "value": value} | spread)
            value = 4000 / value
            rows.append({"model": model, "method": device, "metric": "sentences_per_second", "value": value} | spread | {"low": value * 0.9, "high": value * 1.1})
    return rows


def make_ablate(rng, tasks):
    arms = {
        "fraction": {"10%": 0.1, "30%": 0.3, "50%": 0.5, "100%": 1.0},
        "init": dict.fromkeys(["alternate", "last", "first", "random"]),
        "objective": dict.fromkeys(["hidden", "sentence", "hidden + sentence", "hidden + attention"]),
    }
    chosen = dict(list(tasks.items())[:3]) | {"average": "score"}
    rows = []
    for family, values in arms.items():
        for i, (arm, x) in enumerate(values.items()):
            common = {"model": "student", "method": family, "arm": arm, "x": x, "seed": 0}
            for task, metric in chosen.items():
                n = 1000 if task == "average" else ITEMS.get(task, 100)
                rows.append(common | {"task": task, "metric": metric} | scored(rng, 0.62 + 0.04 * i, n))
            rows.append(common | {"metric": "heldout_loss", "value": 0.2 - 0.02 * i})
            rows.append(common | {"metric": "similarity", "value": 0.9 + 0.02 * i})
    for model in ("teacher", "no distillation"):
        for task, metric in chosen.items():
            n = 1000 if task == "average" else ITEMS.get(task, 100)
            rows.append({"model": model, "method": "reference", "task": task, "metric": metric} | scored(rng, SKILL[model], n))
    return rows


def make_table(path, tasks=TASKS, languages=("tgl", "eng", "spa", "ind", "ceb"), models=SKILL):
    """A table of all stages, as `read_results` gives it."""
    rng = np.random.default_rng(0)
    stages = {
        "probe": make_probe(rng, tasks, languages),
        "prune": make_prune(rng),
        "distill": make_distill(rng),
        "benchmark": make_benchmark(rng, tasks, models),
        "ablate": make_ablate(rng, tasks),
    }
    rows = [{"stage": stage, "model": "teacher", "language": languages[0]} | row for stage, rows in stages.items() for row in rows]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(path, index=False)
    return read_results(path)
