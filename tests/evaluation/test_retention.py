"""What is left of the teacher above chance, and whether a task leaves room to show it."""

import numpy as np
import pandas as pd
import pytest
import tiny

from kdlib.data.tasks import Split, Task
from kdlib.evaluation.baselines import chance, majority
from kdlib.evaluation.benchmark import Trial
from kdlib.evaluation.metrics import Metric, score
from kdlib.evaluation.retention import retention_rows

SPEC = tiny.SPEC.model_copy(update=dict(seeds=[0, 1], bootstrap=400))
LABELS = ["a", "b", "c", "d"]


def task_of(name, n=400):
    targets = [i % 4 for i in range(n)]
    return Task(name, "classify", LABELS, Split([f"t{i}" for i in range(n)], targets), Split(["x"] * n, targets))


def trials_of(task, accuracies, seed=0):
    """Trials whose models are right on this share of the test rows; easy rows are easy for all."""
    n = len(task.test)
    order = np.random.default_rng(seed).permutation(n)
    found = []
    for model, share in accuracies.items():
        right = order < share * n
        items = np.stack([right, np.ones(n)], 1).astype(float)
        found += [Trial(model, task.name, "probe", s, [Metric("accuracy", items)]) for s in SPEC.seeds]
    return found


def rows_of(tasks, accuracies):
    trials = [t for task, share in zip(tasks, accuracies, strict=True) for t in trials_of(task, share)]
    return pd.DataFrame(retention_rows(trials, tasks, SPEC)).set_index(["metric", "task", "model"])


def test_chance_is_subtracted_from_both_scores():
    rows = rows_of([task_of("one")], [{"teacher": 0.85, "student": 0.70, "tf-idf": 0.4}])
    base = rows.loc[("chance", "one", "chance"), "value"]
    kept = rows.loc[("retention", "one", "student")]
    assert kept["value"] == pytest.approx((0.70 - base) / (0.85 - base))
    assert kept["low"] < kept["value"] < kept["high"]
    teacher = rows.loc[("retention", "one", "teacher")]
    assert teacher["low"] == teacher["value"] == teacher["high"] == 1


def test_the_interval_is_that_of_the_ratio_where_student_and_teacher_are_drawn_together():
    rng, n, task = np.random.default_rng(1), 400, task_of("one")
    right = {name: rng.random(n) < share for name, share in (("teacher", 0.45), ("student", 0.42))}
    trials = [
        Trial(name, "one", "probe", seed, [Metric("accuracy", np.stack([hits, np.ones(n)], 1).astype(float))])
        for name, hits in right.items()
        for seed in SPEC.seeds
    ]
    rows = pd.DataFrame(retention_rows(trials, [task], SPEC)).query("metric == 'retention' and task == 'one'")
    kept = rows.set_index("model").loc["student"]
    guess = chance(task)[0].items[:, 0]
    drawn = rng.integers(n, size=(4000, n))
    ratios = (right["student"][drawn].mean(1) - guess[drawn].mean(1)) / (
        right["teacher"][drawn].mean(1) - guess[drawn].mean(1)
    )
    np.testing.assert_allclose([kept["low"], kept["high"]], np.quantile(ratios, [0.025, 0.975]), atol=0.06)


def test_room_is_the_lead_over_the_best_control_and_names_it():
    both = [task_of("room"), task_of("none")]
    scores = [
        {"teacher": 0.8, "student": 0.7, "tf-idf": 0.5, "static": 0.6},
        {"teacher": 0.8, "student": 0.75, "tf-idf": 0.82, "static": 0.6},
    ]
    rows = rows_of(both, scores)
    assert rows.loc[("room", "room", "teacher"), "value"] == pytest.approx(0.2)
    assert rows.loc[("room", "room", "teacher"), "arm"] == "static" and rows.loc[("room", "room", "teacher"), "low"] > 0
    assert rows.loc[("room", "none", "teacher"), "value"] == pytest.approx(-0.02)
    assert rows.loc[("room", "none", "teacher"), "arm"] == "tf-idf"
    only = rows.loc[("retention", "with room", "student")]
    assert only["value"] == rows.loc[("retention", "room", "student"), "value"] and only["n"] == 1
    assert rows.loc[("retention", "average", "student"), "value"] != only["value"]


def test_a_teacher_that_only_guesses_leaves_nothing_to_keep():
    rows = retention_rows(trials_of(task_of("one"), {"teacher": 0.26, "student": 0.3}), [task_of("one")], SPEC)
    assert {row["metric"] for row in rows} == {"chance"}


def test_the_best_guess_on_a_multilabel_task_may_be_to_say_yes_always():
    targets = [[1, 0]] * 45 + [[0, 1]] * 45 + [[0, 0]] * 10
    task = Task("m", "multilabel", ["a", "b"], Split(["x"] * 100, targets), Split(["x"] * 100, targets))
    yes = score(task, np.ones((100, 2), int))[0].value
    assert majority(task)[0].value == 0 and chance(task)[0].value == yes > 0.6


@pytest.mark.parametrize("kind", ["classify", "multilabel", "pair", "tokens"])
def test_chance_is_at_least_the_most_frequent_answer(kind):
    task = tiny.task(kind)
    assert chance(task)[0].value >= majority(task)[0].value
