"""Paired tests: equal to those of scipy, rarely wrong when nothing differs, never "on par" where models differ."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test, ttest_1samp

from kdlib import config
from kdlib.data.tasks import Split, Task
from kdlib.evaluation import paired_tests
from kdlib.evaluation.benchmark import Trial
from kdlib.evaluation.metrics import score
from kdlib.evaluation.paired_tests import Difference, average, difference, holm, paired_rows, verdicts

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SPEC = config.Benchmark(seeds=[0, 1, 2], margin=0.05)


def accuracy(right):
    split = Split([""] * len(right), [1] * len(right))
    return score(Task("t", "classify", ["a", "b"], split, split), np.asarray(right, int))[0]


def answers(rng, items, rate, seeds=3, between=0.0):
    """Accuracies of `seeds` runs; some items are harder than others, and each run has its own luck."""
    return [
        accuracy(rng.random(len(items)) < np.clip(items + rate + rng.normal(0, between), 0, 1)) for _ in range(seeds)
    ]


def random_metrics(kind, rng, count):
    """The headline metric of two models of three runs each, on random rows of a kind."""
    if kind == "tokens":
        gold, labels = [rng.integers(0, 5, rng.integers(1, 8)).tolist() for _ in range(count)], TAGS
    elif kind == "multilabel":
        gold, labels = rng.integers(0, 2, (count, 3)).tolist(), list("abc")
    else:
        gold, labels = rng.integers(0, 3, count).tolist(), list("abc")
    split = Split([""] * count, gold)
    task = Task("t", kind, labels, split, split)

    def predicted(keep):
        noise = [np.where(rng.random(np.size(g)) < keep, g, rng.integers(0, 2, np.size(g))) for g in gold]
        return [row.tolist() for row in noise] if kind == "tokens" else np.squeeze(np.array(noise))

    metrics = [[score(task, predicted(keep)) for _ in range(3)] for keep in (0.8, 0.7)]
    which = 1 if kind == "classify" else 0  # macro F1 rather than accuracy
    return [[run[which] for run in runs] for runs in metrics]


def as_scipy_takes_it(first, second):
    """Data and statistic for scipy: number i of the first model's data is item i, of the second's item n + i."""
    n = len(first[0].items)
    both = [np.concatenate([a.items, b.items]) for a, b in zip(first, second)]

    def statistic(x, y, axis=-1):
        sides = [[run.score(rows[side.astype(int)].sum(axis - 1)) for run, rows in zip(first, both)] for side in (x, y)]
        return np.mean(sides[0], axis=0) - np.mean(sides[1], axis=0)

    return (np.arange(n), np.arange(n) + n), statistic


@pytest.mark.parametrize("kind", ["classify", "multilabel", "tokens"])
def test_permutation_test_equals_that_of_scipy(kind):
    first, second = random_metrics(kind, np.random.default_rng(3), 40)
    data, statistic = as_scipy_takes_it(first, second)
    theirs = permutation_test(
        data, statistic, permutation_type="samples", vectorized=True, n_resamples=5000, batch=500, rng=1
    )
    ours = difference(first, second)
    assert ours.value == pytest.approx(theirs.statistic)
    assert ours.permutation_p == pytest.approx(theirs.pvalue, abs=0.02)
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
    np.testing.assert_allclose(
        np.quantile(ours.permuted, quantiles), np.quantile(theirs.null_distribution, quantiles), atol=0.006
    )


def test_permutation_test_equals_the_enumeration_of_all_swaps():
    rng = np.random.default_rng(0)
    first, second = ([accuracy(rng.random(9) < rate) for _ in range(2)] for rate in (0.9, 0.4))
    gaps = np.mean([a.items[:, 0] - b.items[:, 0] for a, b in zip(first, second)], axis=0)
    exact = [np.dot(signs, gaps) / 9 for signs in itertools.product([1, -1], repeat=9)]
    p = np.mean(np.abs(exact) >= abs(gaps.mean()) - 1e-12)
    assert difference(first, second).permutation_p == pytest.approx(p, abs=0.01)


def test_variance_is_the_theoretical_one_plus_two_items():
    rng = np.random.default_rng(0)
    first, second = ([accuracy(rng.random(400) < 0.7)] for _ in range(2))
    gaps = first[0].items[:, 0] - second[0].items[:, 0]
    found = difference(first, second)
    assert found.variance == pytest.approx(gaps.var() / 400 + 2 / 400**2, rel=0.1)
    assert found.error == (found.variance**0.5, np.inf)
    assert found.interval()[1] - found.value == pytest.approx(1.96 * found.variance**0.5, rel=1e-3)


def test_error_is_that_of_the_t_test_where_only_seeds_differ():
    gaps = np.array([0.02, 0.05, 0.03, 0.01])
    found = Difference(gaps, 0.0, np.zeros(9999), 100)
    theirs = ttest_1samp(gaps, 0)
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert found.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    upper = ttest_1samp(gaps, 0.06, alternative="less").pvalue
    assert found.tost_p(0.06) == pytest.approx(upper) and upper > ttest_1samp(gaps, -0.06, alternative="greater").pvalue


def test_swapping_the_pair_changes_the_sign():
    first, second = random_metrics("multilabel", np.random.default_rng(1), 60)
    there, back = difference(first, second), difference(second, first)
    assert there.value == pytest.approx(-back.value) and there.interval() == pytest.approx(
        tuple(-x for x in back.interval()[::-1]), abs=0.02
    )
    assert there.permutation_p == pytest.approx(back.permutation_p, abs=0.02)


def test_the_same_seed_gives_the_same_numbers():
    first, second = random_metrics("tokens", np.random.default_rng(1), 60)
    one, same, other = (difference(first, second, seed) for seed in (4, 4, 5))
    assert np.array_equal(one.permuted, same.permuted) and one.interval() == same.interval()
    assert not np.array_equal(one.permuted, other.permuted) and one.value == other.value


def test_order_of_items_does_not_matter():
    rng = np.random.default_rng(0)
    first, second = random_metrics("classify", rng, 50)
    order = rng.permutation(50)
    shuffled = [[type(m)(m.name, m.items[order]) for m in runs] for runs in (first, second)]
    one, two = difference(first, second), difference(*shuffled)
    assert one.p_value == two.p_value and one.interval() == two.interval()


@pytest.mark.slow
@pytest.mark.parametrize("seeds, between", [(1, 0.0), (3, 0.0), (3, 0.03), (5, 0.06)])
def test_equal_models_are_rarely_called_different(monkeypatch, seeds, between):
    monkeypatch.setattr(paired_tests, "PERMUTATIONS", paired_tests.CHUNK)
    monkeypatch.setattr(paired_tests, "RESAMPLES", paired_tests.CHUNK)
    rng = np.random.default_rng(0)
    p, exact, inside = [], [], []
    for number in range(200):
        items = rng.beta(4, 1.5, 100)
        found = difference(*(answers(rng, items, 0, seeds, between) for _ in range(2)), seed=number)
        low, high = found.interval()
        p.append(found.p_value)
        exact.append(found.permutation_p)
        inside.append(low <= 0 <= high)
    assert np.mean(np.array(p) < 0.05) <= 0.06 and np.mean(inside) >= 0.93
    if seeds == 3 and not between:  # then the permutation test's p is uniform, but for its steps
        levels = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9])
        off = np.mean(np.array(exact)[:, None] <= levels, axis=0) - levels
        assert (off < 0.05).all() and (off > -0.12).all()


def test_a_difference_is_found():
    rng = np.random.default_rng(0)
    items = rng.beta(4, 1.5, 400)
    found = difference(answers(rng, items, 0), answers(rng, items, -0.2))
    low, high = found.interval()
    assert low > 0.1 and found.p_value < 0.01 and found.tost_p(0.05) > 0.9


def test_one_lucky_seed_is_not_a_difference():
    """Every item tells the runs of one seed apart, but the other seeds say nothing: the permutation test alone errs."""
    rng = np.random.default_rng(0)
    items = np.full(300, 0.7)
    first = [accuracy(rng.random(300) < items) for _ in range(2)] + [accuracy(rng.random(300) < items + 0.25)]
    second = [accuracy(rng.random(300) < items) for _ in range(3)]
    found = difference(first, second)
    assert found.permutation_p < 0.01 and found.p_value > 0.1


def test_equal_models_are_on_par_with_enough_items():
    runs = {n: [accuracy(np.arange(n) % 3 > 0)] * 3 for n in (50, 100, 1000)}
    p = {n: difference(same, same) for n, same in runs.items()}
    assert all(found.p_value == 1 and found.value == 0 for found in p.values())
    assert p[50].tost_p(0.02) > 0.05 and p[100].tost_p(0.02) > 0.05 and p[1000].tost_p(0.02) < 1e-6


@pytest.mark.slow
def test_different_models_are_never_on_par_and_models_at_the_margin_rarely(monkeypatch):
    monkeypatch.setattr(paired_tests, "PERMUTATIONS", paired_tests.CHUNK)
    rng = np.random.default_rng(0)
    found = {0.05: [], 0.15: [], 0.0: []}
    for gap, p in found.items():
        for _ in range(50):
            items = rng.uniform(0.3, 0.7, 600)
            seen = difference(answers(rng, items, 0.0), answers(rng, items, -gap))
            p.append(seen.tost_p(0.05))
            low, high = seen.interval(0.9)
            assert (p[-1] < 0.05) == (-0.05 < low and high < 0.05)
    assert np.mean(np.array(found[0.05]) < 0.05) <= 0.06
    assert min(found[0.15]) > 0.5
    assert np.mean(np.array(found[0.0]) < 0.05) > 0.3


def test_average_treats_tasks_as_independent():
    rng = np.random.default_rng(0)
    parts = []
    for number in range(4):
        items = rng.beta(4, 1.5, 200)
        parts.append(difference(answers(rng, items, 0.1), answers(rng, items, 0), number))
    whole = average(parts)
    assert whole.value == pytest.approx(np.mean([part.value for part in parts])) and whole.n == 800
    assert whole.variance == pytest.approx(sum(part.variance for part in parts) / 16)
    assert whole.permuted.std() == pytest.approx(np.mean([part.permuted.std() for part in parts]) / 2, rel=0.1)
    assert whole.p_value < min(part.p_value for part in parts)


def test_holm_by_a_worked_example():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 and 0.04 x 1, the last raised to the one before it
    assert holm([0.01, 0.04, 0.03, 0.02]).tolist() == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.6, 0.001]).tolist() == pytest.approx([0.6, 0.002])
    assert holm([0.7, 0.8]).tolist() == [1.0, 1.0] and holm([]).tolist() == [] and holm([0.03]).tolist() == [0.03]


def test_holm_rejects_what_its_definition_rejects():
    rng = np.random.default_rng(0)
    for _ in range(100):
        p = np.sort(rng.random(6) ** 4)
        stop = next((i for i in range(6) if p[i] > 0.05 / (6 - i)), 6)  # go up until one does not pass, then stop
        assert (holm(p) <= 0.05).sum() == stop


def trials_of(rates, tasks=("one", "two"), method="probe", sizes=(None,), n=300):
    rng = np.random.default_rng(0)
    items = {task: rng.uniform(0.4, 0.6, n) for task in tasks}
    return [
        Trial(model, task, method, seed, [metric], x)
        for model, rate in rates.items()
        for task in tasks
        for x in sizes
        for seed, metric in enumerate(answers(rng, items[task], rate))
    ]


def test_verdicts_follow_from_the_rows():
    trials = trials_of({"student": 0.0, "weak": -0.3, "strong": 0.3})
    twin = [Trial("twin", t.task, t.method, t.seed, t.metrics) for t in trials if t.model == "student"]
    pairs = [("student", "weak"), ("student", "strong"), ("student", "twin")]
    table = pd.DataFrame(paired_rows(trials + twin, pairs, SPEC))
    metrics = ["difference", "difference_90", "detectable", "p_value", "p_holm", "tost_p", "tost_p_holm"]
    assert list(table["metric"]) == metrics * 9 and set(table["task"]) == {"one", "two", "average"}
    assert set(table["model"]) == {"student"} and set(table["method"]) == {"probe"} and "x" not in table
    assert set(table[table["task"] == "average"]["n"]) == {600}
    lines = verdicts(table, SPEC.margin)
    said = {(row.arm, row.task): row.verdict for row in lines.itertuples()}
    assert said == {
        (arm, task): words
        for arm, words in (("weak", "better"), ("strong", "worse"), ("twin", "on par (within 0.05)"))
        for task in ("one", "two", "average")
    }
    for family in (table["task"] == "average"), (table["task"] != "average"):
        for raw, corrected in (("p_value", "p_holm"), ("tost_p", "tost_p_holm")):
            part = table[family]
            expected = holm(part[part["metric"] == raw]["value"])
            np.testing.assert_array_equal(part[part["metric"] == corrected]["value"], expected)
    row = lines.iloc[0]
    assert row.low < row.difference < row.high and row.difference == pytest.approx(0.3, abs=0.06)


def test_too_few_items_leave_the_verdict_undecided():
    lines = verdicts(pd.DataFrame(paired_rows(trials_of({"a": 0, "b": 0.03}, n=60), [("a", "b")], SPEC)), SPEC.margin)
    assert set(lines["verdict"]) == {"undecided"}


def test_methods_and_sizes_are_compared_separately():
    trials = trials_of({"a": 0, "b": 0}) + trials_of({"a": 0, "b": 0}, method="fewshot", sizes=(16, 64))
    trials += trials_of({"a": 0, "b": 0}, ["one"], "fewshot", sizes=(90,))
    table = pd.DataFrame(paired_rows(trials, [("a", "b")], SPEC))
    lines = verdicts(table, SPEC.margin).fillna({"x": 0})
    found = {(row.method, row.x, row.task) for row in lines.itertuples()}
    assert found == {("probe", 0, task) for task in ("one", "two", "average")} | {
        ("fewshot", x, task) for x in (16, 64) for task in ("one", "two", "average")
    } | {("fewshot", 90, "one")}


def test_a_model_without_one_of_the_tasks_has_no_average():
    trials = [t for t in trials_of({"a": 0, "b": 0}) if (t.model, t.task) != ("b", "two")]
    assert {row["task"] for row in paired_rows(trials, [("a", "b")], SPEC)} == {"one"}


def test_trials_that_cannot_be_paired_are_refused():
    trials = trials_of({"a": 0, "b": 0})
    with pytest.raises(ValueError, match="no trials of c"):
        paired_rows(trials, [("a", "c")], SPEC)
    with pytest.raises(ValueError, match="different seeds"):
        paired_rows([t for t in trials if (t.model, t.seed) != ("b", 1)], [("a", "b")], SPEC)


def test_without_trials_there_are_no_rows():
    assert paired_rows([], [], SPEC) == []
    assert verdicts(pd.DataFrame(columns=["metric"]), 0.02).empty
