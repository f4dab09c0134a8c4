"""Speed by length: what is timed, and what is left out."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny import encoder, texts
from torch import nn

from kdlib.evaluation.speed import length_rows, speed_rows


class Slow(nn.Module):
    """A model that records the shapes of its inputs and takes a given time."""

    def __init__(self, seconds):
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.zeros(1)), seconds
        self.shapes, self.padded = [], False

    def forward(self, input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape
        self.shapes.append(tuple(input_ids.shape))
        self.padded |= not attention_mask.all()
        time.sleep(self.seconds)
        return SimpleNamespace(last_hidden_state=input_ids)


def slow(seconds):
    one = encoder(1)
    one.model = Slow(seconds)
    return one


def test_every_length_is_timed_singly_and_in_batches():
    encoders = {"quick": slow(0), "slow": slow(0.004)}
    rows = length_rows(encoders, texts(9), [4, 16, 32], runs=5, batch=3)
    assert [(r["model"], r["metric"], r["x"]) for r in rows] == [
        (model, metric, length)
        for length in (4, 16, 32)
        for metric in ("latency_ms", "sentences_per_second")
        for model in ("quick", "slow")
    ]
    for one in encoders.values():
        timed = [shape for length in (4, 16, 32) for shape in [(3, length), *[(1, length)] * 6, *[(3, length)] * 3]]
        assert (
            one.model.shapes == timed and not one.model.padded
        )  # of each length the first batch and the first text warm up
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"] and row["n"] == (5 if row["metric"] == "latency_ms" else 3)
        if row["model"] == "slow":
            assert row["value"] >= 4 if row["metric"] == "latency_ms" else row["value"] <= 3 / 0.004


def test_lengths_beyond_an_encoders_maximum_are_left_out():
    one, short = encoder(1), encoder(1)
    short.max_length = 10
    rows = length_rows({"one": one, "short": short}, texts(3), [8, 16, 128], runs=3, batch=2)
    assert {row["x"] for row in rows} == {8}
    assert {row["x"] for row in length_rows({"one": one}, texts(3), [8, 16, 128], runs=3, batch=2)} == {8, 16}


@pytest.mark.parametrize("rows", [speed_rows, lambda *a, **k: length_rows(*a, [4], **k)], ids=["texts", "lengths"])
def test_encoders_take_turns(rows):
    order = []

    def noted(name):
        one = slow(0)
        one.model.register_forward_pre_hook(lambda *_: order.append(name))
        return one

    rows({"a": noted("a"), "b": noted("b")}, texts(5), runs=4, batch=2)
    warm, timed = order[:4], order[4:]
    assert warm == ["a", "a", "b", "b"] and timed == ["a", "b"] * 7
