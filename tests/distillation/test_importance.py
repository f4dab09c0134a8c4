"""Importance of heads and neurons, against what their removal really changes."""

import itertools

import pytest
import tiny
import torch
from transformers import AutoModel

from kdlib import config
from kdlib.batching import pad
from kdlib.distillation import importance
from kdlib.distillation.importance import most_important
from kdlib.distillation.student_init import build_student

SAMPLE = [row for row in torch.randint(5, 80, (60, 12), generator=torch.Generator().manual_seed(1)).tolist()]
SAMPLE = [row[: 3 + i % 10] for i, row in enumerate(SAMPLE)]  # texts of different lengths, so that batches are padded


def model(layers=2, seed=0):
    return tiny.encoder(layers=layers, seed=seed).model


@torch.inference_mode()
def ends(encoder, rows=SAMPLE):
    ids, mask = pad(rows, 0)
    return encoder(ids, attention_mask=mask).last_hidden_state[mask.bool()]


def without(encoder, heads=None, neurons=None):
    """A copy whose other heads and neurons write nothing: [(layer's kept ones)]."""
    copied = model(encoder.config.num_hidden_layers)
    copied.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        for i, layer in enumerate(copied.encoder.layer):
            out, down = layer.attention.output.dense.weight, layer.output.dense.weight
            if heads is not None:
                out[:, [c for c in range(32) if c // 8 not in heads[i].tolist()]] = 0
            if neurons is not None:
                down[:, [c for c in range(64) if c not in neurons[i].tolist()]] = 0
    return copied


def test_a_student_computes_what_the_teacher_does_without_the_removed_parts(tmp_path):
    teacher = model()
    kept = most_important(teacher, 2, 20, SAMPLE)
    student = build_student(teacher, config.Student(layers=2, heads=2, ffn=20, narrow="importance"), sample=SAMPLE)
    expected = ends(without(teacher, [heads for heads, _ in kept], [neurons for _, neurons in kept]))
    assert torch.allclose(ends(student), expected, atol=1e-5)
    student.save_pretrained(tmp_path)
    assert torch.allclose(ends(AutoModel.from_pretrained(tmp_path)), expected, atol=1e-5)


def test_neurons_that_never_fire_go_first_however_large_their_weights():
    teacher = model()
    with torch.no_grad():
        for layer in teacher.encoder.layer:
            layer.intermediate.dense.bias[:10] = -1e3
            layer.output.dense.weight[:, :10] *= 100
    for _, neurons in most_important(teacher, 4, 54, SAMPLE):
        assert neurons.tolist() == list(range(10, 64))


def test_a_head_that_writes_nothing_goes_first():
    teacher = model()
    with torch.no_grad():
        teacher.encoder.layer[0].attention.output.dense.weight[:, 8:16] = 0
    assert most_important(teacher, 3, 64, SAMPLE)[0][0].tolist() == [0, 2, 3]


def test_the_kept_pair_of_heads_costs_hardly_more_than_the_best_pair():
    """All pairs of heads of a model of one layer, removed for real."""
    teacher = model(layers=1)
    target, effect = ends(teacher), {}
    for pair in itertools.combinations(range(4), 2):
        effect[pair] = (ends(without(teacher, heads=[torch.tensor(pair)])) - target).square().mean().item()
    chosen = tuple(most_important(teacher, 2, 64, SAMPLE)[0][0].tolist())
    assert effect[chosen] < 1.2 * min(effect.values()) < 0.6 * max(effect.values()), (effect, chosen)


def test_important_neurons_change_less_than_those_of_large_weights():
    teacher = model()
    errors = {}
    for narrow in ("importance", "pca"):
        spec = config.Student(layers=2, ffn=24, narrow=narrow)
        errors[narrow] = (ends(build_student(teacher, spec, sample=SAMPLE)) - ends(teacher)).square().mean().item()
    assert errors["importance"] < 0.8 * errors["pca"], errors


def test_padding_has_no_part_in_the_scores():
    teacher = model()
    before = most_important(teacher, 2, 30, SAMPLE)
    with torch.no_grad():
        teacher.embeddings.word_embeddings.weight[0] = 50.0
    after = most_important(teacher, 2, 30, SAMPLE)
    assert all(torch.equal(a, b) for x, y in zip(before, after) for a, b in zip(x, y))


def test_the_model_is_not_changed_and_equal_calls_agree():
    teacher = model()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    needs = [p.requires_grad for p in teacher.parameters()]
    first, second = (most_important(teacher, 2, 30, None) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert needs == [p.requires_grad for p in teacher.parameters()]


@pytest.mark.parametrize("rounds", [1, 4, 8])
def test_every_layer_keeps_as_many_in_any_number_of_rounds(rounds, monkeypatch):
    monkeypatch.setattr(importance, "ROUNDS", rounds)
    for heads, neurons in most_important(model(), 3, 37, SAMPLE):
        assert len(heads) == 3 and len(neurons) == 37
        assert heads.tolist() == sorted(set(heads.tolist())) and neurons.tolist() == sorted(set(neurons.tolist()))
