"""Fine-tuning of tiny models on tasks that can be learned."""

import numpy as np
import pytest
import tiny
import torch
from tokenizers import processors

from kdlib import config
from kdlib.data.tasks import Split, Task
from kdlib.evaluation import finetuning as module
from kdlib.evaluation.finetuning import TaskModel, Tokens, finetune, fit_head, predict
from kdlib.evaluation.metrics import score
from kdlib.evaluation.probing import linear_probe, task_vectors, train_targets
from kdlib.evaluation.speed import size_rows, speed_rows
from kdlib.training.callbacks import Curve

SPEC = config.Benchmark(
    seeds=[0, 1, 2], finetune_epochs=12.0, finetune_rate=5e-3, finetune_batch=16, bootstrap=100, latency_runs=3
)


def task(kind):
    texts = tiny.texts(140)
    if kind == "tokens":
        words = [text.split() for text in texts]
        rows = Split(words, [[int(word in ("aso", "pusa")) for word in row] for row in words])
        labels = ["O", "B-ANIMAL"]
    elif kind == "multilabel":
        rows, labels = (
            Split(texts, [[int(word in t.split()) for word in ("aso", "ang")] for t in texts]),
            ["aso", "ang"],
        )
    elif kind == "pair":
        seconds = tiny.texts(140, 5, 3)
        rows = Split(list(zip(texts, seconds)), [int(len(a.split()) > 3) for a in texts])
        labels = ["no", "yes"]
    else:
        rows, labels = Split(texts, [int(len(t.split()) > 3) for t in texts]), ["short", "long"]
    return Task(
        f"{kind} task",
        kind,
        labels,
        Split(rows.texts[:100], rows.targets[:100]),
        Split(rows.texts[100:], rows.targets[100:]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classify", "multilabel", "pair", "tokens"])
def test_every_kind_runs_and_scores_lie_between_0_and_1(kind):
    metrics = finetune(tiny.encoder(layers=2), task(kind), SPEC)
    assert all(0 <= m.value <= 1 and len(m.items) == 40 for m in metrics)


@pytest.mark.slow
def test_what_can_be_learned_is_learned():
    assert finetune(tiny.encoder(layers=2), task("classify"), SPEC)[0].value > 0.85
    assert finetune(tiny.encoder(layers=2), task("tokens"), SPEC)[0].value > 0.85


@pytest.mark.parametrize("kind", ["classify", "multilabel", "tokens"])
def test_a_head_starts_as_the_linear_probe_of_the_encoder_as_it_is(kind):
    encoder, rows = tiny.encoder(layers=2), task(kind)
    tokens = Tokens(encoder)
    model = TaskModel(encoder.model, kind, len(rows.labels)).eval()
    fit_head(model, encoder, rows)
    mine = score(rows, predict(model, module.Rows(tokens, kind, rows.test), rows, False))
    train, test, places = task_vectors(encoder, rows)
    probed = linear_probe(rows, train[:, 0], train_targets(encoder, rows), test[:, 0], places)
    assert [metric.name for metric in mine] == [metric.name for metric in probed]
    for found, wanted in zip(mine, probed):
        np.testing.assert_array_equal(found.items, wanted.items)


def test_a_head_that_starts_as_a_probe_is_no_worse_for_a_step_of_training():
    few, spec = task("classify").few(8, 40, 0), SPEC.model_copy(update=dict(finetune_epochs=0.1, finetune_rate=1e-5))
    scores = {}
    for head in ("random", "probe"):
        changed = spec.model_copy(update=dict(finetune_head=head))
        scores[head] = finetune(tiny.encoder(layers=2), few, changed)[0].value
    assert scores["probe"] > scores["random"]


def test_a_head_of_examples_that_lack_a_class_guesses_the_others():
    rows = task("classify")
    one = Task("one class", "classify", rows.labels, Split(rows.train.texts[:5], [1] * 5), rows.test)
    model, tokens = TaskModel(tiny.encoder(layers=2).model, "classify", 2), Tokens(tiny.encoder(layers=2))
    fit_head(model, tokens.encoder, one)
    assert all(torch.isfinite(value).all() for value in model.head.parameters())
    assert set(predict(model.eval(), module.Rows(tokens, "classify", one.test), one, False)) == {1}


@pytest.mark.slow
def test_same_seed_same_score_and_the_encoder_is_left_alone():
    encoder = tiny.encoder(layers=2)
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    first, second = (finetune(encoder, task("classify"), SPEC, seed=4)[0].items for _ in range(2))
    assert np.array_equal(first, second)
    assert all(torch.equal(before[name], value) for name, value in encoder.model.state_dict().items())


@pytest.mark.slow
def test_a_longer_run_is_as_long_as_it_says(monkeypatch):
    steps = []
    monkeypatch.setattr(Curve, "on_train_end", lambda self, args, state, control, **_: steps.append(state.global_step))
    spec = SPEC.model_copy(update=dict(finetune_epochs=2.0, finetune_batch=25))
    for least in (0, 3, 19):
        finetune(tiny.encoder(layers=1), task("classify"), spec, min_steps=least)
    two_epochs = steps[0]
    assert 8 <= two_epochs <= 12 and steps == [two_epochs, two_epochs, 19]


@pytest.mark.slow
def test_texts_are_tokenised_once_and_runs_are_as_without():
    encoder, whole = tiny.encoder(layers=1), task("tokens")
    tokens, seen = Tokens(encoder), []
    tokenize = type(encoder).tokenize
    tokens.encoder.tokenize = lambda texts: seen.extend(map(tuple, texts)) or tokenize(tokens.encoder, texts)
    spec = SPEC.model_copy(update=dict(finetune_epochs=3.0))
    for seed in (0, 1):
        few = whole.small(60, None, seed)
        shared = finetune(encoder, few, spec, seed, tokens)[0].items
        np.testing.assert_array_equal(shared, finetune(encoder, few, spec, seed)[0].items)
    assert len(seen) == len(set(seen)) and set(map(tuple, whole.test.texts)) <= set(seen)


def test_many_texts_are_tokenised_in_parts(monkeypatch):
    encoder = tiny.encoder(layers=1)
    texts = tiny.texts(50)
    whole = [row.ids.tolist() for row in Tokens(encoder).of(texts)]
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 7)
    parts = [row.ids.tolist() for row in Tokens(encoder).of(texts)]
    assert parts == whole == [e.ids for e in encoder.tokenize(texts)]


def test_length_is_the_encoders_or_the_profiles_as_far_as_the_model_goes():
    encoder = tiny.encoder(layers=1)  # max_length 32, 64 positions
    lengths = {limit: len(Tokens(encoder, limit).of(["ang " * 100])[0].ids) for limit in (None, 8, 50, 512)}
    assert lengths == {None: 32, 8: 8, 50: 50, 512: 64} and encoder.max_length == 32


@pytest.mark.slow
def test_pairs_bring_token_types_where_the_model_knows_them():
    """The same tokens in both classes: only where the second text begins tells them apart."""
    encoder = tiny.encoder(layers=2)
    encoder.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    texts = [pair for text in tiny.texts(60) for pair in (("ang", f"{text} na"), (f"ang {text}", "na"))]
    assert len({tuple(encoding.ids) for encoding in encoder.tokenize(texts[:2])}) == 1
    rows = Split(texts, [0, 1] * 60)
    pairs = Task("pairs", "pair", ["early", "late"], rows.pick(range(80)), rows.pick(range(80, 120)))
    blind = finetune(encoder, pairs, SPEC)[0].value
    encoder.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert finetune(encoder, pairs, SPEC)[0].value > 0.95 and blind == 0.5


def test_sizes_and_speeds_are_of_the_model_at_hand():
    encoder = tiny.encoder(layers=2)
    sizes = {row["metric"]: row["value"] for row in size_rows(encoder, "x")}
    assert sizes["parameters"] == sum(p.numel() for p in encoder.model.parameters())
    assert sizes["megabytes"] == sizes["parameters"] * 4 / 1e6
    rows = speed_rows({"a": encoder, "b": tiny.encoder(layers=1)}, tiny.texts(80), runs=3)
    assert {(r["model"], r["metric"]) for r in rows} == {
        (m, k) for m in "ab" for k in ("latency_ms", "sentences_per_second")
    }
    assert all(0 < r["low"] <= r["value"] <= r["high"] for r in rows)
