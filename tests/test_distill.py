"""Distillation on tiny models: what is caught, what is cached, what is learned, and what a stop costs."""

import numpy as np
import pytest
import tiny
import torch

from kdlib import config
from kdlib.cache import gigabytes, teacher_states
from kdlib.distill import DistillTrainer, distill, forward_states, prepare, tokenise
from kdlib.errors import UserError
from kdlib.objectives import attention_scores
from kdlib.student import build_student


def spec(**changes):
    base = dict(epochs=2.0, learning_rate=2e-3, batch_tokens=128, evaluations=2, precision="fp32", compile=False)
    return config.Distill(**(base | changes))


def data(teacher, settings, root, depth=2):
    return prepare(teacher, tiny.texts(120), settings, root, depth), prepare(
        teacher, tiny.texts(30, 1), settings, root, depth
    )


def test_caught_scores_are_those_of_the_models_own_attention():
    teacher = tiny.encoder(attn="eager")
    ids = torch.tensor([teacher.tokenizer("ang aso ay kumain").input_ids])
    mask = torch.ones_like(ids)
    caught = forward_states(teacher.model, ids, mask, [1, 3], attention=True)
    own = teacher.model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert len(caught.query) == len(caught.key) == 2
    for k, layer in enumerate([1, 3]):
        probabilities = attention_scores(caught.query[k], caught.key[k]).softmax(-1)
        assert torch.allclose(probabilities, own[layer - 1], atol=1e-6)


def test_hidden_states_are_those_after_the_named_layers():
    teacher = tiny.encoder()
    ids = torch.tensor([teacher.tokenizer("ang aso").input_ids])
    caught = forward_states(teacher.model, ids, torch.ones_like(ids), [2, 4], attention=False)
    own = teacher.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(caught.hidden[0], own[2]) and torch.equal(caught.hidden[1], own[4]) and caught.query == []


def test_cached_states_equal_live_ones_within_half_precision(tmp_path):
    teacher = tiny.encoder()
    ids = tokenise(teacher, tiny.texts(50))
    cached = teacher_states(tmp_path, teacher, ids, [2, 4], budget=1)
    for i in (0, 17, 49):
        row = torch.tensor([ids[i].tolist()])
        live = forward_states(teacher.model, row, torch.ones_like(row), [2, 4], False)
        expected = torch.stack([h[0] for h in live.hidden], 1).detach().numpy()
        assert np.allclose(cached.rows(i, len(ids[i])), expected, atol=5e-3)


def test_cache_is_reused_and_depends_on_the_teachers_weights(tmp_path):
    teacher, ids = tiny.encoder(), tokenise(tiny.encoder(), tiny.texts(20))
    teacher_states(tmp_path, teacher, ids, [2, 4], budget=1)
    stamp = [p.stat().st_mtime_ns for p in tmp_path.rglob("states.f16")]
    teacher_states(tmp_path, teacher, ids, [2, 4], budget=1)
    assert [p.stat().st_mtime_ns for p in tmp_path.rglob("states.f16")] == stamp
    teacher_states(tmp_path, tiny.encoder(seed=1), ids, [2, 4], budget=1)
    assert len(list(tmp_path.rglob("states.f16"))) == 2


def test_cache_beyond_its_budget_is_not_made(tmp_path):
    teacher, ids = tiny.encoder(), tokenise(tiny.encoder(), tiny.texts(20))
    size = gigabytes(sum(map(len, ids)), 2, 32)
    assert teacher_states(tmp_path, teacher, ids, [2, 4], budget=size * 0.99) is None
    assert not list(tmp_path.iterdir())


def test_loss_of_cached_and_live_runs_agrees(tmp_path):
    teacher = tiny.encoder()
    curves = []
    for cache in (True, False):
        settings = spec(cache=cache)
        student = build_student(teacher.model, 2)
        outcome = distill(
            teacher, student, *data(teacher, settings, tmp_path / "cache"), settings, tmp_path / str(cache)
        )
        curves.append(outcome.curve["loss"].to_numpy())
        assert (outcome.facts["cache_gigabytes"] > 0) == cache
    assert np.allclose(*curves, rtol=5e-3)


@pytest.mark.parametrize("objectives", [{"hidden": 1.0, "sentence": 0.25}, {"attention": 1.0, "hidden": 1.0}])
def test_heldout_loss_falls(tmp_path, objectives):
    teacher, settings = tiny.encoder(), spec(objectives=objectives, epochs=6)
    outcome = distill(
        teacher, build_student(teacher.model, 2), *data(teacher, settings, tmp_path / "c"), settings, tmp_path / "w"
    )
    held = outcome.curve.query("split == 'heldout'")["loss"]
    assert held.iloc[-1] < 0.7 * held.iloc[0]
    assert set(objectives) <= set(outcome.curve.columns)


def test_frozen_embeddings_stay_and_layers_move(tmp_path):
    teacher, settings = tiny.encoder(), spec()
    student = build_student(teacher.model, 2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    distill(teacher, student, *data(teacher, settings, tmp_path / "c"), settings, tmp_path / "w")
    after = student.state_dict()
    assert torch.equal(before["embeddings.word_embeddings.weight"], after["embeddings.word_embeddings.weight"])
    assert not torch.equal(before["encoder.layer.0.output.dense.weight"], after["encoder.layer.0.output.dense.weight"])
    assert all(p.requires_grad for p in student.parameters()) and not student.training
    assert student.config.hidden_dropout_prob == 0.1 and student.encoder.layer[0].output.dropout.p == 0.1


def test_same_seed_gives_the_same_student(tmp_path):
    teacher, settings = tiny.encoder(), spec()
    states = []
    for name in "ab":
        student = build_student(teacher.model, 2)
        distill(teacher, student, *data(teacher, settings, tmp_path / "c"), settings, tmp_path / name, seed=3)
        states.append(student.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    teacher, settings = tiny.encoder(), spec(epochs=3)
    sets = data(teacher, settings, tmp_path / "c")
    whole, broken = build_student(teacher.model, 2), build_student(teacher.model, 2)
    full = distill(teacher, whole, *sets, settings, tmp_path / "whole")
    calls = []

    def stop(curve):
        calls.append(len(curve))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(teacher, broken, *sets, settings, tmp_path / "broken", on_point=stop)
    fresh = build_student(teacher.model, 2)
    resumed = distill(teacher, fresh, *sets, settings, tmp_path / "broken")
    assert calls and list((tmp_path / "broken").glob("checkpoint-*"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))
    held = [o.curve.query("split == 'heldout'")["loss"].iloc[-1] for o in (full, resumed)]
    assert held[0] == held[1]


def test_teacher_is_in_eval_mode_and_untouched(tmp_path):
    teacher, settings = tiny.encoder(), spec(cache=False)
    teacher.model.train()
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    distill(teacher, build_student(teacher.model, 2), *data(teacher, settings, None), settings, tmp_path)
    assert not teacher.model.training
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())


def test_impossible_pairs_are_refused_before_training(tmp_path):
    teacher, settings = tiny.encoder(), spec()
    sets = data(teacher, settings, None)
    with pytest.raises(UserError, match="wide"):
        distill(teacher, tiny.encoder(layers=2, hidden=16).model, *sets, settings, tmp_path)
    with pytest.raises(UserError, match="unknown objective"):
        distill(
            teacher,
            build_student(teacher.model, 2),
            *sets,
            settings.model_copy(update={"objectives": {"x": 1.0}}),
            tmp_path,
        )
    with pytest.raises(UserError, match="no texts"):
        prepare(teacher, [], settings, None, 2)


def test_trainer_is_the_librarys():
    from transformers import Trainer

    assert issubclass(DistillTrainer, Trainer)
