"""Distillation on tiny models: what is caught, what is cached, what is learned, and what a stop costs."""

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import kdlib.training.arguments
from kdlib import config
from kdlib.batching import BudgetSampler
from kdlib.distillation.distill import DistillTrainer, Stopped, distill
from kdlib.distillation.objectives import OBJECTIVES, RequiredOutputs, attention_scores
from kdlib.distillation.state_capture import StateCapture
from kdlib.distillation.student_init import build_student
from kdlib.distillation.tokenized_corpus import (
    Masking,
    Pairs,
    RankCollator,
    prepare,
    tokenise,
    training_size,
    with_states,
)
from kdlib.errors import UserError
from kdlib.models.encoder import Encoder
from kdlib.models.mlm_head import new_head
from kdlib.training import checkpoints


def spec(**changes):
    base = dict(epochs=2.0, learning_rate=2e-3, batch_tokens=128, evaluations=2, precision="fp32", compile=False)
    return config.Distill(**(base | changes))


@pytest.fixture
def often(monkeypatch):
    """A checkpoint at every point of the curve, not every minute."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


def start(teacher, layers, sample=None, **sizes):
    return build_student(teacher.model, config.Student(layers=layers, **sizes), sample=sample)


def data(teacher, settings, root, depth=2):
    return [
        prepare(teacher, tiny.texts(*size), settings, root, depth, pairs(teacher, size[1]))
        for size in ((120, 0), (30, 1))
    ]


def pairs(teacher, seed):
    """Texts and what stands for their translations: other texts, some longer."""
    return Pairs(tiny.texts(20, seed + 7), tiny.texts(20, seed + 9, 9), teacher)


ATTENTION, HIDDEN = RequiredOutputs.of({"attention": 1.0}), RequiredOutputs.of({"hidden": 1.0})


def test_caught_scores_are_those_of_the_models_own_attention():
    teacher = tiny.encoder(attn="eager")
    ids = torch.tensor([teacher.tokenizer("ang aso ay kumain").input_ids])
    mask = torch.ones_like(ids)
    watched = StateCapture(teacher.model, [1, 3], ATTENTION)
    caught = [watched(ids, mask) for _ in range(2)][1]  # a second pass starts from nothing
    own = teacher.model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert len(caught.query) == len(caught.key) == 2
    for k, layer in enumerate([1, 3]):
        probabilities = attention_scores(caught.query[k], caught.key[k]).softmax(-1)
        assert torch.allclose(probabilities, own[layer - 1], atol=1e-6)
    watched.caught["query"].clear()
    assert watched.release() is teacher.model
    teacher.model(input_ids=ids, attention_mask=mask)
    assert not watched.caught["query"]  # nothing watches any more


def test_hidden_states_are_those_after_the_named_layers():
    teacher = tiny.encoder()
    ids = torch.tensor([teacher.tokenizer("ang aso").input_ids])
    needs = RequiredOutputs.of({"tinybert_hidden": 1.0})
    caught = StateCapture(teacher.model, [2, 4], needs)(ids, torch.ones_like(ids))
    own = teacher.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(caught.hidden[0], own[2]) and torch.equal(caught.hidden[1], own[4]) and caught.query == []
    assert torch.equal(caught.embedded, own[0]) and caught.logits is None


def test_states_go_through_the_projection_and_logits_do_not():
    teacher = tiny.encoder()
    ids = torch.tensor([teacher.tokenizer("ang aso").input_ids])
    projection, head = torch.nn.Linear(32, 5), new_head(teacher.model)
    needs = RequiredOutputs.of({"tinybert_hidden": 1.0, "mlm": 1.0})
    found = StateCapture(teacher.model, [2, 4], needs, projection, head)(ids, torch.ones_like(ids), torch.tensor([2]))
    own = teacher.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(found.hidden[0], projection(own[2])) and torch.equal(found.embedded, projection(own[0]))
    expected = head(own[4][0, 2:3], teacher.model.get_input_embeddings().weight)
    assert torch.equal(found.logits, expected) and expected.shape == (1, len(teacher.tokenizer))


@pytest.mark.slow
def test_loss_of_cached_and_live_runs_agrees(tmp_path):
    teacher = tiny.encoder()
    curves = []
    for cache in (True, False):
        settings = spec(cache=cache)
        student = start(teacher, 2)
        outcome = distill(
            teacher, student, *data(teacher, settings, tmp_path / "cache"), settings, tmp_path / str(cache)
        )
        curves.append(outcome.curve["loss"].to_numpy())
        assert (outcome.facts["cache_gigabytes"] > 0) == cache
    assert np.allclose(*curves, rtol=5e-3)


def test_the_student_learns_the_layers_that_the_profile_names(tmp_path):
    teacher, settings = tiny.encoder(), spec(objectives={"hidden": 1.0}, layers=[3, 4], learning_rate=1e-9, epochs=1)
    student = start(teacher, 2, init=[3, 4])
    sets = data(teacher, settings, tmp_path / "c")
    curve = distill(teacher, student, *sets, settings, tmp_path / "w").curve
    captures = [StateCapture(m, layers, HIDDEN) for m, layers in ((student, [1, 2]), (teacher.model, [3, 4]))]
    batch = sets[1].collate(range(len(sets[1])))
    with torch.no_grad():
        outputs = [one(batch["input_ids"], batch["attention_mask"]) for one in captures]
    expected = OBJECTIVES["hidden"].loss(*outputs).item()
    assert curve.query("split == 'heldout'")["hidden"].iloc[-1] == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [{"hidden": 1.0, "sentence": 0.25}, {"attention": 1.0, "hidden": 1.0}])
def test_heldout_loss_falls(tmp_path, objectives):
    teacher, settings = tiny.encoder(), spec(objectives=objectives, epochs=6)
    outcome = distill(teacher, start(teacher, 2), *data(teacher, settings, tmp_path / "c"), settings, tmp_path / "w")
    held = outcome.curve.query("split == 'heldout'")["loss"]
    assert held.iloc[-1] < 0.7 * held.iloc[0]
    assert set(objectives) <= set(outcome.curve.columns)


def test_frozen_embeddings_stay_and_layers_move(tmp_path):
    teacher, settings = tiny.encoder(), spec()
    student = start(teacher, 2)
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
        student = start(teacher, 2)
        distill(teacher, student, *data(teacher, settings, tmp_path / "c"), settings, tmp_path / name, seed=3)
        states.append(student.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 1.5])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, often, epochs):
    teacher, settings = tiny.encoder(), spec(epochs=epochs)
    sets = data(teacher, settings, tmp_path / "c")
    whole, broken = start(teacher, 2), start(teacher, 2)
    full = distill(teacher, whole, *sets, settings, tmp_path / "whole")
    calls = []

    def stop(curve):
        if (curve["split"] == "heldout").sum() > 1:
            calls.append(len(curve))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(teacher, broken, *sets, settings, tmp_path / "broken", on_point=stop)
    fresh = start(teacher, 2)
    resumed = distill(teacher, fresh, *sets, settings, tmp_path / "broken")
    assert calls and list((tmp_path / "broken").glob("checkpoint-*"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))
    assert full.curve.drop(columns="seconds").equals(resumed.curve.drop(columns="seconds"))


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_weights_and_curve(tmp_path):
    teacher, settings = tiny.encoder(layers=2), spec(epochs=9, batch_tokens=64)
    sets = data(teacher, settings, tmp_path / "c", depth=1)
    steps, tokens = training_size(sets[0], settings)
    assert steps > 100 and tokens == 9 * sets[0].tokens  # points of the curve are several steps apart
    whole, fresh, told = start(teacher, 1), start(teacher, 1), []
    full = distill(teacher, whole, *sets, settings, tmp_path / "whole")
    before = 0
    for step in (1, 41):  # at neither is a checkpoint or a point due
        answers = iter([False] * (step - before - 1) + [True])
        with pytest.raises(Stopped, match=f"at step {step} of {steps}, with a checkpoint. Run the cell again") as stop:
            distill(
                teacher, start(teacher, 1), *sets, settings, tmp_path / "b",
                on_point=told.append, should_stop=lambda: next(answers),
            )  # fmt: skip
        assert stop.value._render_traceback_() == [f"Stopped {stop.value}"]
        assert checkpoints.newest(tmp_path / "b").name == f"checkpoint-{step}"
        before = step
    resumed = distill(teacher, fresh, *sets, settings, tmp_path / "b", on_point=told.append, should_stop=lambda: False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))
    assert full.curve.drop(columns="seconds").equals(resumed.curve.drop(columns="seconds"))
    assert resumed.curve["seconds"].is_monotonic_increasing
    assert len(told[0]) == 1 and told[-1][list(resumed.curve)].equals(resumed.curve)  # from the first point to the last


def test_a_stop_is_not_asked_for_after_the_last_step(tmp_path):
    teacher, settings = tiny.encoder(layers=2), spec(epochs=1)
    sets = data(teacher, settings, None, depth=1)
    asked = []
    distill(teacher, start(teacher, 1), *sets, settings, tmp_path, should_stop=lambda: bool(asked.append(1)))
    assert len(asked) == training_size(sets[0], settings)[0] - 1


def test_teacher_is_in_eval_mode_and_untouched(tmp_path):
    teacher, settings = tiny.encoder(), spec(cache=False)
    teacher.model.train()
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    distill(teacher, start(teacher, 2), *data(teacher, settings, None), settings, tmp_path)
    assert not teacher.model.training
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())


def test_impossible_pairs_are_refused_before_training(tmp_path):
    teacher, settings = tiny.encoder(), spec()
    sets = data(teacher, settings, None)
    student = start(teacher, 2)

    def attempt(changes, student=student):
        distill(teacher, student, *sets, settings.model_copy(update=changes), tmp_path / "w")

    with pytest.raises(UserError, match="unknown objective"):
        attempt({"objectives": {"x": 1.0}})
    with pytest.raises(UserError, match="the student has 2 heads, the teacher 4"):
        attempt({"objectives": {"tinybert_attention": 1.0}}, start(teacher, 2, heads=2))
    with pytest.raises(UserError, match="relation_heads is 12, which does not divide the student's width of 32"):
        attempt({"objectives": {"relation": 1.0}})
    with pytest.raises(UserError, match="no masked-language head; condition the teacher first"):
        attempt({"objectives": {"kl": 1.0}})
    with pytest.raises(UserError, match="student.layers is 5; the teacher has only 4"):
        attempt({}, start(teacher, 5, init="random"))
    small = tiny.encoder(layers=2).model
    small.resize_token_embeddings(20)
    with pytest.raises(UserError, match="20 embedding rows, the teacher 81"):
        attempt({}, small)
    teacher.tokenizer.mask_token = None
    with pytest.raises(UserError, match="no mask token"):
        attempt({"objectives": {"mlm": 1.0}})
    teacher.tokenizer.mask_token = "[MASK]"
    with pytest.raises(ValueError, match="prepared for objectives that mask nothing"):
        attempt({"objectives": {"mlm": 1.0}})
    with pytest.raises(UserError, match="no texts"):
        prepare(teacher, [], settings, None, 2)
    assert not (tmp_path / "w").exists()


# projections, heads, masks


def with_head(teacher):
    teacher.head = new_head(teacher.model, seed=4)
    return teacher


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_narrower_student_learns_through_a_projection_that_is_not_saved(cached, tmp_path):
    teacher = tiny.encoder()
    settings = spec(objectives={"hidden": 1.0, "sentence": 0.5, "cosine": 0.5}, epochs=6, cache=cached)
    student = start(teacher, 2, hidden=16, heads=2, ffn=40)
    outcome = distill(teacher, student, *data(teacher, settings, tmp_path / "c"), settings, tmp_path / "w")
    held = outcome.curve.query("split == 'heldout'")["loss"]
    assert held.iloc[-1] < 0.85 * held.iloc[0]
    assert outcome.student is student and outcome.head is None
    assert not any("projection" in name for name in student.state_dict())
    student.save_pretrained(tmp_path / "s")
    again = AutoModel.from_pretrained(tmp_path / "s")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), student.state_dict().values()))


def test_projection_starts_as_the_least_squares_fit(tmp_path):
    """At the start, a projection fitted on the training texts explains the held-out states nearly as well as one that
    is fitted on them, and far better than one drawn at random."""
    teacher = tiny.encoder()
    starts = {}
    for projection in ("auto", "shared"):
        settings = spec(projection=projection, objectives={"hidden": 1.0})
        train, held = data(teacher, settings, tmp_path / "c")
        student = start(teacher, 2, hidden=16, heads=2)
        outcome = distill(teacher, student, train, held, settings, tmp_path / projection)
        starts[projection] = outcome.curve.query("split == 'heldout'")["hidden"].iloc[0]
    student = start(teacher, 2, hidden=16, heads=2)
    batch = held.collate(range(len(held)))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        mine = student(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
    layers = [(mine[k + 1][real].double(), batch[f"layer {n}"][real].double()) for k, n in enumerate((2, 4))]
    x, y = (torch.cat([pair[side] / pair[1].std() for pair in layers]) for side in (0, 1))
    ones = torch.cat([torch.ones(len(pair[0]), 1, dtype=torch.double) / pair[1].std() for pair in layers])
    x = torch.cat([x, ones], 1)
    best = (x @ torch.linalg.lstsq(x, y).solution - y).square().mean().item()
    assert best < starts["auto"] < 1.3 * best and starts["shared"] > 1.5 * starts["auto"]


def test_equal_widths_have_a_projection_only_where_the_profile_shares_one(tmp_path, monkeypatch):
    teacher = tiny.encoder()
    seen = []
    monkeypatch.setattr(DistillTrainer, "train", lambda self, **_: seen.append(self.model.projection) or stop())

    def stop():
        raise KeyboardInterrupt

    for projection in ("auto", "shared"):
        settings = spec(projection=projection)
        with pytest.raises(KeyboardInterrupt):
            distill(teacher, start(teacher, 2), *data(teacher, settings, None), settings, tmp_path)
    assert seen[0] is None and seen[1].weight.shape == (32, 32)
    assert seen[1].weight.std().item() == pytest.approx(0.02, rel=0.1) and not seen[1].bias.any()


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [{"kl": 5.0, "mlm": 2.0, "cosine": 1.0}, {"kl": 1.0, "hidden": 1.0}], ids=str)
@pytest.mark.parametrize("hidden", [32, 16])
def test_masked_objectives_train_a_head(objectives, hidden, tmp_path):
    teacher = with_head(tiny.encoder())
    settings = spec(objectives=objectives, epochs=6, freeze_embeddings=False)
    student = start(teacher, 2, hidden=hidden)
    sets = data(teacher, settings, tmp_path / "c")
    assert sets[0].cached is None and not list((tmp_path / "c").rglob("layer-*"))  # they would be of the whole text
    outcome = distill(teacher, student, *sets, settings, tmp_path / "w")
    held = outcome.curve.query("split == 'heldout'")["kl"]
    assert held.iloc[-1] < 0.9 * held.iloc[0] and set(objectives) <= set(outcome.curve.columns)
    head = outcome.head
    assert head.dense.weight.shape == (hidden, hidden) and head.bias.shape == teacher.head.bias.shape
    assert not torch.equal(head.norm.weight, torch.ones(hidden))
    assert torch.equal(teacher.head.norm.weight, torch.ones(32))


def test_students_head_starts_as_the_teachers_where_shapes_fit(tmp_path, monkeypatch):
    teacher = with_head(tiny.encoder())
    torch.nn.init.normal_(teacher.head.bias)
    seen = []
    monkeypatch.setattr(DistillTrainer, "train", lambda self, **_: seen.append(self.model.head) or 1 / 0)
    settings = spec(objectives={"kl": 1.0})
    for hidden in (32, 16):
        with pytest.raises(ZeroDivisionError):
            student = start(teacher, 2, hidden=hidden)
            distill(teacher, student, *data(teacher, settings, None), settings, tmp_path)
    same, narrow = (head.state_dict() for head in seen)
    assert all(torch.equal(same[name], value) for name, value in teacher.head.state_dict().items())
    assert torch.equal(narrow["bias"], teacher.head.bias) and narrow["dense.weight"].shape == (16, 16)


def test_a_copy_of_the_teacher_has_its_soft_targets(tmp_path):
    teacher = with_head(tiny.encoder())
    settings = spec(objectives={"kl": 1.0, "mlm": 0.1}, evaluations=1)
    outcome = distill(teacher, start(teacher, 4), *data(teacher, settings, None, 4), settings, tmp_path)
    assert outcome.curve["kl"].iloc[0] == pytest.approx(0, abs=1e-6) and outcome.curve["mlm"].iloc[0] > 1


def test_mlm_alone_needs_no_teacher(tmp_path, monkeypatch):
    teacher, settings = tiny.encoder(), spec(objectives={"mlm": 1.0}, freeze_embeddings=False, epochs=3)
    student, sets = start(teacher, 2), data(teacher, settings, tmp_path / "c")
    monkeypatch.setattr(teacher.model, "forward", lambda *a, **k: pytest.fail("the teacher ran"))
    held = distill(teacher, student, *sets, settings, tmp_path / "w").curve.query("split == 'heldout'")["mlm"]
    assert held.iloc[-1] < held.iloc[0]


def test_masks_depend_on_seed_epoch_and_texts_alone():
    teacher = tiny.encoder(prefix="ang aso ")
    texts = tokenise(teacher, tiny.texts(40), masks=True)
    sampler = BudgetSampler([len(row) for row in texts.ids], 128)

    def masks(seed=0, epoch=0, places=(3, 1, 20)):
        sampler.set_epoch(epoch)
        return Masking(4, len(teacher.tokenizer), 0.5, seed).collate(texts, sampler, places)

    one, again = masks(), masks()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(masks(seed=1)["input_ids"], one["input_ids"])
    assert not torch.equal(masks(epoch=1)["input_ids"], one["input_ids"])
    plain = texts.collate([3, 1, 20])
    ids, mask = plain["input_ids"], plain["attention_mask"]
    assert torch.equal(ids.flatten()[one["masked"]], one["targets"]) and torch.equal(one["attention_mask"], mask)
    changed = (one["input_ids"] != ids).flatten().nonzero().squeeze(1)
    assert len(changed) and set(changed.tolist()) <= set(one["masked"].tolist())
    width = ids.shape[1]
    for place in one["masked"].tolist():  # neither special tokens nor padding nor the prefix
        row, column = divmod(place, width)
        assert 3 <= column < mask[row].sum() - 1


@pytest.mark.slow
def test_teacher_noise_is_the_teachers_dropout(tmp_path):
    teacher, sets = tiny.encoder(), None
    curves = {}
    for noise in (False, True):
        settings = spec(teacher_noise=noise, learning_rate=1e-9, objectives={"hidden": 1.0})
        sets = data(teacher, settings, tmp_path / str(noise) / "c", 4)
        assert (sets[0].cached is None) == noise
        outcome = distill(teacher, start(teacher, 4), *sets, settings, tmp_path / str(noise) / "w")
        curves[noise] = outcome.curve
        assert not teacher.model.training
    still, noisy = (curves[noise].query("split == 'train'")["hidden"] for noise in (False, True))
    assert still.max() < 1e-4 < 0.01 < noisy.min()
    assert curves[True].query("split == 'heldout'")["hidden"].max() < 1e-4  # the measure stays exact


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, sizes",
    [
        (dict(objectives={"tinybert_hidden": 1.0}), dict(hidden=16)),
        (dict(objectives={"kl": 1.0, "mlm": 1.0, "cosine": 1.0}, freeze_embeddings=False), dict(hidden=16)),
        (dict(teacher_noise=True, projection="shared"), {}),
    ],
    ids=["projection", "masks, head and projection", "teacher noise"],
)
def test_stopped_runs_go_on_to_the_same_weights(changes, sizes, tmp_path, often):
    teacher, settings = with_head(tiny.encoder()), spec(epochs=3, **changes)
    sets = data(teacher, settings, tmp_path / "c")
    whole, broken, fresh = (start(teacher, 2, **sizes) for _ in range(3))
    full = distill(teacher, whole, *sets, settings, tmp_path / "whole")

    def stop(curve):
        if (curve["split"] == "heldout").sum() > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(teacher, broken, *sets, settings, tmp_path / "broken", on_point=stop)
    torch.manual_seed(99)
    resumed = distill(teacher, fresh, *sets, settings, tmp_path / "broken")
    assert list((tmp_path / "broken").glob("checkpoint-*"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))
    held = [o.curve.query("split == 'heldout'")["loss"].iloc[-1] for o in (full, resumed)]
    assert held[0] == held[1]
    if full.head is not None:
        assert all(torch.equal(a, b) for a, b in zip(full.head.parameters(), resumed.head.parameters()))


# what is cached


def test_only_layers_that_are_compared_are_read(tmp_path):
    teacher = tiny.encoder()
    texts = tokenise(teacher, tiny.texts(30))
    wanted = {
        "hidden": {2, 4}, "tinybert_hidden": {0, 2, 4}, "sentence": {4}, "cosine": {4}, "similarity": {4},
        "alignment": {4}, "attention": None, "kl": None, "relation": None, "comet": None,
    }  # fmt: skip
    for name, layers in wanted.items():
        cached = with_states(texts, teacher, spec(objectives={name: 1.0}), tmp_path, 2).cached
        assert (cached and set(cached.layers)) == layers, name
    assert len(list(tmp_path.rglob("layer-*.f16"))) == 3
    late = with_states(texts, teacher, spec(objectives={"hidden": 1.0}, layers="late"), tmp_path, 3).cached
    assert set(late.layers) == {1, 3, 4}
    with pytest.raises(UserError, match="distill.layers names 1 layers for a student of 2"):
        with_states(texts, teacher, spec(objectives={"hidden": 1.0}, layers=[4]), tmp_path, 2)
    assert with_states(texts, teacher, spec(teacher_noise=True), tmp_path, 2).cached is None
    assert with_states(texts, teacher, spec(cache=False), tmp_path, 2).cached is None


@pytest.mark.slow
def test_states_that_are_not_cached_come_from_the_live_teacher(tmp_path):
    """Texts prepared for other objectives: what they lack is not made up, what they have too much is not read."""
    teacher = tiny.encoder()
    ends = {}
    for prepared in ("sentence", "tinybert_hidden", "attention"):
        sets = data(teacher, spec(objectives={prepared: 1.0}), tmp_path / "c")
        settings = spec(objectives={"hidden": 1.0})
        outcome = distill(teacher, start(teacher, 2), *sets, settings, tmp_path / prepared)
        ends[prepared] = outcome.curve["loss"].to_numpy()
        assert (outcome.facts["cache_gigabytes"] > 0) == (prepared == "tinybert_hidden")
    assert np.array_equal(ends["sentence"], ends["attention"])
    assert np.allclose(ends["sentence"], ends["tinybert_hidden"], rtol=5e-3)


# translations


def test_translations_have_the_states_of_the_reader(tmp_path):
    teacher = tiny.encoder()
    settings, given = spec(objectives={"hidden": 1.0, "crosslingual": 1.0}), pairs(teacher, 0)
    texts = prepare(teacher, tiny.texts(50), settings, tmp_path, 2, given)
    assert len(texts) == 50 and list(texts.translations.numbers[:30]) == [-1] * 30
    assert list(texts.translations.numbers[30:]) == list(range(20))
    features = RankCollator(texts, None, None).collate([3, 35])
    assert features["translated"][0].sum() == 0 and features["translation"][0].abs().sum() == 0
    tokens = teacher.tokenize([given.translations[5]])[0].ids
    with torch.inference_mode():
        states = teacher.model(torch.tensor([tokens])).last_hidden_state[0]
    count = int(features["translated"][1].sum())
    assert count == len(tokens)
    assert torch.allclose(features["translation"][1, :count].float(), states, atol=5e-3)
    assert teacher.tokenizer.decode(texts.ids[35], skip_special_tokens=True) == given.texts[5]
    assert "translation" not in RankCollator(texts, None, None).collate([3, 4])
    part = texts.part([35, 3])
    assert list(part.translations.numbers) == [5, -1]


def test_texts_of_objectives_of_translations_alone_are_the_pairs_in_turn(tmp_path):
    teacher = tiny.encoder()
    texts = prepare(teacher, tiny.texts(50), spec(objectives={"transport": 1.0}), None, 2, pairs(teacher, 0))
    assert list(texts.translations.numbers) == [*range(20), *range(20), *range(10)]


@pytest.mark.parametrize(
    "objectives", [{"crosslingual": 1.0}, {"transport": 1.0}, {"crosslingual": 1.0, "hidden": 1.0}], ids=str
)
@pytest.mark.parametrize("sizes", [{}, {"hidden": 16, "heads": 2}], ids=str)
def test_a_student_learns_what_the_teacher_says_of_the_translation(objectives, sizes, tmp_path):
    """Pairs of equal texts under another tokenizer would be cheating: the translations are other texts here."""
    teacher = tiny.encoder()
    settings = spec(objectives=objectives, epochs=8, freeze_embeddings=False)
    given = pairs(teacher, 0)
    sets = [prepare(teacher, tiny.texts(*size), settings, None, 2, given) for size in ((120, 0), (30, 1))]
    outcome = distill(teacher, start(teacher, 2, **sizes), *sets, settings, tmp_path)
    held = outcome.curve.query("split == 'heldout'")
    for name in objectives:
        assert held[name].notna().all() and held[name].iloc[-1] < 0.9 * held[name].iloc[0], name


def test_translations_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    teacher, settings = tiny.encoder(), spec(objectives={"crosslingual": 1.0})
    with pytest.raises(UserError, match="need texts with translations"):
        prepare(teacher, tiny.texts(9), settings, None, 2)
    with pytest.raises(UserError, match="set distill.cache_gigabytes higher"):
        prepare(
            teacher, tiny.texts(9), settings.model_copy(update={"cache_gigabytes": 0.0}), tmp_path, 2, pairs(teacher, 0)
        )
    sets = data(teacher, spec(), None)
    with pytest.raises(ValueError, match="need no translations"):
        distill(teacher, start(teacher, 2), *sets, settings, tmp_path)


# every family, every objective


SHAPE = dict(
    vocab_size=81, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, pad_token_id=0
)  # fmt: skip
FAMILIES = {
    "bert": lambda: BertModel(BertConfig(**SHAPE)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SHAPE)),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**SHAPE)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=81, dim=32, n_layers=4, n_heads=4, hidden_dim=48, pad_token_id=0)
    ),
    "deberta-v2": lambda: DebertaV2Model(
        DebertaV2Config(
            **SHAPE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
            norm_rel_ebd="layer_norm",
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("objectives", [{"relation": 1.0}, {"comet": 1.0}], ids=str)
def test_relations_and_mean_maps_are_learned_with_other_widths_and_heads(objectives, tmp_path):
    teacher = tiny.encoder()
    settings = spec(objectives=objectives, relation_heads=8, epochs=6)
    student = start(teacher, 2, hidden=16, heads=2)
    outcome = distill(teacher, student, *data(teacher, settings, None), settings, tmp_path)
    held = outcome.curve.query("split == 'heldout'")["loss"]
    assert held.iloc[-1] < 0.8 * held.iloc[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_of_every_objective_in_every_family(family, tmp_path):
    torch.manual_seed(0)
    teacher = with_head(Encoder(FAMILIES[family]().eval(), tiny.tokenizer(), family, max_length=32))
    settings = spec(
        objectives=dict.fromkeys(OBJECTIVES, 1.0), relation_heads=4, freeze_embeddings=False, batch_tokens=2000,
        epochs=1,
    )  # fmt: skip
    student = start(teacher, 2, hidden=16, ffn=20, sample=[list(range(5, 30))])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    outcome = distill(teacher, student, *data(teacher, settings, None), settings, tmp_path)
    assert outcome.facts["steps"] == 1
    assert np.isfinite(outcome.curve[["loss", *OBJECTIVES]].to_numpy()).all()
    still = {name for name, value in student.state_dict().items() if torch.equal(value, before[name])}
    assert all("pooler" in name or "token_type" in name or "position" in name for name in still), still


@pytest.mark.slow
def test_compiled_step_is_the_plain_one(tmp_path, monkeypatch):
    def arguments(
        *given, **kwargs
    ):  # traced and differentiated as on a GPU, without the minute that generating code takes
        return TrainingArguments(
            *given, torch_compile_backend="aot_eager" if kwargs["torch_compile"] else None, **kwargs
        )

    monkeypatch.setattr(kdlib.training.arguments, "TrainingArguments", arguments)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    teacher, ends = with_head(tiny.encoder(layers=2)), []
    for compile_ in (False, True):
        objectives = {"attention": 1.0, "hidden": 1.0, "kl": 1.0}
        settings = spec(objectives=objectives, batch_tokens=700, epochs=1, compile=compile_, projection="shared")
        sets = data(teacher, settings, None)
        outcome = distill(teacher, start(teacher, 1), *sets, settings, tmp_path / str(compile_))
        ends.append(outcome.curve["loss"].to_numpy())
    assert np.allclose(*ends, rtol=1e-4)
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0 and not counters["graph_break"]


def test_trainer_is_the_librarys():
    from transformers import Trainer

    assert issubclass(DistillTrainer, Trainer)
