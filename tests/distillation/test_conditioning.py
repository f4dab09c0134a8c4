"""Conditioning on tiny models: what is trained, what is left alone, what is learned, and what a stop costs."""

import copy

import numpy as np
import pytest
import tiny
import torch

from kdlib import config
from kdlib.distillation import conditioning as module
from kdlib.distillation.conditioning import MaskedModel, MaskedTexts, condition, heldout_perplexity
from kdlib.errors import UserError
from kdlib.models.mlm_head import new_head
from kdlib.training import checkpoints


def spec(**changes):
    base = dict(epochs=2.0, head_epochs=2.0, learning_rate=2e-3, head_rate=5e-3, batch_tokens=128)
    return config.Condition(**(base | changes))


def patterned(count, seed=0):
    """Texts that can be learned: every other word settles the next one."""
    rng = np.random.default_rng(seed)
    pairs = list(zip(tiny.WORDS[::2], tiny.WORDS[1::2]))
    return [" ".join(word for p in rng.integers(0, len(pairs), 4) for word in pairs[p]) for _ in range(count)]


def with_head(seed=0, **extra):
    encoder = tiny.encoder(layers=2, **extra)
    encoder.head = new_head(encoder.model, seed=seed)
    return encoder


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def snapshot(module):
    return copy.deepcopy(module.state_dict())


@pytest.mark.slow
def test_heldout_perplexity_falls_on_texts_that_can_be_learned(tmp_path):
    settings = spec(epochs=12, mask=0.3)
    outcome = condition(tiny.encoder(layers=2), patterned(200), patterned(40, 1), settings, tmp_path)
    facts, curve = outcome.facts, outcome.curve
    assert facts["perplexity_after"] < 0.5 * facts["perplexity_before"]
    assert facts["perplexity_after"] < 0.5 * facts["perplexity_unigram"]  # context is used
    assert facts["perplexity_after_low"] <= facts["perplexity_after"] <= facts["perplexity_after_high"]
    assert np.allclose(np.exp(curve["loss"]), curve["perplexity"])
    held = curve.query("split == 'heldout'")
    assert len(held) == 1 + module.EVALUATIONS and held["step"].iloc[0] == 0
    assert held["perplexity"].iloc[0] == facts["perplexity_before"]
    assert held["perplexity"].iloc[-1] == facts["perplexity_after"]
    assert facts["steps"] == held["step"].iloc[-1] and facts["texts"] == 200 and facts["heldout_texts"] == 40
    assert outcome.encoder.name == "conditioned teacher" and not outcome.encoder.model.training
    assert not outcome.encoder.head.training


@pytest.mark.parametrize("head", [True, False])
def test_the_teacher_is_left_as_it_is_and_everything_else_is_trained(tmp_path, head):
    teacher = with_head() if head else tiny.encoder(layers=2)
    teacher.model.requires_grad_(False)  # as distillation leaves its teacher
    before, own = snapshot(teacher.model), teacher.head and snapshot(teacher.head)
    outcome = condition(teacher, tiny.texts(60), tiny.texts(10, 1), spec(), tmp_path)
    assert equal(before, teacher.model.state_dict())
    assert teacher.head is None if not head else equal(own, teacher.head.state_dict())
    after = outcome.encoder.model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert outcome.facts["new_head"] is (not head) and (outcome.facts["head_steps"] > 0) is (not head)
    assert ("warm-up" in set(outcome.curve["split"])) is (not head)


def test_the_encoder_is_frozen_and_without_noise_while_a_new_head_warms_up(tmp_path, monkeypatch):
    seen = []

    class Spy(module.ConditionCurve):
        def on_step_end(self, args, state, control, **kwargs):
            if self.split == "warm-up":
                model = self.trainer.model
                seen.append((snapshot(model.encoder), snapshot(model.head), model.encoder.training, model.training))
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(module, "ConditionCurve", Spy)
    teacher = tiny.encoder(layers=2)
    outcome = condition(teacher, tiny.texts(60), tiny.texts(10, 1), spec(), tmp_path)
    assert len(seen) == outcome.facts["head_steps"] > 4
    assert all(equal(encoder, teacher.model.state_dict()) for encoder, _, _, _ in seen)
    assert not any(training for _, _, training, _ in seen) and all(training for _, _, _, training in seen)
    assert not any(torch.equal(seen[0][1][name], seen[-1][1][name]) for name in seen[0][1])


def test_the_frozen_encoder_runs_once_a_batch_however_many_passes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        MaskedModel,
        "states",
        lambda self, f=MaskedModel.states, **inputs: calls.append(self.frozen) or f(self, **inputs),
    )
    outcome = condition(tiny.encoder(layers=1), tiny.texts(60), tiny.texts(9), spec(head_epochs=5), tmp_path / "kept")
    assert sum(calls) == outcome.facts["head_steps"] / 5
    kept = outcome.encoder.head.state_dict()
    monkeypatch.setattr(module, "STATES", 0)  # no room: the same numbers, computed again
    calls.clear()
    outcome = condition(tiny.encoder(layers=1), tiny.texts(60), tiny.texts(9), spec(head_epochs=5), tmp_path / "live")
    assert sum(calls) == outcome.facts["head_steps"] and equal(kept, outcome.encoder.head.state_dict())


def test_a_new_head_starts_from_the_frequencies_of_tokens(tmp_path):
    outcome = condition(
        tiny.encoder(layers=1), tiny.texts(60), tiny.texts(20, 1), spec(head_epochs=0, learning_rate=1e-9), tmp_path
    )
    rows = MaskedTexts(tiny.encoder(layers=1), tiny.texts(60), False)
    counts = np.bincount(np.concatenate([r[m] for r, m in zip(rows.ids, rows.maskable)]), minlength=rows.rows)
    expected = np.log((counts + 0.1) / (counts + 0.1).sum())
    assert np.allclose(outcome.encoder.head.bias.detach(), expected, atol=1e-4)
    assert outcome.facts["head_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("whole_words", [False, True])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, whole_words):
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)  # a checkpoint at every point of the curve
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))
    texts, held, settings = tiny.texts(70), tiny.texts(10, 1), spec(whole_words=whole_words)
    full = condition(tiny.encoder(layers=2), texts, held, settings, tmp_path / "whole")
    assert full.facts["head_steps"] == full.facts["steps"] == 8
    expected = full.curve.query("split == 'heldout'")[["step", "loss", "low", "high"]].to_numpy()
    real = module.ConditionTrainer.compute_loss
    # In the warm-up, between the two parts, in the main part.
    for kill in (12,) if whole_words else (3, 7, 8, 13):
        left = [1] * kill

        def stopping(self, *args, left=left, **kwargs):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module.ConditionTrainer, "compute_loss", stopping)
            with pytest.raises(KeyboardInterrupt):
                condition(tiny.encoder(layers=2), texts, held, settings, tmp_path / str(kill))
        torch.manual_seed(1234)  # a new process has other random numbers
        resumed = condition(tiny.encoder(layers=2), texts, held, settings, tmp_path / str(kill))
        assert equal(full.encoder.model.state_dict(), resumed.encoder.model.state_dict()), kill
        assert equal(full.encoder.head.state_dict(), resumed.encoder.head.state_dict()), kill
        found = resumed.curve.query("split == 'heldout'")[["step", "loss", "low", "high"]].to_numpy()
        assert np.array_equal(expected, found)


@pytest.mark.parametrize("epochs", [0.5, 1.0, 1.5])
def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch, epochs):
    settings = spec(epochs=epochs, head_epochs=epochs)
    texts, held = tiny.texts(60), tiny.texts(10, 1)
    first = condition(tiny.encoder(layers=1), texts, held, settings, tmp_path)
    monkeypatch.setattr(module.ConditionTrainer, "compute_loss", None)
    again = condition(tiny.encoder(layers=1), texts, held, settings, tmp_path)
    assert equal(first.encoder.model.state_dict(), again.encoder.model.state_dict())
    assert equal(first.encoder.head.state_dict(), again.encoder.head.state_dict())
    assert first.facts == again.facts


def test_seeds_settle_the_outcome(tmp_path):
    outcomes = [
        condition(tiny.encoder(layers=1), tiny.texts(60), tiny.texts(10, 1), spec(), tmp_path / str(i), seed).encoder
        for i, seed in enumerate([3, 3, 4])
    ]
    states = [o.head.state_dict() for o in outcomes]
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


def test_training_masks_change_with_the_step_and_heldout_masks_never():
    rows = MaskedTexts(with_head(), tiny.texts(40), False)
    features = rows.collate(list(range(20)))
    first, other, again = (rows.mask(features, 0.15, key)["input_ids"] for key in ("0-1", "0-2", "0-1"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    held = [module.masked_batches(rows, 0.15) for _ in range(2)]
    assert all(torch.equal(a[1]["input_ids"], b[1]["input_ids"]) for a, b in zip(*held))
    assert sorted(i for batch, _ in held[0] for i in batch) == list(range(40))


def test_heldout_perplexity_is_that_of_all_masked_tokens():
    teacher = with_head()
    model = MaskedModel(teacher.model, teacher.head).train()
    rows = MaskedTexts(teacher, tiny.texts(40), False)
    batches = module.masked_batches(rows, 0.15)
    found = heldout_perplexity(model, batches, len(rows), False)
    assert model.training  # as it was
    losses = []
    model.eval()
    for _, inputs in batches:
        for (row, column), target in zip(inputs["chosen"].nonzero().tolist(), inputs["targets"]):
            size = int(inputs["attention_mask"][row].sum())
            ids = inputs["input_ids"][row : row + 1, :size]
            with torch.no_grad():
                states = teacher.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, column]
                scores = teacher.head(states, teacher.model.get_input_embeddings().weight)
            losses.append(-float(scores.log_softmax(-1)[target]))
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_curve_is_told_after_heldout_evaluations(tmp_path):
    told = []
    condition(tiny.encoder(layers=1), tiny.texts(60), tiny.texts(10), spec(), tmp_path, on_point=told.append)
    assert [len(t.query("split == 'heldout'")) for t in told] == [2, 3]
    assert all("warm-up" in set(t["split"]) for t in told)


def test_texts_without_a_token_to_mask_are_left_out(tmp_path):
    empty = ["", "\u4e00"] * 60  # would fill batches of their own
    outcome = condition(tiny.encoder(layers=1), tiny.texts(60) + empty, tiny.texts(10) + empty, spec(), tmp_path / "a")
    plain = condition(tiny.encoder(layers=1), tiny.texts(60), tiny.texts(10), spec(), tmp_path / "b")
    assert outcome.facts["texts"] == 60 and outcome.facts["heldout_texts"] == 10
    assert np.isfinite(outcome.facts["perplexity_after"])
    assert equal(outcome.encoder.model.state_dict(), plain.encoder.model.state_dict())


def test_what_cannot_be_conditioned_is_refused(tmp_path):
    teacher = tiny.encoder(layers=1)
    with pytest.raises(UserError, match="no token to mask"):
        condition(teacher, [], tiny.texts(5), spec(), tmp_path)
    with pytest.raises(UserError, match="no token to mask"):
        condition(teacher, tiny.texts(5), ["", "\u4e00"], spec(), tmp_path)  # nothing but the unknown token
    teacher.tokenizer.mask_token = None
    with pytest.raises(UserError, match="no mask token"):
        condition(teacher, tiny.texts(5), tiny.texts(5), spec(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_conditioned_teacher_comes_back_from_its_folder(tmp_path):
    from kdlib.models.loading import load_encoder

    outcome = condition(tiny.encoder(layers=1), tiny.texts(60), tiny.texts(10), spec(), tmp_path / "work")
    outcome.encoder.save(tmp_path / "kept")
    again = load_encoder(tmp_path / "kept", "again", max_length=32)
    assert equal(outcome.encoder.model.state_dict(), again.model.state_dict())
    assert equal(outcome.encoder.head.state_dict(), again.head.state_dict())
