"""Teachers from local folders of every supported kind, and what is refused."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)  # fmt: skip

from kdlib import config
from kdlib.errors import UserError
from kdlib.models.encoder import text_vectors
from kdlib.models.loading import load_encoder, load_teacher

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


@pytest.mark.slow
def test_embedded_teacher_has_its_prefix_unless_told_otherwise():
    teacher = load_teacher(config.Teacher())
    assert teacher.prefix == "query: " and teacher.head is None
    assert load_teacher(config.Teacher(prefix="")).prefix == ""


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "owner/model-that-is-not-cached"])
def test_missing_source_is_one_line_that_says_how_to_go_on(source):
    with pytest.raises(UserError) as error:
        load_teacher(config.Teacher(source=source))
    assert source in str(error.value) and "\n" not in str(error.value)


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="gpt2"):
        load_teacher(save(tmp_path, GPT2Model(GPT2Config(vocab_size=80, n_embd=16, n_layer=1, n_head=2))))


@pytest.mark.parametrize("masked", [False, True])
def test_a_config_that_goes_with_other_weights_is_told_which(tmp_path, monkeypatch, masked):
    size = len(tiny.tokenizer())
    spec = save(tmp_path / "m", (BertForMaskedLM if masked else BertModel)(BertConfig(vocab_size=size, **SMALL)))
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 10**12}))
    monkeypatch.setattr(AutoModel, "from_pretrained", None)  # would make room for so many
    weight = "bert." * masked + "embeddings.position_embeddings.weight"
    told = f"size mismatch, weight {weight} is 40 x 16, by config.json 1000000000000 x 16"
    with pytest.raises(UserError, match=told):
        load_teacher(spec)


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


ROWS = len(tiny.tokenizer())
DISTIL = dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40)
MASKED = {
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=ROWS, **SMALL)),
    "bert, relu": lambda: BertForMaskedLM(BertConfig(vocab_size=ROWS, hidden_act="relu", **SMALL)),
    "bert, with next sentence": lambda: BertForPreTraining(BertConfig(vocab_size=ROWS, **SMALL)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(vocab_size=ROWS, layer_norm_eps=1e-5, **SMALL)),
    "xlm-roberta": lambda: XLMRobertaForMaskedLM(XLMRobertaConfig(vocab_size=ROWS, **SMALL)),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(vocab_size=ROWS, **DISTIL)),
    "deberta-v2": lambda: DebertaV2ForMaskedLM(
        DebertaV2Config(vocab_size=ROWS, pos_att_type=["p2c", "c2p"], relative_attention=True, **SMALL)
    ),
    "deberta-v2, its own head": lambda: DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=ROWS, legacy=False, **SMALL)),
}


def trained(model):
    """Weights far from any start."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def logits(encoder, ids):
    with torch.no_grad():
        return encoder.head(encoder.model(ids).last_hidden_state, encoder.model.get_input_embeddings().weight)


def assert_same_head(folder, encoder):
    reference = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = torch.randint(5, ROWS, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(reference(ids).logits, logits(encoder, ids), atol=1e-5)


@pytest.mark.parametrize("family", MASKED)
def test_the_head_is_that_of_the_masked_model(tmp_path, family):
    save(tmp_path, trained(MASKED[family]()))
    encoder = load_encoder(tmp_path, "m")
    assert_same_head(tmp_path, encoder)
    plain = AutoModel.from_pretrained(tmp_path).state_dict()
    for name, value in encoder.model.state_dict().items():
        assert "pooler" in name or torch.equal(value, plain[name])  # a missing pooler is random in both
    encoder.save(tmp_path / "again")
    assert_same_head(tmp_path, load_encoder(tmp_path / "again", "again"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_has_no_head(tmp_path, family):
    save(tmp_path, trained(FAMILIES[family](ROWS)))
    assert load_encoder(tmp_path, "m").head is None
    load_encoder(tmp_path, "m").save(tmp_path / "again")
    assert not (tmp_path / "again" / "mlm_head.safetensors").exists()


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, folder / "model.safetensors")


def rename(old, new):
    def change(weights):
        for name in [name for name in weights if old in name]:
            weights[name.replace(old, new)] = weights.pop(name)

    return change


def test_old_names_and_sharded_checkpoints(tmp_path):
    model = trained(MASKED["bert"]())
    save(tmp_path / "old", model)
    change_weights(tmp_path / "old", rename("LayerNorm.weight", "LayerNorm.gamma"))
    change_weights(tmp_path / "old", rename("LayerNorm.bias", "LayerNorm.beta"))
    change_weights(tmp_path / "old", rename("predictions.bias", "predictions.decoder.bias"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    tiny.tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    for folder in ("old", "shards"):
        assert_same_head(tmp_path / folder, load_encoder(tmp_path / folder, "m"))


def test_a_head_in_pickled_weights(tmp_path):
    model = trained(MASKED["bert"]())
    spec = save(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # the output matrix is in there too
    encoder = load_teacher(spec.model_copy(update={"allow_pickle": True}))
    assert_same_head(tmp_path, encoder)


def drop(part):
    return lambda weights: weights.pop(next(name for name in weights if part in name))


def output_of_its_own(weights):
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"] + 1


@pytest.mark.parametrize(
    "change",
    [
        drop("predictions.bias"),
        drop("transform.dense.weight"),
        drop("transform.LayerNorm"),
        output_of_its_own,
        lambda weights: weights.update({"cls.predictions.bias": torch.zeros(ROWS - 1)}),
    ],
)
def test_part_of_a_head_or_an_untied_one_is_none(tmp_path, change):
    save(tmp_path, trained(MASKED["bert"]()))
    change_weights(tmp_path, change)
    assert load_encoder(tmp_path, "m").head is None


def test_checkpoints_trained_otherwise_have_no_head(tmp_path):
    untied = BertForMaskedLM(BertConfig(vocab_size=ROWS, tie_word_embeddings=False, **SMALL))
    save(tmp_path / "untied", trained(untied))
    assert load_encoder(tmp_path / "untied", "m").head is None
    save(tmp_path / "classifier", trained(BertForSequenceClassification(BertConfig(vocab_size=ROWS, **SMALL))))
    assert load_encoder(tmp_path / "classifier", "m").head is None


def test_a_discriminator_has_no_head(tmp_path):
    """DeBERTa-v3's checkpoints hold weights named lm_predictions beside the discriminator's mask_predictions; a masked
    model of their config (legacy) would be given a random head instead."""
    model = trained(MASKED["deberta-v2, its own head"]())
    model.config.legacy = True
    save(tmp_path, model)
    change_weights(tmp_path, lambda weights: weights.update({"mask_predictions.dense.weight": torch.ones(16, 16)}))
    assert load_encoder(tmp_path, "m").head is None
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert any(name.startswith("cls.predictions") for name in info["missing_keys"])


def test_a_folders_own_head_must_fit_its_model(tmp_path):
    save(tmp_path / "a", trained(MASKED["bert"]()))
    load_encoder(tmp_path / "a", "m").save(tmp_path / "b")
    change = load_file(tmp_path / "b" / "mlm_head.safetensors") | {"bias": torch.zeros(3)}
    save_file(change, tmp_path / "b" / "mlm_head.safetensors", {"head": '{"eps": 1e-12, "activation": "gelu"}'})
    with pytest.raises(UserError, match="mlm_head.safetensors.*model needs"):
        load_encoder(tmp_path / "b", "m")


def test_a_pooler_that_the_checkpoint_lacks_is_the_same_at_every_load(tmp_path):
    encoder = tiny.encoder()
    BertModel(encoder.model.config, add_pooling_layer=False).save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    first, second = (load_encoder(tmp_path).model.state_dict() for _ in range(2))
    assert "pooler.dense.weight" in first and all(torch.equal(first[name], second[name]) for name in first)
