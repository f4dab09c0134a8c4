"""Fast students: the ONNX files give what the student gives, the 8-bit one nearly; no more is needed to run them."""

import copy
import json
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
import torch
from tokenizers import processors
from transformers import RobertaConfig, RobertaModel

from kdlib.data.tasks import Split, Task
from kdlib.errors import UserError
from kdlib.evaluation.probing import similarity, task_vectors
from kdlib.evaluation.speed import export_rows
from kdlib.models import onnx as export
from kdlib.models.encoder import Encoder, text_vectors, word_vectors
from kdlib.models.onnx import FILES, FOLDER, export_student, load_exported
from kdlib.models.sentence import mean_pool

TEXTS = ["", "si ako", *tiny.texts(30, length=12), " ".join(tiny.WORDS * 4)]  # the last is cut
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
needs_packages = pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason="needs the optional packages: pip install 'kdlib[onnx]'"
)


def typed():
    """A BERT that tells the texts of a pair by token types."""
    encoder = tiny.encoder(layers=1, prefix="ulan: ")
    encoder.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    encoder.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return encoder


def roberta():
    """A model that numbers positions from the pad id on, and knows no token types."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=0, type_vocab_size=1,
    )  # fmt: skip
    model = RobertaModel(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return Encoder(model.eval(), tokenizer, "tiny RoBERTa", max_length=32)


@pytest.fixture(scope="module", params=[typed, roberta])
def exported(request, tmp_path_factory):
    encoder, folder = request.param(), tmp_path_factory.mktemp("exported")
    before = copy.deepcopy(encoder.model.state_dict())
    export_student(encoder, folder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
    return encoder, folder


@pytest.mark.slow
@needs_packages
def test_fp32_file_gives_the_students_vectors(exported):
    encoder, folder = exported
    fast = load_exported(folder, "onnx fp32")
    expected = text_vectors(encoder, TEXTS)[:, 0]
    np.testing.assert_allclose(fast.vectors(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(text_vectors(fast, TEXTS)[:, 0], expected, atol=1e-5)
    assert np.std(expected) > 0.1 and fast.vectors([]).shape == (0, 32)
    assert (fast.prefix, fast.max_length, fast.layers, fast.hidden) == (encoder.prefix, 32, 1, 32)


@needs_packages
@pytest.mark.parametrize("kind", FILES)
def test_batch_and_length_are_free(kind, exported):
    encoder, folder = exported
    fast = load_exported(folder, kind)
    for batch, tokens in ((1, 1), (1, 32), (3, 7), (40, 2)):
        ids = torch.randint(5, 20, (batch, tokens))
        mask = torch.ones_like(ids)
        mask[0, 1 + tokens // 2 :] = 0
        states = fast.model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert states.shape == (batch, tokens, 32)
        pooled = fast.model.run("sentence_embedding", input_ids=ids, attention_mask=mask)
        np.testing.assert_allclose(pooled, mean_pool(states, mask), atol=1e-5)
        if kind == "onnx fp32":
            with torch.inference_mode():
                expected = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
            np.testing.assert_allclose(states[mask > 0], expected[mask > 0], atol=1e-5)


@needs_packages
def test_int8_file_is_small_and_nearly_right(exported):
    import onnx

    encoder, folder = exported
    fast = load_exported(folder)
    assert fast.name == "onnx int8" and fast.prefix == encoder.prefix
    expected, found = text_vectors(encoder, TEXTS)[:, 0], fast.vectors(TEXTS)
    assert 0.98 < similarity(found, expected) < 1 - 1e-6
    model = onnx.load(folder / FOLDER / "model_int8.onnx")
    weights = [onnx.numpy_helper.to_array(w) for w in model.graph.initializer]
    small, wide = (sum(w.nbytes for w in weights if (w.itemsize == 1) == one) for one in (True, False))
    tables = [p.numel() for name, p in encoder.model.named_parameters() if p.dim() == 2 and "pooler" not in name]
    assert small > 0.99 * sum(tables) > 5 * wide
    products = [w for w in weights if w.dtype == np.int8 and w.shape in ((32, 32), (32, 64), (64, 32))]
    assert len(products) == 6 and all(np.abs(w.astype(int)).max() <= 64 for w in products)  # 7 bits


@needs_packages
def test_every_kind_of_text_is_encoded_as_the_student_does(exported):
    encoder, folder = exported
    fast = load_exported(folder, "onnx fp32")
    pairs = list(zip(TEXTS[2:12], TEXTS[12:22]))
    np.testing.assert_allclose(text_vectors(fast, pairs), text_vectors(encoder, pairs), atol=1e-5)
    np.testing.assert_allclose(fast.vectors(pairs), text_vectors(encoder, pairs)[:, 0], atol=1e-5)
    lists = [text.split() for text in TEXTS[2:12]]
    (found, places), (expected, same) = word_vectors(fast, lists), word_vectors(encoder, lists)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert places.tolist() == same.tolist()


@needs_packages
def test_folder_is_all_that_is_needed(exported, tmp_path):
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

    encoder, folder = exported
    shutil.copytree(folder / FOLDER, tmp_path / FOLDER)
    assert np.array_equal(load_exported(tmp_path).vectors(TEXTS), load_exported(folder).vectors(TEXTS))
    assert sorted(file.name for file in (tmp_path / FOLDER).iterdir()) == [
        "config.json", "model.onnx", "model_int8.onnx", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    # As somebody without kdlib or torch would go about it.
    session = InferenceSession(tmp_path / FOLDER / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    tokenizer = Tokenizer.from_file(str(tmp_path / FOLDER / "tokenizer.json"))
    ids = tokenizer.encode(facts["prefix"] + TEXTS[3]).ids
    given = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "token_type_ids": [[0] * len(ids)]}
    given = {entry.name: np.array(given[entry.name]) for entry in session.get_inputs()}
    found = session.run(["sentence_embedding"], given)[0]
    np.testing.assert_allclose(found[0], text_vectors(encoder, TEXTS[3:4])[0, 0], atol=1e-5)


@needs_packages
def test_older_export_goes_and_the_student_stays(exported, tmp_path, monkeypatch):
    encoder, folder = exported
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "model_int8.onnx").write_text("old")
    (tmp_path / "model.safetensors").write_text("the student's own")
    monkeypatch.setattr(export, "write_onnx", lambda _, file: shutil.copy(folder / FOLDER / file.name, file))
    export_student(encoder, tmp_path, int8=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", FOLDER]
    assert load_exported(tmp_path, "onnx fp32").vectors(["ang aso"]).shape == (1, 32)
    with pytest.raises(UserError, match="model_int8.onnx: no exported student"):
        load_exported(tmp_path)


@needs_packages
def test_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "old").write_text("old")
    monkeypatch.setattr(export, "write_onnx", fail)
    with pytest.raises(UserError, match="No space left"):
        export_student(tiny.encoder(layers=1), tmp_path)
    assert [file.name for file in tmp_path.rglob("*")] == [FOLDER, "old"]


@needs_packages
def test_model_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(UserError, match="too many for an ONNX file"):
        export_student(tiny.encoder(layers=1), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_packages
def test_model_without_onnx_operations_is_refused(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.linalg.eigvals(input_ids.float() @ attention_mask.float().T)

    encoder = tiny.encoder(layers=1)
    encoder.model.forward = Odd().forward
    with pytest.raises(UserError, match="BertModel cannot be exported"):
        export_student(encoder, tmp_path)
    assert not list(tmp_path.iterdir())


@needs_packages
@pytest.mark.parametrize("damage", ["cut", "no config", "not ours"])
def test_what_is_no_export_is_refused(damage, exported, tmp_path):
    import onnx

    shutil.copytree(exported[1] / FOLDER, tmp_path / FOLDER)
    file = tmp_path / FOLDER / "model.onnx"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "no config":
        (tmp_path / FOLDER / "config.json").unlink()
    else:
        model = onnx.load(file)
        del model.metadata_props[:]
        onnx.save(model, file)
    with pytest.raises(UserError, match="not a student that kdlib exported"):
        load_exported(tmp_path, "onnx fp32")


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None if name == package else json)
    for act in (lambda: export_student(tiny.encoder(layers=1), tmp_path), lambda: load_exported(tmp_path)):
        with pytest.raises(UserError, match=rf"{package}: pip install 'kdlib\[onnx\]'"):
            act()


def sky():
    """A task that a word tells: does it rain?"""
    texts = tiny.texts(80, seed=1)
    targets = [int("ulan" in text or "tubig" in text) for text in texts]
    return Task("rain", "classify", ["no", "yes"], Split(texts[:50], targets[:50]), Split(texts[50:], targets[50:]))


@needs_packages
def test_rows_say_what_is_kept_and_what_it_costs(exported):
    encoder, folder = exported
    task = sky()
    rows = export_rows(encoder, folder, task, TEXTS, runs=3, lengths=(8, 16, 64))
    assert {row["model"] for row in rows} == {"student"}
    by = {(row["method"], row["metric"], row.get("x")): row for row in rows}
    assert len(by) == len(rows) == 3 * (2 + 2 + 2 + 2 * 2)  # 64 tokens are more than the student takes
    methods = ["torch fp32", *FILES]
    for method in methods:
        score = by[method, "accuracy", None]
        assert score["task"] == "rain" and score["n"] == 30 and score["low"] <= score["value"] <= score["high"]
        for metric in ("latency_ms", "sentences_per_second"):
            for x in (None, 8, 16):
                assert (
                    0 < by[method, metric, x]["low"] <= by[method, metric, x]["value"] <= by[method, metric, x]["high"]
                )
    same = [by[method, "similarity", None]["value"] for method in methods]
    assert same[:2] == pytest.approx([1, 1], abs=1e-5) and 0.98 < same[2] < 1 - 1e-6
    assert by["onnx fp32", "accuracy", None]["value"] == by["torch fp32", "accuracy", None]["value"]
    size = [by[method, "megabytes", None]["value"] for method in methods]
    assert size[0] == encoder.parameters * 4 / 1e6
    assert size[2] == (folder / FOLDER / "model_int8.onnx").stat().st_size / 1e6 < size[1]
    found = task_vectors(load_exported(folder, "onnx fp32"), task)[0]
    np.testing.assert_allclose(found, task_vectors(encoder, task)[0], atol=1e-5)
