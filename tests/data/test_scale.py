"""The measurements of docs/scale.md: what they generate, watch and fit."""

import pytest

from benchmarks import cost, memory


def test_text_is_of_the_size_asked_for_and_the_same_each_time(tmp_path):
    for name in "ab":
        memory.generate(tmp_path / name, 0.05)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert 50_000 <= (tmp_path / "a").stat().st_size < 53_000


@pytest.mark.slow
def test_every_stage_is_watched_on_a_small_text():
    row = memory.measure(0.05)
    assert row["steps"] == memory.STEPS and row["tokens"] > row["texts"] > 100
    assert all(row["megabytes"][stage] > 10 and row["seconds"][stage] > 0 for stage in memory.STAGES)


def test_fit_finds_the_machines_numbers():
    points = [(job, 0.02 * job.steps + 1e-10 * cost.arithmetic(job)) for job in cost.JOBS]
    assert cost.fit(points) == pytest.approx([0.02, 1e-10])


def test_sizes_of_the_model_are_those_measured():
    job = cost.Job(length=16, rows=8, layers=4, hidden=64, vocabulary=300, kept=2, cached=True, texts=16)
    found, told = cost.measure(job), cost.predicted(job)
    assert found["seconds"] > 0 and found["states"] == pytest.approx(told["states"])
    assert found["weights"] == pytest.approx(told["weights"], rel=0.02)
