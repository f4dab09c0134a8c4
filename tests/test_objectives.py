"""Objectives against plain loops, and what must not change them."""

import math

import pytest
import torch

from kdlib.errors import UserError
from kdlib.objectives import (
    OBJECTIVES,
    States,
    attention_loss,
    check_objectives,
    hidden_loss,
    sentence_loss,
    total_loss,
)

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


def states(seed, layers=2, heads=2, size=4):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    hidden = [draw(2, 5, heads * size) for _ in range(layers)]
    query, key = ([draw(2, heads, 5, size) for _ in range(layers)] for _ in range(2))
    return States(hidden, MASK, query, key)


def real_tokens():
    return [(b, t) for b in range(2) for t in range(5) if MASK[b, t]]


def test_hidden_loss_is_the_mse_over_real_tokens_by_the_teachers_variance():
    student, teacher = states(0), states(1)
    expected = 0
    for mine, theirs in zip(student.hidden, teacher.hidden):
        values = [(mine[b, t, i].item(), theirs[b, t, i].item()) for b, t in real_tokens() for i in range(8)]
        mean = sum(y for _, y in values) / len(values)
        variance = sum((y - mean) ** 2 for _, y in values) / (len(values) - 1)
        expected += sum((x - y) ** 2 for x, y in values) / len(values) / variance / 2
    assert hidden_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_attention_loss_is_the_mse_of_scaled_dot_products_before_the_softmax():
    both = student, teacher = states(2), states(3)

    def dot(query, key):
        return sum(query[k].item() * key[k].item() for k in range(4)) / math.sqrt(4)

    expected = 0
    for layer in range(2):
        pairs = []
        for b in range(2):
            for head in range(2):
                for i in range(5):
                    for j in range(5):
                        if MASK[b, i] and MASK[b, j]:
                            pairs.append([dot(s.query[layer][b, head, i], s.key[layer][b, head, j]) for s in both])
        mean = sum(y for _, y in pairs) / len(pairs)
        variance = sum((y - mean) ** 2 for _, y in pairs) / (len(pairs) - 1)
        expected += sum((x - y) ** 2 for x, y in pairs) / len(pairs) / variance / 2
    assert attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_sentence_loss_is_one_minus_the_cosine_of_the_means():
    student, teacher = states(4), states(5)
    expected = 0
    for b in range(2):
        count = int(MASK[b].sum())
        a, c = (s.hidden[-1][b, :count].mean(0).double() for s in (student, teacher))
        expected += (1 - (a @ c / a.norm() / c.norm()).item()) / 2
    assert sentence_loss(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_perfect_copy_costs_nothing(name):
    assert OBJECTIVES[name](states(6), states(6)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_never_counts(name):
    student, teacher = states(7), states(8)
    before = OBJECTIVES[name](student, teacher)
    for s in (student, teacher):
        for tensor in s.hidden:
            tensor[MASK == 0] = 1e4
        for tensor in s.query + s.key:
            tensor.transpose(1, 2)[MASK == 0] = 1e4
    assert torch.equal(before, OBJECTIVES[name](student, teacher))


def test_total_is_the_weighted_sum_of_its_parts():
    weights = {"hidden": 2.0, "sentence": 0.5, "attention": 0.0}
    total, parts = total_loss(weights, states(0), states(1))
    assert set(parts) == {"hidden", "sentence"}
    assert total.item() == pytest.approx(2 * parts["hidden"].item() + 0.5 * parts["sentence"].item())


def test_attention_without_maps_is_refused_not_zero():
    empty = States(states(0).hidden, MASK, [], [])
    with pytest.raises(ValueError, match="attention maps"):
        attention_loss(empty, empty)


@pytest.mark.parametrize("weights", [{"hiden": 1.0}, {"hidden": -1.0}, {"hidden": 0.0}, {}])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(UserError):
        check_objectives(weights)
