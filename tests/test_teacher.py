"""Teachers from local folders of every supported kind, and what is refused."""

import pytest
import tiny
import torch
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)  # fmt: skip

from kdlib import config
from kdlib.encoder import text_vectors
from kdlib.errors import UserError
from kdlib.teacher import load_teacher

SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=40
)
FAMILIES = {
    "bert": lambda v: BertModel(BertConfig(vocab_size=v, **SMALL)),
    "xlm-roberta": lambda v: XLMRobertaModel(XLMRobertaConfig(vocab_size=v, **SMALL)),
    "distilbert": lambda v: DistilBertModel(
        DistilBertConfig(vocab_size=v, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40)
    ),
    "deberta-v2": lambda v: DebertaV2Model(
        DebertaV2Config(vocab_size=v, pos_att_type=["p2c", "c2p"], relative_attention=True, **SMALL)
    ),
}  # fmt: skip


def save(folder, model):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return config.Teacher(source=str(folder), max_length=128)


@pytest.mark.parametrize("family", FAMILIES)
def test_local_folder_of_every_family(tmp_path, family):
    teacher = load_teacher(save(tmp_path / "m", FAMILIES[family](len(tiny.tokenizer()))))
    assert teacher.layers == 2 and not teacher.model.training and teacher.prefix == ""
    assert text_vectors(teacher, ["ang aso", "ang pusa ay natulog"]).shape == (2, 1, 16)
    assert teacher.max_length <= 40
    long = " ".join(["aso"] * 100)
    assert text_vectors(teacher, [long]).shape == (1, 1, 16)


def test_embedded_teacher_has_its_prefix_unless_told_otherwise():
    assert load_teacher(config.Teacher()).prefix == "query: "
    assert load_teacher(config.Teacher(prefix="")).prefix == ""


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "owner/model-that-is-not-cached"])
def test_missing_source_is_one_line_that_says_how_to_go_on(source):
    with pytest.raises(UserError) as error:
        load_teacher(config.Teacher(source=source))
    assert source in str(error.value) and "\n" not in str(error.value)


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="gpt2"):
        load_teacher(save(tmp_path, GPT2Model(GPT2Config(vocab_size=80, n_embd=16, n_layer=1, n_head=2))))


def test_pickled_weights_need_to_be_allowed_by_name(tmp_path):
    model = FAMILIES["bert"](len(tiny.tokenizer()))
    spec = save(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_teacher(spec)
    assert load_teacher(spec.model_copy(update={"allow_pickle": True})).layers == 2


def test_rubbish_in_place_of_a_model_is_refused(tmp_path):
    spec = save(tmp_path, FAMILIES["bert"](len(tiny.tokenizer())))
    (tmp_path / "model.safetensors").write_bytes(b"\0rubbish" * 100)
    with pytest.raises(UserError):
        load_teacher(spec)
