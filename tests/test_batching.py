"""Batches: every text once, within the budget, almost no padding, the same again for the same seed."""

import itertools
import random

import pytest

from kdlib.batching import BUCKET, BudgetSampler, budget_batches


@pytest.fixture(scope="module")
def corpus_lengths(documents):
    return [round(1.5 * len(s.split())) for d in documents for s in d["sentences"]]


def lengths_of(seed, count=300):
    rng = random.Random(seed)
    return [rng.choice([1, 3, 10, 50, rng.randrange(1, 400)]) for _ in range(count)]


def within(batches, lengths, budget):
    return all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 64, 200, 10_000])
def test_every_index_once_within_the_budget(seed, budget):
    lengths = lengths_of(seed)
    shuffled = random.Random(seed).sample(range(len(lengths)), len(lengths))
    for order in (None, shuffled):
        batches = budget_batches(lengths, budget, order)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert within(batches, lengths, budget)


def test_no_batch_could_take_the_next_text_too():
    lengths = lengths_of(1)
    batches = budget_batches(lengths, 200)
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * max(lengths[i] for i in [*batch, following[0]]) > 200


def test_longest_first_unless_an_order_is_given():
    assert budget_batches([1, 5, 3], 5) == [[1], [2], [0]]
    assert budget_batches([1, 5, 3], 100, [0, 2, 1]) == [[0, 2, 1]]
    assert budget_batches([], 100) == []


def test_text_over_the_budget_is_alone():
    assert budget_batches([10, 500, 10], 100) == [[1], [0, 2]]


@pytest.mark.parametrize("budget", [64, 512])
def test_sampler_gives_every_index_once_an_epoch(budget):
    lengths = lengths_of(0)
    sampler = BudgetSampler(lengths, budget)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert within(batches, lengths, budget) and len(batches) == len(sampler)


def test_sampler_repeats_itself_and_differs_by_seed_and_epoch():
    def epochs(seed):
        sampler = BudgetSampler(lengths_of(0), 300, seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            yield list(sampler)

    first, again, other = list(epochs(1)), list(epochs(1)), list(epochs(2))
    assert first == again and first[0] != first[1] != first[2] and first != other


def test_epoch_can_be_entered_anywhere():
    sampler, late = BudgetSampler(lengths_of(0), 300), BudgetSampler(lengths_of(0), 300)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        list(sampler)
    late.set_epoch(2)
    assert list(sampler) == list(late)


def test_almost_no_padding_on_the_embedded_corpus(corpus_lengths):
    sampler = BudgetSampler(corpus_lengths, 2048)
    padded = sum(len(batch) * max(corpus_lengths[i] for i in batch) for batch in sampler)
    assert sampler.real_share() == pytest.approx(sum(corpus_lengths) / padded)
    assert sampler.real_share() >= 0.95
    assert len(corpus_lengths) > BUCKET and within(sampler, corpus_lengths, 2048)


def test_batches_are_shuffled_not_sorted_by_length(corpus_lengths):
    firsts = [corpus_lengths[batch[0]] for batch in BudgetSampler(corpus_lengths, 2048)]
    rises = sum(a < b for a, b in itertools.pairwise(firsts)) / len(firsts)
    assert 0.4 < rises < 0.6
