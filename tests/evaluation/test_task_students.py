"""Students of tasks: soft labels, plain transformers models, and what is chosen."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline

from kdlib import config
from kdlib.errors import UserError
from kdlib.evaluation import task_students as module
from kdlib.evaluation.finetuning import Rows, Tokens, answers, outputs
from kdlib.evaluation.metrics import score
from kdlib.evaluation.task_students import (
    Learner,
    SoftLabels,
    SoftRows,
    chosen,
    fit_start,
    learn,
    load_soft,
    plain_model,
    save_soft,
    soft_loss,
    teach,
)

KINDS = ["classify", "multilabel", "pair", "tokens"]
TUNING = tiny.SPEC.model_copy(update=dict(finetune_head="probe", fewshot_steps=10, finetune_epochs=4.0))
SPEC = config.TaskStudent(learning_rate=2e-3, epochs=4)


def unlabelled(kind, count=60):
    texts = tiny.texts(count, 11)
    return {"pair": list(zip(texts, tiny.texts(count, 12))), "tokens": [t.split() for t in texts]}.get(kind, texts)


def soft_of(task, texts, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(len(text), len(task.labels)) if task.kind == "tokens" else (len(task.labels),) for text in texts]
    vectors = rng.normal(size=(len(texts), 32)).astype(np.float32)
    return SoftLabels(list(texts), [rng.normal(size=shape).astype(np.float32) for shape in shapes], vectors)


def test_the_soft_loss_is_the_kl_divergence_written_out():
    student, teacher, t = torch.randn(5, 3), torch.randn(5, 3), 2.0
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    wanted = t**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(soft_loss("classify", student, teacher, t), wanted)
    p, q = (teacher / t).sigmoid(), (student / t).sigmoid()
    wanted = t**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(soft_loss("multilabel", student, teacher, t), wanted)


def test_tokens_without_soft_labels_are_left_out_of_the_loss():
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    part = soft_loss("tokens", student[:, :2].reshape(4, 3), teacher[:, :2].reshape(4, 3), 1.0)
    teacher[:, 2:] = torch.nan
    torch.testing.assert_close(soft_loss("tokens", student, teacher, 1.0), part)
    assert soft_loss("tokens", student, torch.full_like(teacher, torch.nan), 1.0) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_labels_the_training_rows_and_then_the_texts(kind):
    task, texts = tiny.task(kind).few(8, 10), unlabelled(kind)
    predicted, soft = teach(tiny.encoder(layers=1), task, texts, TUNING, 0, hidden=True)
    assert soft.texts == [*task.train.texts, *texts] and len(soft.logits) == len(soft) == len(soft.vectors)
    wanted = [(len(text), len(task.labels)) if kind == "tokens" else (len(task.labels),) for text in soft.texts]
    assert [logits.shape for logits in soft.logits] == wanted
    assert len(score(task, predicted)[0].items) == len(task.test)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels_are_read_as_they_were_written(kind, tmp_path):
    task = tiny.task(kind)
    soft = soft_of(task, task.train.texts)
    predicted = answers(soft_of(task, task.test.texts).logits, kind)
    save_soft(tmp_path / "soft.npz", soft, predicted)
    found, read = load_soft(tmp_path / "soft.npz", soft.texts, kind)
    assert np.asarray(found, object).tolist() == np.asarray(predicted, object).tolist()
    assert all(np.array_equal(a, b) for a, b in zip(soft.logits, read.logits, strict=True))
    assert np.array_equal(soft.vectors, read.vectors)


def test_a_row_without_a_label_adds_to_the_soft_loss_alone():
    for kind in KINDS:
        task = tiny.task(kind).few(4, 10)
        soft = soft_of(task, [*task.train.texts, *unlabelled(kind, 6)])
        rows = SoftRows(Tokens(tiny.encoder(layers=1)), task, soft)
        model = plain_model(tiny.encoder(layers=1), task).eval()
        alone = rows.collate([len(task.train)])  # a text without a label
        spec = SPEC.model_copy(update={"share": 0.25})
        with torch.no_grad():
            found = Learner(model, kind, spec)(**alone)
            wanted = 0.25 * soft_loss(kind, found["logits"], alone["soft"], spec.temperature)
        torch.testing.assert_close(found["loss"], wanted)


def test_labels_and_soft_labels_are_weighted_by_the_share():
    task = tiny.task("classify").few(4, 10)
    soft = soft_of(task, task.train.texts)
    batch = SoftRows(Tokens(tiny.encoder(layers=1)), task, soft).collate([0, 1, 2])
    model = plain_model(tiny.encoder(layers=1), task).eval()
    spec = SPEC.model_copy(update={"share": 0.25, "hidden": 0.5})
    with torch.no_grad():
        found = Learner(model, "classify", spec)(**batch)
        hard = torch.nn.functional.cross_entropy(found["logits"], batch["labels"])
        states = model.base_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        own = torch.stack([states[r, : int(batch["attention_mask"][r].sum())].mean(0) for r in range(3)])
    near = (own - batch["vectors"]).square().mean() / batch["vectors"].var()
    wanted = 0.75 * hard + 0.25 * soft_loss("classify", found["logits"], batch["soft"], 2.0) + 0.5 * near
    torch.testing.assert_close(found["loss"], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_of_a_plain_model_starts_as_a_fitted_probe(kind):
    task = tiny.task(kind)
    tokens = Tokens(tiny.encoder(layers=2))
    model, rows = plain_model(tiny.encoder(layers=2), task), Rows(tokens, kind, task.train)
    fit_start(model, rows)
    found = answers(outputs(Learner(model.eval(), kind, SPEC), rows, False), kind)
    metrics = score(replace(task, test=task.train), found)
    assert metrics[-1].value > {"multilabel": 0.6}.get(kind, 0.7)


def test_a_student_learns_more_from_soft_labels_that_know_the_answer():
    task, texts = tiny.task("classify"), unlabelled("classify", 300)
    few = task.few(4, None)
    every = [*few.train.texts, *texts]
    long = np.array([len(text.split()) > 3 for text in every])
    logits = [np.array([-4.0, 4.0] if right else [4.0, -4.0], np.float32) for right in long]
    soft = SoftLabels(every, logits, np.zeros((len(every), 32), np.float32))
    scores = []
    for given in (None, soft):
        _, predicted = learn(tiny.encoder(layers=2), few, given, SPEC, TUNING, 0)
        scores.append(score(few, predicted)[0].value)
    assert scores[1] > 0.85 and scores[1] > scores[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_loads_with_transformers_alone_and_predicts_the_same(kind, tmp_path):
    task = tiny.task(kind).few(4, 12)
    student = tiny.encoder(layers=1)
    model, predicted = learn(student, task, None, SPEC, TUNING, 0)
    model.save_pretrained(tmp_path)
    student.tokenizer.save_pretrained(tmp_path)
    auto = AutoModelForTokenClassification if kind == "tokens" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path)
    assert list(loaded.config.id2label.values()) == task.labels
    task_name = "token-classification" if kind == "tokens" else "text-classification"
    classify = pipeline(task_name, model=str(tmp_path))
    for text, label in zip(task.test.texts, predicted):
        if kind == "tokens":
            found = {entry["index"] - 1 for entry in classify(" ".join(text), ignore_labels=["O"])}
            assert found == {i for i, tag in enumerate(label) if tag}
        elif kind == "multilabel":
            scores = {entry["label"]: entry["score"] for entry in classify(text, top_k=None)}
            assert [int(scores[name] > 0.5) for name in task.labels] == list(label)
        else:
            given = {"text": text[0], "text_pair": text[1]} if kind == "pair" else text
            found = classify([given])[0]
            assert (found[0] if isinstance(found, list) else found)["label"] == task.labels[label]


def test_only_sure_texts_are_chosen():
    task = tiny.task("classify")
    soft = soft_of(task, [f"text {i}" for i in range(50)])
    spec = SPEC.model_copy(update={"confidence": 0.8})
    wanted = []
    for text, logits in zip(soft.texts, soft.logits):
        odds = np.exp(logits) / np.exp(logits).sum()
        wanted += [text] if odds.max() >= 0.8 else []
    assert chosen(soft, task, spec, 0).texts == wanted and 0 < len(wanted) < 50
    assert len(chosen(soft, task, SPEC.model_copy(update={"confidence": 0.9999}), 0)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_confidence_is_a_probability_for_every_kind(kind):
    task = tiny.task(kind)
    values = [module.confidence(logits, kind) for logits in soft_of(task, task.test.texts).logits]
    assert all(0.5 <= value <= 1 for value in values)
    if kind == "tokens":
        assert module.confidence(np.array([[0.0, 3.0], [np.nan, np.nan]]), kind) == pytest.approx(1 / (1 + np.exp(-3)))


def test_balance_takes_no_more_of_a_class_than_its_share():
    task = tiny.task("classify")
    texts = [f"text {i}" for i in range(40)]
    logits = [np.array([1.0, 0.0] if i < 34 else [0.0, 1.0], np.float32) for i in range(40)]
    soft = SoftLabels(texts, logits, np.zeros((40, 4), np.float32))
    found = chosen(soft, task, SPEC.model_copy(update={"balance": True}), 0)
    labels = answers(found.logits, "classify")
    assert (labels == 0).sum() == 20 and (labels == 1).sum() == 6
    assert all(soft.texts.index(text) < 34 for text, label in zip(found.texts, labels) if label == 0)


def test_hidden_states_of_another_width_are_refused():
    task = tiny.task("classify").few(2, 4)
    soft = soft_of(task, task.train.texts)
    with pytest.raises(UserError, match="as wide as the teacher"):
        learn(tiny.encoder(layers=1, hidden=16), task, soft, SPEC.model_copy(update={"hidden": 1.0}), TUNING, 0)


def test_a_wrong_arm_is_refused_when_the_profile_is_read():
    with pytest.raises(UserError, match="task_student"):
        config.load_profile("smoke", {"task_student.arms": {"wrong": {"confidence": 3}}})
