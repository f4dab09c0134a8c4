"""Folders of sentence-transformers: the kit's vectors are those of the real library, of teachers and of students."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import kdlib
from kdlib import config
from kdlib.distillation.distill import distill
from kdlib.distillation.tokenized_corpus import prepare
from kdlib.errors import UserError
from kdlib.models.encoder import text_vectors
from kdlib.models.loading import load_teacher
from kdlib.models.onnx import export_student, load_exported
from kdlib.models.sentence import SentenceVector, mean_pool
from kdlib.pruning.selection import select_tokens
from kdlib.viz.examples import text_vector

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import modules  # noqa: E402

TEXTS = ["ang aso", *tiny.texts(20, length=12), " ".join(tiny.WORDS * 4)]  # the last is truncated
POOLINGS = ["mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens"]


def write(folder, *more, pooling="mean", **settings):
    """A teacher's folder, as the library itself writes it."""
    tiny.encoder(layers=2).save(folder / "base")
    first = modules.Transformer(str(folder / "base"), max_seq_length=32)
    made = sentence_transformers.SentenceTransformer(
        modules=[first, modules.Pooling(32, pooling), *more], device="cpu", **settings
    )
    made.save(str(folder / "teacher"))
    return folder / "teacher"


def labse(folder):
    """CLS pooling, a dense layer and length 1, with prompts."""
    torch.manual_seed(1)
    return write(
        folder, modules.Dense(32, 24), modules.Normalize(), pooling="cls",
        prompts={"query": "ulan: ", "passage": "araw: "}, default_prompt_name="query",
    )  # fmt: skip


def real(folder, texts=TEXTS):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)


def ours(encoder, texts=TEXTS):
    return text_vectors(encoder, texts)[:, 0]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_of_every_pooling_are_the_librarys(pooling, tmp_path):
    folder = write(tmp_path, pooling=pooling)
    encoder = load_teacher(config.Teacher(source=str(folder)))
    assert encoder.sentence.pooling == pooling
    np.testing.assert_allclose(ours(encoder), real(folder), atol=1e-5)
    encoder.save(tmp_path / "again")
    np.testing.assert_allclose(real(tmp_path / "again"), real(folder), atol=1e-5)


def test_dense_layers_normalisation_and_prompts_are_the_librarys(tmp_path):
    folder = labse(tmp_path)
    encoder = load_teacher(config.Teacher(source=str(folder)))
    assert encoder.prefix == "ulan: "
    found = ours(encoder)
    assert found.shape == (len(TEXTS), 24) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found, real(folder), atol=1e-5)
    np.testing.assert_allclose(text_vector(encoder, TEXTS[1]), found[1], atol=1e-5)
    other = load_teacher(config.Teacher(source=str(folder), prefix="araw: "))
    passage = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt_name="passage")
    np.testing.assert_allclose(ours(other), passage, atol=1e-5)
    assert text_vectors(encoder, TEXTS, [1, 2]).shape == (len(TEXTS), 2, 32)  # layers have states, not vectors


@pytest.mark.parametrize("sizes", [{}, {"hidden": 16, "heads": 2}], ids=["as wide", "narrower"])
def test_a_pruned_and_distilled_student_gives_the_kits_vectors_in_the_library(sizes, tmp_path):
    """The dense layer of a narrower student contains the projection to the teacher's states."""
    teacher = load_teacher(config.Teacher(source=str(labse(tmp_path)), max_length=24))
    ids = select_tokens(teacher.tokenizer, TEXTS).ids
    kdlib.prune_encoder(teacher, ids, tmp_path / "pruned", tmp_path / "teacher")
    np.testing.assert_allclose(real(tmp_path / "pruned"), ours(teacher), atol=1e-5)
    pruned = kdlib.load_encoder(tmp_path / "pruned", max_length=24)
    assert pruned.prefix == "ulan: " and pruned.sentence.prompts == teacher.sentence.prompts
    spec = config.Distill(objectives={"sentence": 1.0}, epochs=8, batch_tokens=128, learning_rate=3e-3)
    texts = prepare(pruned, TEXTS, spec, tmp_path / "cache", 1)
    start = kdlib.build_student(pruned.model, config.Student(layers=1, **sizes))
    outcome = distill(pruned, start, texts, texts, spec, tmp_path / "work")
    student = kdlib.models.encoder.Encoder(
        outcome.student, pruned.tokenizer, "student", pruned.prefix, 24, sentence=outcome.sentence
    )
    student.save(tmp_path / "student")
    np.testing.assert_allclose(real(tmp_path / "student"), ours(student), atol=1e-5)
    again = kdlib.load_encoder(tmp_path / "student", max_length=24)
    np.testing.assert_allclose(ours(again), ours(student), atol=1e-6)
    assert again.prefix == "ulan: " and ours(student).shape == (len(TEXTS), 24)
    cosine = (ours(student) * ours(pruned)).sum(1).mean()  # the loss is of these very vectors
    assert 1 - cosine == pytest.approx(outcome.curve.query("split == 'heldout'")["sentence"].iloc[-1], abs=1e-2)


def test_a_narrower_student_that_is_not_distilled_has_no_dense_layer():
    dense = nn.Sequential(nn.Linear(32, 8), nn.Tanh())
    assert SentenceVector(dense=[dense]).after(32).width == 8
    assert SentenceVector("cls", [dense]).after(16).described == "cls pooling"


@pytest.mark.slow
def test_dense_layers_survive_the_export_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    student = kdlib.load_encoder(labse(tmp_path))
    export_student(student, tmp_path, int8=False)
    fast = load_exported(tmp_path, "onnx fp32")
    np.testing.assert_allclose(fast.vectors(TEXTS), ours(student), atol=1e-5)
    np.testing.assert_allclose(ours(fast), ours(student), atol=1e-5)


def test_older_settings_are_read(tmp_path):
    folder = labse(tmp_path)
    modules_file = folder / "modules.json"
    entries = json.loads(modules_file.read_text())
    for entry in entries:
        entry["type"] = "sentence_transformers.models." + entry["type"].rpartition(".")[2]
    modules_file.write_text(json.dumps(entries))
    old = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    shutil.rmtree(folder / "3_Normalize")
    np.testing.assert_allclose(ours(kdlib.load_encoder(folder)), real(folder), atol=1e-5)


def test_lower_casing_becomes_a_part_of_the_tokenizer(tmp_path):
    folder = write(tmp_path)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": true}')
    encoder = kdlib.load_encoder(folder)
    assert np.array_equal(ours(encoder, ["ANG Aso"]), ours(encoder, ["ang aso"]))
    encoder.save(tmp_path / "again")
    np.testing.assert_allclose(real(tmp_path / "again", ["ANG Aso"]), ours(encoder, ["ang aso"]), atol=1e-5)


def test_a_prompt_that_is_no_default_is_told(tmp_path, caplog):
    kdlib.load_encoder(write(tmp_path, prompts={"query": "ulan: "}))
    assert "no prefix is set; its prompts are query: 'ulan: '" in caplog.text


def change(name, **settings):
    def apply(folder):
        file = folder / name
        found = json.loads(file.read_text())
        if isinstance(found, list):
            found[-1] |= settings
        else:
            found |= settings
        file.write_text(json.dumps(found))

    return apply


@pytest.mark.parametrize(
    "spoil, said",
    [
        (change("modules.json", type="sentence_transformers.models.LSTM"), "module 'LSTM'; supported are Transformer"),
        (change("1_Pooling/config.json", pooling_mode=["cls", "mean"]), "a pooling cls and mean; supported are mean"),
        (change("1_Pooling/config.json", include_prompt=False), "a pooling that leaves out the prompt"),
        (change("2_Dense/config.json", use_residual=True), "dense layer 2_Dense has an activation, residual or input"),
        (change("2_Dense/config.json", activation_function="own.Swish"), "dense layer 2_Dense has an activation"),
        (lambda folder: (folder / "2_Dense/model.safetensors").unlink(), "the weights of 2_Dense are missing"),
        (lambda folder: (folder / "2_Dense/model.safetensors").write_bytes(b"x"), "weights of 2_Dense cannot be read"),
        (lambda folder: (folder / "modules.json").write_text("{"), "modules.json: damaged"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(spoil, said, tmp_path):
    folder = labse(tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=said) as raised:
        kdlib.load_encoder(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_without_such_settings_has_mean_vectors(tmp_path):
    encoder = tiny.encoder(layers=1)
    assert encoder.sentence.plain and encoder.sentence.described == "mean pooling"
    states, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert torch.equal(encoder.sentence(states, mask), mean_pool(states, mask))
