"""The control without a language model: it learns what words tell, and nothing that they do not."""

import numpy as np
import pytest
import tiny

from kdlib.data.tasks import Split, Task
from kdlib.evaluation.benchmark import run_trials
from kdlib.evaluation.tf_idf import TfIdf, tf_idf

KINDS = ("classify", "multilabel", "pair", "tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_gives_its_metrics(kind):
    metrics = tf_idf(tiny.task(kind))(0)
    assert all(0 <= metric.value <= 1 and len(metric.items) == 40 for metric in metrics)


@pytest.mark.parametrize("kind", ["multilabel", "tokens"])
def test_what_single_words_tell_is_learnt(kind):
    assert tf_idf(tiny.task(kind))(0)[0].value > 0.95


def test_labels_that_no_word_tells_are_guessed():
    rng = np.random.default_rng(0)
    split = [Split(tiny.texts(count, seed=count), rng.integers(2, size=count).tolist()) for count in (200, 400)]
    assert tf_idf(Task("noise", "classify", ["a", "b"], *split))(0)[0].value == pytest.approx(0.5, abs=0.1)


def test_a_seed_draws_its_share_of_the_rows_and_a_whole_share_needs_no_seed():
    task = tiny.task("classify")
    shared, whole = tf_idf(task, 0.3), tf_idf(task)
    drawn = [shared(seed)[0].items.tolist() for seed in range(5)]
    assert drawn[0] == shared(0)[0].items.tolist() and any(items != drawn[0] for items in drawn)
    assert whole(0)[0].items.tolist() == whole(1)[0].items.tolist()


def test_a_class_with_one_row_and_texts_without_letters_are_no_obstacle():
    train = Split(["ang bata", "ang aso", "sa bahay", "!", ""], [0, 0, 0, 1, 0])
    metrics = tf_idf(Task("few", "classify", ["a", "b"], train, Split(["?", "ang bata"], [0, 0])))(0)
    assert metrics[0].value == 1.0


@pytest.mark.parametrize("method", ["probe", "finetune", "fewshot"])
def test_it_takes_part_in_the_benchmark_under_the_settings_of_encoders(method):
    spec = tiny.SPEC.model_copy(update=dict(fewshot=[2, 5], finetune_rows=30))
    trials = run_trials({"tf-idf": TfIdf()}, [tiny.task("classify")], spec, method)
    assert {trial.model for trial in trials} == {"tf-idf"} and {trial.seed for trial in trials} == {0, 1, 2}
    assert {trial.x for trial in trials} == ({2, 5} if method == "fewshot" else {None})
