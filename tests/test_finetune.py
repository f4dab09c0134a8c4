"""Fine-tuning and benchmark rows on tiny models and tasks that can be learned."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from kdlib import config
from kdlib.benchmark import compare
from kdlib.efficiency import size_rows, speed_rows
from kdlib.finetune import finetune
from kdlib.tasks import Split, Task

SPEC = config.Benchmark(
    seeds=[0, 1, 2], finetune_epochs=12.0, finetune_rate=5e-3, finetune_batch=16, bootstrap=100, latency_runs=3
)


def task(kind):
    texts = tiny.texts(140)
    if kind == "tokens":
        words = [text.split() for text in texts]
        rows = Split(words, [[int(word in ("aso", "pusa")) for word in row] for row in words])
        labels = ["O", "B-ANIMAL"]
    elif kind == "multilabel":
        rows, labels = (
            Split(texts, [[int(word in t.split()) for word in ("aso", "ang")] for t in texts]),
            ["aso", "ang"],
        )
    elif kind == "pair":
        seconds = tiny.texts(140, 5, 3)
        rows = Split(list(zip(texts, seconds)), [int(len(a.split()) > 3) for a in texts])
        labels = ["no", "yes"]
    else:
        rows, labels = Split(texts, [int(len(t.split()) > 3) for t in texts]), ["short", "long"]
    return Task(
        f"{kind} task",
        kind,
        labels,
        Split(rows.texts[:100], rows.targets[:100]),
        Split(rows.texts[100:], rows.targets[100:]),
    )


@pytest.mark.parametrize("kind", ["classify", "multilabel", "pair", "tokens"])
def test_every_kind_runs_and_scores_lie_between_0_and_1(kind):
    metrics = finetune(tiny.encoder(layers=2), task(kind), SPEC)
    assert all(0 <= m.value <= 1 and len(m.items) == 40 for m in metrics)


def test_what_can_be_learned_is_learned():
    assert finetune(tiny.encoder(layers=2), task("classify"), SPEC)[0].value > 0.85
    assert finetune(tiny.encoder(layers=2), task("tokens"), SPEC)[0].value > 0.85


def test_same_seed_same_score_and_the_encoder_is_left_alone():
    encoder = tiny.encoder(layers=2)
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    first, second = (finetune(encoder, task("classify"), SPEC, seed=4)[0].items for _ in range(2))
    assert np.array_equal(first, second)
    assert all(torch.equal(before[name], value) for name, value in encoder.model.state_dict().items())


def test_compare_gives_seed_rows_summaries_and_an_average():
    tasks = [task("classify"), task("tokens")]
    table = pd.DataFrame(compare({"teacher": tiny.encoder(layers=2)}, tasks, SPEC, "probe"))
    summary = table[table["seed"].isna() & (table["task"] != "average")]
    assert set(table["task"]) == {"classify task", "tokens task", "average"}
    for (name, metric), rows in table[table["seed"].notna()].groupby(["task", "metric"]):
        mean = summary[(summary["task"] == name) & (summary["metric"] == metric)].iloc[0]
        assert mean["value"] == pytest.approx(rows["value"].mean()) and len(rows) == 3
        assert mean["low"] <= mean["value"] + 1e-9 and mean["value"] <= mean["high"] + 1e-9
    heads = summary[summary["metric"].isin(["accuracy", "f1"])].groupby("task").first()
    assert set(heads.index) == {"classify task", "tokens task"}
    average = table[table["task"] == "average"].iloc[0]
    assert average["value"] == pytest.approx(
        np.mean([summary[(summary["task"] == "classify task") & (summary["metric"] == "accuracy")]["value"].iloc[0],
                 summary[(summary["task"] == "tokens task") & (summary["metric"] == "f1")]["value"].iloc[0]])
    )  # fmt: skip


def test_sizes_and_speeds_are_of_the_model_at_hand():
    encoder = tiny.encoder(layers=2)
    sizes = {row["metric"]: row["value"] for row in size_rows(encoder, "x")}
    assert sizes["parameters"] == sum(p.numel() for p in encoder.model.parameters())
    assert sizes["megabytes"] == sizes["parameters"] * 4 / 1e6
    rows = speed_rows({"a": encoder, "b": tiny.encoder(layers=1)}, tiny.texts(80), runs=3)
    assert {(r["model"], r["metric"]) for r in rows} == {
        (m, k) for m in "ab" for k in ("latency_ms", "sentences_per_second")
    }
    assert all(0 < r["low"] <= r["value"] <= r["high"] for r in rows)
