"""Pruning a folder of files: the same as pruning in memory, and what it takes and refuses."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from pruning.pairs import HEADS, SHAPE, edit_weights, fill, native, same_model, same_tokenizer, write_full
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from kdlib.errors import UserError
from kdlib.models.encoder import Encoder
from kdlib.models.families import FAMILIES
from kdlib.models.mlm_head import load_head, new_head, prune_head
from kdlib.models.safetensors_files import HEAD_FILE
from kdlib.models.tokenizer_files import save_tokenizer, token_list
from kdlib.pruning.files import prune_files, renumbered
from kdlib.pruning.model import prune_model
from kdlib.pruning.selection import select_tokens
from kdlib.pruning.tokenizer import prune_tokenizer
from kdlib.pruning.tokenizer_json import prune_spec

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def full(tmp_path):
    tokenizer = tiny.tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(tmp_path / "full")
    save_tokenizer(tokenizer, tmp_path / "full")
    return tmp_path / "full"


def settings_of(folder):
    return json.loads((folder / "config.json").read_text("utf-8"))


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def test_neither_torch_nor_transformers_is_loaded(full, tmp_path):
    ids = tmp_path / "ids.npy"
    np.save(ids, range(50))
    code = f"""
import sys
import numpy as np
from kdlib.pruning.files import prune_files
prune_files({str(full)!r}, {str(tmp_path / "few")!r}, np.load({str(ids)!r}))
print(*sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
    assert settings_of(tmp_path / "few")["vocab_size"] == 50


@pytest.mark.parametrize("family", FAMILIES)
def test_special_ids_that_a_config_leaves_out_are_those_of_transformers(family):
    ids = {k: v for k, v in CONFIG_MAPPING[family]().to_dict().items() if k.endswith("_token_id") and v is not None}
    assert FAMILIES[family].special_ids == ids


def test_special_id_that_the_config_leaves_out_is_renumbered_too(full, tmp_path):
    file = full / "config.json"
    bare = settings_of(full) | {"model_type": "xlm-roberta"}
    file.write_text(json.dumps({k: v for k, v in bare.items() if not k.endswith("_token_id")}), "utf-8")
    prune_files(full, tmp_path / "few", range(1, 30))
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}  # XLM-R's are 1, 0 and 2
    places = {"max_position_embeddings": bare["max_position_embeddings"] - 1}
    assert settings_of(tmp_path / "few") == settings_of(full) | special | places | {"vocab_size": 29}
    with pytest.raises(UserError, match="padding token, 1, must be kept"):
        prune_files(full, tmp_path / "fewer", [0, *range(2, 30)])


def test_settings_that_say_nothing_of_the_vocabulary_stay(full, tmp_path):
    edit_json(full / "config.json", note="ours", id2label={"0": "a"})
    before = settings_of(full)
    prune_files(full, tmp_path / "few", range(40))
    assert settings_of(tmp_path / "few") == before | {"vocab_size": 40}


@pytest.mark.parametrize("kind, refused", [("bert", False), ("roberta", True)])
def test_padding_may_be_nothing_where_positions_are_not_counted_from_it(full, tmp_path, kind, refused):
    edit_json(full / "config.json", pad_token_id=None, model_type=kind)
    if refused:
        with pytest.raises(UserError, match="pad_token_id is None, must be a whole number"):
            prune_files(full, tmp_path / "few", range(40))
    else:
        prune_files(full, tmp_path / "few", range(40))
        assert settings_of(tmp_path / "few")["pad_token_id"] is None


def test_class_that_only_version_5_knows_gets_its_old_name(full, tmp_path):
    edit_json(full / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    prune_files(full, tmp_path / "few", range(40))
    saved = json.loads((tmp_path / "few" / "tokenizer_config.json").read_text("utf-8"))
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("changes", [{"pad_token_id": "0"}, {"max_position_embeddings": [5]}])
def test_config_with_a_number_that_is_none_is_refused(full, tmp_path, changes):
    edit_json(full / "config.json", **changes)
    with pytest.raises(UserError, match=f"no config of a model .{next(iter(changes))}"):
        prune_files(full, tmp_path / "few", range(40))
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"model_type": ["bert"]}', "{", "\xff"])
def test_config_that_is_none_is_refused(full, tmp_path, text):
    (full / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="no config of a model|a model of kind"):
        prune_files(full, tmp_path / "few", range(40))


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_token_that_is_named_but_not_kept_leaves_the_file_to_transformers(full, tmp_path, where, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "kdlib.models.tokenizer_files.full_tokenizer", lambda source: asked.append(source) or tiny.tokenizer()
    )
    tokenizer = AutoTokenizer.from_pretrained(full)
    (full / where).write_text(json.dumps({"sep_token": {"content": tokenizer.convert_ids_to_tokens(60)}}), "utf-8")
    prune_files(full, tmp_path / "few", range(61))
    assert not asked
    prune_files(full, tmp_path / "fewer", range(60))
    assert asked == [full]


def test_added_tokens_that_another_file_numbers_are_left_to_transformers(full, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "kdlib.models.tokenizer_files.full_tokenizer", lambda source: asked.append(source) or tiny.tokenizer()
    )
    (full / "added_tokens.json").write_text("{}")
    prune_files(full, tmp_path / "few", range(60))
    assert asked == [full]


def test_truncation_that_a_call_left_on_is_off(full, tmp_path):
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit_json(full / "tokenizer.json", truncation=truncation)
    prune_files(full, tmp_path / "few", range(60))
    spec = json.loads((tmp_path / "few" / "tokenizer.json").read_text("utf-8"))
    assert spec["truncation"] is None and spec["padding"] is None


def test_special_ids_of_a_config_follow_their_tokens():
    settings = {"vocab_size": 9, "pad_token_id": 4, "eos_token_id": 7, "sep_token_id": None, "hidden_size": 4}
    assert renumbered(settings, {1: 0, 4: 1}) == {"vocab_size": 2, "pad_token_id": 1, "eos_token_id": None}


def test_padding_that_was_left_on_follows_its_piece(full):
    spec = json.loads((full / "tokenizer.json").read_text("utf-8")) | {"padding": {"pad_id": 3}}
    assert prune_spec(spec, {i: i - 2 for i in range(2, 60)} | {0: 60, 1: 61})["padding"] == {"pad_id": 1}


# the same as in memory


@pytest.mark.parametrize("at_hand", [True, False], ids=["tokenizer at hand", "tokenizer from the folder"])
def test_files_are_pruned_as_the_model_is(at_hand, study, tmp_path, no_model):
    tokenizer = AutoTokenizer.from_pretrained(write_full(tmp_path / "full", study.model, study.tokenizer))
    before = {file.name: file.read_bytes() for file in (tmp_path / "full").iterdir()}
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids, tokenizer if at_hand else None)
    assert {file.name: file.read_bytes() for file in (tmp_path / "full").iterdir()} == before
    same_tokenizer(tmp_path / "few", prune_tokenizer(tokenizer, study.chosen.ids), tmp_path)


def test_pruned_files_load_as_the_pruned_model(study, tmp_path):
    write_full(tmp_path / "full", study.model, study.tokenizer)
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "few", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_model(found, study.pruned)
    small = AutoTokenizer.from_pretrained(tmp_path / "few")
    assert [small(text).input_ids for text in study.corpus] == [study.small(text).input_ids for text in study.corpus]


@pytest.mark.parametrize("prefixed", [True, False])
def test_encoder_loads_alike_with_and_without_the_prefix_of_its_kind(prefixed, study, tmp_path):
    model = study.model if prefixed else study.model.base_model
    write_full(tmp_path / "full", model, study.tokenizer)
    names = load_file(tmp_path / "full" / "model.safetensors")
    assert all(name.startswith(("bert.", "roberta.", "cls.", "lm_head.")) == prefixed for name in names)
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found = AutoModel.from_pretrained(tmp_path / "few", add_pooling_layer=False)
    same_model(found, study.pruned.base_model)


@pytest.mark.parametrize("kind", HEADS)
def test_files_of_other_models_and_heads_are_pruned_alike(kind, studies, tmp_path):
    study = studies("wordpiece")
    model = fill(HEADS[kind](len(study.tokenizer), study.tokenizer.pad_token_id))
    write_full(tmp_path / "full", model, study.tokenizer)
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found, report = type(model).from_pretrained(tmp_path / "few", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_model(found, prune_model(model, study.tokenizer, study.chosen.ids))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_tensor_by_vocabulary_is_known_by_its_name(kind):
    import transformers

    settings = dict(vocab_size=211, **SHAPE, max_position_embeddings=40, pad_token_id=1)
    if kind == "distilbert":
        settings |= dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    config = AutoConfig.for_model(kind, **settings)
    stem = type(config).__name__.removesuffix("Config")
    names = re.findall(rf"\b{stem}(?:Model|LMHeadModel|For\w+)\b", " ".join(dir(transformers)))
    assert len(names) >= 4
    for name in names:
        with torch.device("meta"):
            state = getattr(transformers, name)(config).state_dict()
        by_row = {key for key, value in state.items() if value.dim() and len(value) == 211}
        assert by_row and by_row == {key for key in state if FAMILIES[kind].has_rows(key)}, name


def test_shards_are_pruned_into_one_file(studies, tmp_path):
    study = studies("unigram shifted")
    write_full(tmp_path / "full", study.model, study.tokenizer, max_shard_size="40KB")
    assert len(list((tmp_path / "full").glob("model-*.safetensors"))) > 2
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    assert [file.name for file in (tmp_path / "few").glob("model*")] == ["model.safetensors"]
    same_model(AutoModelForMaskedLM.from_pretrained(tmp_path / "few"), study.pruned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_data_type_of_the_files_is_kept(dtype, studies, tmp_path):
    study = studies("bpe shifted")
    half = copy.deepcopy(study.model).to(dtype)
    write_full(tmp_path / "full", half, study.tokenizer)
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    assert {value.dtype for value in load_file(tmp_path / "few" / "model.safetensors").values()} == {dtype}
    found = AutoModelForMaskedLM.from_pretrained(tmp_path / "few")
    same_model(found, copy.deepcopy(study.pruned).to(dtype))


def test_tied_decoder_that_the_file_holds_too_is_cut(studies, tmp_path):
    study = studies("wordpiece")
    write_full(tmp_path / "full", study.model, study.tokenizer)
    table = "bert.embeddings.word_embeddings.weight"
    edit_weights(tmp_path / "full", lambda state: state | {"cls.predictions.decoder.weight": state[table]})
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found = load_file(tmp_path / "few" / "model.safetensors")
    assert torch.equal(found["cls.predictions.decoder.weight"], found[table])
    same_model(AutoModelForMaskedLM.from_pretrained(tmp_path / "few"), study.pruned)


def test_masked_language_head_beside_the_model_is_cut(studies, tmp_path):
    study = studies("wordpiece")
    encoder = Encoder(study.model.base_model, study.tokenizer, "full", head=new_head(study.model.base_model))
    encoder.head.bias.data.normal_()
    encoder.save(tmp_path / "full")
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found = load_head(tmp_path / "few" / HEAD_FILE, study.pruned.base_model)
    expected = prune_head(encoder.head, study.chosen.ids).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_native_tokenizer_of_a_folder_is_pruned_alike(kind, tokenizers, studies, tmp_path):
    study, tokenizer = studies(kind), native(kind, tokenizers(kind))
    chosen = select_tokens(tokenizer, study.corpus)
    write_full(tmp_path / "full", study.model, tokenizer)
    prune_files(tmp_path / "full", tmp_path / "few", chosen.ids)
    same_tokenizer(
        tmp_path / "few", prune_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "full"), chosen.ids), tmp_path
    )
    again = AutoTokenizer.from_pretrained(tmp_path / "few")
    assert type(again) is type(tokenizer)
    for text in study.corpus:
        assert [chosen.ids[i] for i in again(text).input_ids] == tokenizer(text).input_ids


@pytest.mark.parametrize("own_class", [False, True])
def test_full_tokenizer_is_not_built_where_the_file_says_all(own_class, study, tmp_path, monkeypatch):
    tokenizer = native(study.kind.split()[0], study.tokenizer) if own_class else study.tokenizer
    write_full(tmp_path / "full", study.model, tokenizer)
    monkeypatch.setattr("kdlib.pruning.tokenizer.prune_tokenizer", None)
    prune_files(tmp_path / "full", tmp_path / "few", select_tokens(tokenizer, study.corpus).ids)


def test_folder_with_a_word_list_for_tokenizer_is_pruned(studies, tmp_path):
    study = studies("wordpiece")
    write_full(tmp_path / "full", study.model, native("wordpiece", study.tokenizer))
    tokens = token_list(AutoTokenizer.from_pretrained(tmp_path / "full"))
    (tmp_path / "full" / "tokenizer.json").unlink()
    (tmp_path / "full" / "vocab.txt").write_text("\n".join(tokens), "utf-8")
    full = AutoTokenizer.from_pretrained(tmp_path / "full")
    chosen = select_tokens(full, study.corpus)
    prune_files(tmp_path / "full", tmp_path / "few", chosen.ids)
    again = AutoTokenizer.from_pretrained(tmp_path / "few")
    for text in study.corpus:
        assert [chosen.ids[i] for i in again(text).input_ids] == full(text).input_ids


def test_token_that_only_the_tokenizer_config_names_is_kept(studies, tmp_path):
    study = studies("unigram")
    write_full(tmp_path / "full", study.model, study.tokenizer)
    file = tmp_path / "full" / "tokenizer.json"
    spec = json.loads(file.read_bytes())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<mask>"]
    file.write_text(json.dumps(spec), "utf-8")
    full = AutoTokenizer.from_pretrained(tmp_path / "full")
    assert full.mask_token_id == study.tokenizer.mask_token_id
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    again = AutoTokenizer.from_pretrained(tmp_path / "few")
    assert again.get_vocab() == study.small.get_vocab() and again.mask_token_id == study.small.mask_token_id


def test_token_that_is_not_kept_does_not_come_back(studies, tmp_path):
    study = studies("unigram")
    full = copy.deepcopy(study.tokenizer)
    full.add_tokens(["panimula"])
    write_full(tmp_path / "full", study.model, full)
    file = tmp_path / "full" / "tokenizer_config.json"
    added = {str(i): json.loads(json.dumps(t.__getstate__())) for i, t in full.added_tokens_decoder.items()}
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"added_tokens_decoder": added}))  # as version 4 has it
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    assert AutoTokenizer.from_pretrained(tmp_path / "few").get_vocab() == study.small.get_vocab()


def test_what_cannot_be_pruned_is_refused_and_leaves_nothing(studies, tmp_path):
    study = studies("wordpiece")
    full, few, ids = tmp_path / "full", tmp_path / "few", study.chosen.ids
    with pytest.raises(UserError, match="model.safetensors"):
        prune_files(full, few, ids)
    write_full(full, study.model, study.tokenizer)
    with pytest.raises(UserError, match="are the same folder"):
        prune_files(full, tmp_path / "x" / ".." / "full", ids)
    with pytest.raises(UserError, match="embedding rows"):
        prune_files(full, few, [*ids, 10**6])
    with pytest.raises(UserError, match="'albert'"):
        albert = AlbertModel(AlbertConfig(vocab_size=90, embedding_size=8, **SHAPE))
        prune_files(write_full(tmp_path / "albert", albert, study.tokenizer), few, ids)
    (full / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer"):
        prune_files(full, few, ids)
    edit_weights(full, lambda state: {name: value for name, value in state.items() if "word_emb" not in name})
    with pytest.raises(UserError, match="word_embeddings.weight"):
        prune_files(full, few, ids)
    (full / "config.json").unlink()
    with pytest.raises(UserError, match="no config"):
        prune_files(full, few, ids)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["albert", "full"]
