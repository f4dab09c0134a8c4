"""Paired tests between two encoders: is one better, or are they equivalent within a margin?

The trials of two encoders share seeds and test items, so only their differences count. Differences vary with the drawn
test items and with the seeds; a claim must hold for both.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from kdlib import config
from kdlib.evaluation.benchmark import Trial
from kdlib.evaluation.metrics import Metric

PERMUTATIONS = 10_000  # of n tests, the least corrected p value is n / 10,001
RESAMPLES = 1000  # for a standard error
CHUNK = 500  # draws at a time
LEVEL = 0.05


@dataclass
class Difference:
    """The difference of two encoders' scores, first minus second, and what says how certain it is.

    Args:
        seeds: float [seeds], the difference at each seed.
        variance: of their mean, over draws of test items.
        permuted: float [resamples], the mean where the outcomes of the two encoders are swapped at random.
        n: test items.
    """

    seeds: np.ndarray
    variance: float
    permuted: np.ndarray
    n: int

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(self.seeds.mean())

    @property
    def error(self) -> tuple[float, float]:
        """Standard error of the mean over seeds and items together, and its degrees of freedom (Satterthwaite 1946).

        The variance over seeds includes some of that over items, so the error is too large rather than too small. With
        one seed it is unknown; then the error is that of the one run.
        """
        count = len(self.seeds)
        between = float(self.seeds.var(ddof=1)) / count if count > 1 else 0.0
        total = self.variance + between
        return total**0.5, total**2 / between**2 * (count - 1) if between else np.inf

    def detectable(self, tests: int = 1, power: float = 0.8) -> float:
        """The smallest true difference that this comparison finds with the given power.

        Args:
            tests: how many comparisons share the level of 5% (Bonferroni, at most what Holm asks for).
            power: chance of finding it.
        """
        error, freedom = self.error
        return float(error * (student_t.ppf(1 - LEVEL / (2 * tests), freedom) + student_t.ppf(power, freedom)))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval, limited to -1 and 1."""
        error, freedom = self.error
        half = student_t.ppf((1 + level) / 2, freedom) * error
        return max(-1.0, float(self.value - half)), min(1.0, float(self.value + half))

    @property
    def permutation_p(self) -> float:
        """Two-sided p value of no difference between these very runs (Phipson and Smyth 2010).

        It is the share of permutations, the observed one included, that differ at least as much.
        """
        hits = np.abs(self.permuted) >= abs(self.value) - 1e-12
        return float((1 + hits.sum()) / (1 + len(hits)))

    @property
    def p_value(self) -> float:
        """Two-sided p value of no difference: the larger one of the permutation test and the t test.

        The permutation test is exact, but takes the runs as given; the t test allows for other seeds.
        """
        error, freedom = self.error
        return max(self.permutation_p, float(2 * student_t.sf(abs(self.value) / error, freedom)))

    def tost_p(self, margin: float) -> float:
        """P value of a difference of `margin` or more, by two one-sided t tests (Schuirmann 1987; Lakens 2017).

        It is below 0.05 exactly where the 90% interval is within the margins.
        """
        error, freedom = self.error
        return float(student_t.sf((margin - abs(self.value)) / error, freedom))


def difference(first: Sequence[Metric], second: Sequence[Metric], seed: int = 0) -> Difference:
    """Compare two encoders on one task.

    The variance over items is that of a bootstrap which draws all seeds of an item together. Two items are added, one
    that only the first encoder gets right and one that only the second does (Bonett and Price 2012): without them,
    runs that differ on hardly any item would seem certain. The permutation test swaps the outcomes of the two encoders
    item by item, all seeds of an item at once.

    Args:
        first: a metric of the first encoder, one per seed.
        second: the same metric of the second one, on the same items and in the same order of seeds.
        seed: fixes what is drawn.
    """
    items = np.stack([[run.items for run in runs] for runs in (first, second)])  # [2, seeds, items, k]
    _, seeds, n, width = items.shape
    # Items whose outcomes are all the same are drawn and swapped as one group, which gives the same distribution.
    groups, counts = np.unique(items.transpose(2, 0, 1, 3).reshape(n, -1), axis=0, return_counts=True)
    swap = groups.reshape(-1, 2, seeds, width)[:, ::-1].reshape(len(groups), -1) - groups  # what swapping one item adds
    apart = swap.any(axis=1)
    total = counts @ groups

    def differences(sums: np.ndarray) -> np.ndarray:
        """Sums [..., 2 * seeds * k] -> [..., seeds]."""
        scores = first[0].score(sums.reshape(*sums.shape[:-1], 2, seeds, width))
        return scores[..., 0, :] - scores[..., 1, :]

    rng = np.random.default_rng(seed)
    drawn, permuted = [], []
    for _ in range(0, RESAMPLES, CHUNK):
        drawn.append(differences(rng.multinomial(n, counts / n, CHUNK) @ groups).mean(axis=1))
    for _ in range(0, PERMUTATIONS, CHUNK):
        swaps = rng.binomial(counts[apart], 0.5, (CHUNK, apart.sum()))
        permuted.append(differences(total + swaps @ swap[apart]).mean(axis=1))
    variance = float(np.concatenate(drawn).var()) + 2 / n**2
    return Difference(differences(total), variance, np.concatenate(permuted), n)


def average(differences: Sequence[Difference]) -> Difference:
    """The mean of the differences on several tasks, each computed with its own `seed`."""
    seeds = np.mean([one.seeds for one in differences], axis=0)
    variance = sum(one.variance for one in differences) / len(differences) ** 2
    permuted = np.mean([one.permuted for one in differences], axis=0)
    return Difference(seeds, variance, permuted, sum(one.n for one in differences))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P values corrected for their number n (Holm 1979).

    The smallest is multiplied by n, the next by n - 1, and so on; none is less than the one before it or above 1.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1)
    return corrected


def paired_rows(trials: Sequence[Trial], pairs: Sequence[tuple[str, str]], spec: config.Benchmark) -> list[dict]:
    """Compare models on the headline score, by method, task and size, and on the mean over tasks (task "average").

    Holm's correction is over all tasks, sizes and pairs of a method, and over the averages by themselves. There is an
    average where both models have all tasks of the method.

    Args:
        trials: of all models that are compared.
        pairs: the models to compare, (first, second).
        spec: its margin is that of the TOST.

    Returns:
        Rows with model (first), arm (second), task, method, x (few-shot), n, and as metric one of: difference, the
        mean over seeds of first minus second with its 95% interval; difference_90, the same with the 90% interval that
        the TOST asks to be within the margin; detectable, the smallest difference that the corrected test finds with a
        power of 80%; p_value, of no difference; p_holm, corrected;
        tost_p, of a difference of the margin or more; tost_p_holm, corrected.

    Raises:
        ValueError: for a pair without trials, or with trials of different seeds.
    """
    unknown = {name for pair in pairs for name in pair} - {trial.model for trial in trials}
    if unknown:
        raise ValueError(f"no trials of {', '.join(sorted(unknown))}")
    scores: dict[str, dict] = {}  # method -> x -> task -> model -> seed -> metric
    for trial in trials:
        models = scores.setdefault(trial.method, {}).setdefault(trial.x, {}).setdefault(trial.task, {})
        models.setdefault(trial.model, {})[trial.seed] = trial.metrics[0]
    rows = []
    for method, sizes in scores.items():
        tasks = {task for by_task in sizes.values() for task in by_task}
        single, averages = [], []
        for (first, second), (x, by_task) in itertools.product(pairs, sizes.items()):
            both = {task: models for task, models in by_task.items() if first in models and second in models}
            labels = dict(model=first, arm=second, method=method) | ({} if x is None else dict(x=x))
            found = []
            for number, (task, models) in enumerate(both.items()):
                these, those = models[first], models[second]
                if these.keys() != those.keys():
                    raise ValueError(
                        f"trials with different seeds cannot be paired: {sorted(these)} and {sorted(those)}"
                    )
                found.append(difference(list(these.values()), [those[seed] for seed in these], seed=number))
                single.append((labels | dict(task=task), found[-1]))
            if both.keys() == tasks:
                averages.append((labels | dict(task="average"), average(found)))
        rows += _test_rows(single, spec.margin) + _test_rows(averages, spec.margin)
    return rows


def _test_rows(found: list[tuple[dict, Difference]], margin: float) -> list[dict]:
    """The rows of a family of tests, which are corrected together."""
    p_values, tost = [one.p_value for _, one in found], [one.tost_p(margin) for _, one in found]
    tests = {"p_value": p_values, "p_holm": holm(p_values), "tost_p": tost, "tost_p_holm": holm(tost)}
    rows = []
    for i, (labels, one) in enumerate(found):
        for metric, level in (("difference", 0.95), ("difference_90", 0.9)):
            low, high = one.interval(level)
            rows.append(labels | dict(metric=metric, value=one.value, low=low, high=high, n=one.n))
        rows.append(labels | dict(metric="detectable", value=one.detectable(len(found)), n=one.n))
        rows += [labels | dict(metric=name, value=float(values[i]), n=one.n) for name, values in tests.items()]
    return rows


def verdicts(table: pd.DataFrame, margin: float) -> pd.DataFrame:
    """The conclusion of the rows of `paired_rows`: one line a comparison, in their order.

    Args:
        table: the rows, among others.
        margin: that of the rows.

    Returns:
        Columns model, arm, task, method, x, difference, low, high, p_holm, tost_p_holm, detectable, n and verdict:
        "on par (within <margin>)" where the corrected TOST is significant at 5%; else "better" or "worse" (model than
        arm) where the corrected test of no difference is; else "undecided".
    """
    compared = ["model", "arm", "task", "method", "x"]
    tested = table.reindex(columns=[*compared, "metric", "value", "low", "high", "n"])
    tested = tested[tested["metric"].isin(["difference", "detectable", "p_holm", "tost_p_holm"])]
    lines = []
    for _, rows in tested.groupby(compared, dropna=False, sort=False):
        by = rows.set_index("metric")
        gap, least, p, tost = by["value"].loc[["difference", "detectable", "p_holm", "tost_p_holm"]]
        words = "undecided"
        if tost < LEVEL:
            words = f"on par (within {margin:g})"
        elif p < LEVEL:
            words = "better" if gap > 0 else "worse"
        found = dict(difference=gap, low=by["low"]["difference"], high=by["high"]["difference"], p_holm=p)
        found |= dict(tost_p_holm=tost, detectable=least, n=by["n"]["difference"], verdict=words)
        lines.append(rows.iloc[0][compared].to_dict() | found)
    columns = [*compared, "difference", "low", "high", "p_holm", "tost_p_holm", "detectable", "n", "verdict"]
    return pd.DataFrame(lines, columns=columns)
