"""Metrics equal those of scikit-learn and seqeval; intervals contain the value, narrow with n and are reproducible."""

import numpy as np
import pytest
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import accuracy_score, f1_score

from kdlib.data.tasks import Split, Task
from kdlib.evaluation.metrics import CHUNK, METRICS, headline, interval, resampled, score, share_interval, summary

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]


def task_of(kind, labels, targets):
    split = Split([f"t{i}" for i in range(len(targets))], list(targets))
    return Task("mine", kind, [str(label) for label in labels], split, split)


def values(kind, labels, gold, predicted):
    return {metric.name: metric.value for metric in score(task_of(kind, labels, gold), predicted)}


def accuracy(rng, count, rate):
    gold = rng.integers(0, 2, count)
    return score(task_of("classify", "ab", gold), np.where(rng.random(count) < rate, gold, 1 - gold))[0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["classify", "pair"])
def test_scores_of_classes_equal_those_of_scikit_learn(seed, kind):
    rng = np.random.default_rng(seed)
    classes = rng.integers(2, 7)  # with few items, some classes are neither in gold nor predicted
    gold, predicted = rng.integers(0, classes, (2, rng.integers(3, 60)))
    assert values(kind, range(classes), gold.tolist(), predicted) == pytest.approx(
        {
            "accuracy": accuracy_score(gold, predicted),
            "macro_f1": f1_score(gold, predicted, average="macro", labels=range(classes), zero_division=0),
        }
    )


@pytest.mark.parametrize("seed", range(10))
def test_scores_of_several_labels_equal_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    gold, predicted = rng.random((2, rng.integers(3, 60), 5)) < rng.random(5)
    gold, predicted = gold.astype(int), predicted.astype(int)
    assert values("multilabel", "abcde", gold.tolist(), predicted) == pytest.approx(
        {
            "macro_f1": f1_score(gold, predicted, average="macro", zero_division=0),
            "micro_f1": f1_score(gold, predicted, average="micro", zero_division=0),
            "accuracy": accuracy_score(gold, predicted),
        }
    )


@pytest.mark.parametrize("seed", range(10))
def test_scores_of_entities_equal_those_of_seqeval(seed):
    rng = np.random.default_rng(seed)
    gold = [rng.integers(0, 7, rng.integers(1, 12)).tolist() for _ in range(30)]
    predicted = [[tag if rng.random() < 0.7 else int(rng.integers(0, 7)) for tag in row] for row in gold]
    names = [[[TAGS[tag] for tag in row] for row in rows] for rows in (gold, predicted)]
    found = values("tokens", TAGS, gold, predicted)
    assert found["f1"] == pytest.approx(seqeval_f1(*names))
    assert found["accuracy"] == pytest.approx(np.mean([a == b for g, p in zip(gold, predicted) for a, b in zip(g, p)]))


@pytest.mark.parametrize(
    "kind, labels, gold",
    [
        ("classify", "abc", [0, 1, 2, 0]),
        ("pair", "ab", [0, 1]),
        ("multilabel", "ab", [[0, 1], [1, 0]]),
        ("tokens", TAGS, [[0, 1, 2], [3, 0]]),
    ],
)
def test_perfect_answers_score_one_and_the_headline_is_first(kind, labels, gold):
    metrics = score(task_of(kind, labels, gold), gold if kind == "tokens" else np.array(gold))
    assert {metric.value for metric in metrics} == {1.0} and len(metrics) == (3 if kind == "multilabel" else 2)
    assert [metric.name for metric in metrics] == list(METRICS[kind]) and metrics[0].name == headline(kind)
    assert all(len(metric.items) == len(gold) for metric in metrics)


def test_without_entities_the_score_is_zero():
    assert values("tokens", TAGS, [[0, 0]], [[0, 0]])["f1"] == 0.0


def test_missing_predictions_are_an_error():
    with pytest.raises(ValueError):
        score(task_of("tokens", TAGS, [[0], [1]]), [[0]])


@pytest.mark.parametrize("seed", range(5))
def test_interval_contains_the_value(seed):
    rng = np.random.default_rng(seed)
    runs = [accuracy(rng, 200, 0.7) for _ in range(3)]
    low, high = interval(runs, 300)
    assert 0 <= low < np.mean([run.value for run in runs]) < high <= 1


def test_interval_has_the_theoretical_width():
    low, high = interval([accuracy(np.random.default_rng(0), 400, 0.7)], 2000)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 400), rel=0.15)


def test_interval_contains_the_truth_in_about_95_of_100_cases():
    rng = np.random.default_rng(0)
    inside = [low <= 0.7 <= high for low, high in (interval([accuracy(rng, 100, 0.7)], 200) for _ in range(100))]
    assert 0.88 <= np.mean(inside) <= 1.0


def test_interval_narrows_with_more_items_and_a_lower_level():
    rng = np.random.default_rng(0)
    widths = [np.subtract(*interval([accuracy(rng, n, 0.7)], 300)[::-1]) for n in (50, 500, 5000)]
    assert widths[0] > widths[1] > widths[2] > 0
    run = accuracy(rng, 200, 0.7)
    assert np.subtract(*interval([run], 300, level=0.5)[::-1]) < np.subtract(*interval([run], 300, level=0.99)[::-1])


def test_interval_widens_where_seeds_disagree():
    rng = np.random.default_rng(0)
    same = [accuracy(rng, 500, 0.7)] * 3
    apart = [accuracy(rng, 500, rate) for rate in (0.5, 0.7, 0.9)]
    assert np.subtract(*interval(apart, 300)[::-1]) > 2 * np.subtract(*interval(same, 300)[::-1])


def test_interval_is_reproducible():
    runs = [accuracy(np.random.default_rng(0), 100, 0.7)]
    assert interval(runs, 200, seed=1) == interval(runs, 200, seed=1) != interval(runs, 200, seed=2)


def test_interval_of_a_certain_score_is_a_point():
    assert interval([accuracy(np.random.default_rng(0), 100, 1.1)], 200) == (1.0, 1.0)


def test_resampling_draws_the_same_items_for_two_models():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, 300)
    weak = np.where(rng.random(300) < 0.6, gold, 1 - gold)
    better = np.where(np.arange(300) < 30, gold, weak)  # differs on thirty items only, and is right there
    a, b = (score(task_of("classify", "ab", gold), predicted)[0] for predicted in (weak, better))
    paired = resampled([b], 500) - resampled([a], 500)
    apart = resampled([b], 500, seed=1) - resampled([a], 500)
    assert (paired >= 0).all() and paired.std() < apart.std() / 2
    np.testing.assert_array_equal(resampled([a], 500), resampled([a], 500))


def test_resampled_mean_is_near_the_score():
    runs = [accuracy(np.random.default_rng(seed), 300, 0.7) for seed in range(3)]
    assert resampled(runs, 2000).mean() == pytest.approx(np.mean([run.value for run in runs]), abs=0.005)


def test_resampling_equals_a_direct_calculation():
    run = score(task_of("classify", "abc", [0, 1, 2, 0, 1]), np.array([0, 1, 1, 1, 1]))[1]
    drawn = np.random.default_rng(4).integers(5, size=(CHUNK + 20, 5))  # in one go, here
    expected = [float(run.score(run.items[places].sum(0))) for places in drawn]
    np.testing.assert_allclose(resampled([run], CHUNK + 20, seed=4), expected)


def test_summary_is_the_mean_over_seeds_with_its_interval():
    runs = [accuracy(np.random.default_rng(seed), 100, 0.7) for seed in range(3)]
    low, high = interval(runs, 300)
    mean = np.mean([run.value for run in runs])
    assert summary(runs, 300) == {"metric": "accuracy", "value": mean, "low": low, "high": high, "n": 100}


@pytest.mark.parametrize(
    "right, n, low, high", [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 100, 0.7222, 0.8749)]
)
def test_wilson_interval_equals_published_values(right, n, low, high):
    found = share_interval(np.arange(n) < right)
    assert list(found.values()) == pytest.approx([right / n, low, high], abs=1e-4)
