"""What the answers of the notebooks say of the embedded teacher, tried on it: a wrong answer would be noticed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import kdlib
from kdlib.batching import model_inputs
from kdlib.config import Student
from kdlib.evaluation.probing import linear_cka, retrieval, similarity
from kdlib.models.encoder import text_vectors
from kdlib.pruning.model import prune_model
from kdlib.pruning.tokenizer import prune_tokenizer

ROWS = 60
CODES, PREFIXES = ("tgl", "ind"), ("query: ", "hello: ", "")


@pytest.fixture(scope="module")
def teacher(teacher_folder, parallel):
    """The embedded teacher, pruned to the tokens of the sentences, which changes nothing on them."""
    full = kdlib.load_encoder(teacher_folder, prefix="query: ")
    used = set(full.tokenizer.all_special_ids)
    for prefix in PREFIXES:
        encoder = replace(full, prefix=prefix)
        used.update(
            i for code in CODES for e in encoder.tokenize([row[code] for row in parallel[:ROWS]]) for i in e.ids
        )
    model, tokenizer = (
        prune_model(full.model, full.tokenizer, sorted(used)),
        prune_tokenizer(full.tokenizer, sorted(used)),
    )
    return replace(full, model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def texts(parallel):
    return [row["tgl"] for row in parallel[:ROWS]]


def copied(teacher, init, layers):
    model = kdlib.build_student(teacher.model, Student(layers=layers, init=init))
    return replace(teacher, model=model.eval(), name=f"{init} {layers}")


def test_05_1_the_first_layers_are_most_like_the_teacher_until_there_are_six(teacher, texts):
    target = text_vectors(teacher, texts)[:, 0]

    def like(init, layers):
        return similarity(text_vectors(copied(teacher, init, layers), texts)[:, 0], target)

    for layers in (2, 4):
        first, others = like("first", layers), [like(init, layers) for init in ("last", "alternate")]
        assert 0.5 > first > max(others), "the answer of exercise 05.1"
        assert min(others) > 0.05
    assert abs(like("random", 2)) < 0.05 and like("alternate", 6) > like("first", 6)


def test_01_leaving_out_the_prefix_repairs_what_centring_repairs(teacher, parallel):
    found = {}
    for prefix in PREFIXES:
        encoder = replace(teacher, prefix=prefix)
        ours, theirs = (text_vectors(encoder, [row[code] for row in parallel[:ROWS]])[:, 0] for code in CODES)
        found[prefix] = retrieval(ours, theirs).mean(), retrieval(ours, theirs, centred=True).mean()
    assert found[""][0] > found["query: "][0] + 0.2 and found["query: "][1] > found["query: "][0] + 0.2
    assert found[""][0] > found["hello: "][0], "other shared words do it too: not their meaning"


def test_01_shuffled_rows_have_a_cka_far_above_nothing(teacher, texts):
    states = text_vectors(teacher, texts)[:, 0].astype(float)
    shuffled = states[np.random.default_rng(0).permutation(len(states))]
    assert 0.2 < linear_cka(states, shuffled) < 0.9 and linear_cka(states, -2 * states) == pytest.approx(1)


def test_03_a_copied_student_begins_worse_than_a_constant(teacher, texts):
    rows = [encoding.ids for encoding in teacher.tokenize(texts[:16])]
    batch = model_inputs(rows, None, teacher.tokenizer.pad_token_id)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = teacher.model(**batch, output_hidden_states=True).hidden_states
        mine = copied(teacher, "alternate", 2).model(**batch, output_hidden_states=True).hidden_states
    untrained, constant = [], []
    for layer, m in zip((6, 12), mine[1:]):
        t = theirs[layer][real]
        untrained.append((m[real] - t).square().mean() / t.var())
        constant.append((t - t.mean(0)).square().mean() / t.var())
    assert sum(untrained) > sum(constant) and sum(constant) / 2 < 0.9
