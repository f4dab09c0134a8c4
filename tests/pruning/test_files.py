"""What pruning as files takes and gives: that it gives what pruning in memory gives is in test_vocabulary."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
from transformers import CONFIG_MAPPING, AutoTokenizer, BertConfig, BertModel

from kdlib.errors import UserError
from kdlib.models.families import FAMILIES
from kdlib.models.tokenizer_files import save_tokenizer
from kdlib.pruning.files import prune_files, renumbered
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


def edit(file, **changes):
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
    with pytest.raises(UserError, match="padding piece, 1, must be kept"):
        prune_files(full, tmp_path / "fewer", [0, *range(2, 30)])


def test_settings_that_say_nothing_of_the_vocabulary_stay(full, tmp_path):
    edit(full / "config.json", note="ours", id2label={"0": "a"})
    before = settings_of(full)
    prune_files(full, tmp_path / "few", range(40))
    assert settings_of(tmp_path / "few") == before | {"vocab_size": 40}


@pytest.mark.parametrize("kind, refused", [("bert", False), ("roberta", True)])
def test_padding_may_be_nothing_where_positions_are_not_counted_from_it(full, tmp_path, kind, refused):
    edit(full / "config.json", pad_token_id=None, model_type=kind)
    if refused:
        with pytest.raises(UserError, match="pad_token_id is None, must be a whole number"):
            prune_files(full, tmp_path / "few", range(40))
    else:
        prune_files(full, tmp_path / "few", range(40))
        assert settings_of(tmp_path / "few")["pad_token_id"] is None


def test_class_that_only_version_5_knows_gets_its_old_name(full, tmp_path):
    edit(full / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    prune_files(full, tmp_path / "few", range(40))
    saved = json.loads((tmp_path / "few" / "tokenizer_config.json").read_text("utf-8"))
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("changes", [{"pad_token_id": "0"}, {"max_position_embeddings": [5]}])
def test_config_with_a_number_that_is_none_is_refused(full, tmp_path, changes):
    edit(full / "config.json", **changes)
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
    edit(full / "tokenizer.json", truncation=truncation)
    prune_files(full, tmp_path / "few", range(60))
    spec = json.loads((tmp_path / "few" / "tokenizer.json").read_text("utf-8"))
    assert spec["truncation"] is None and spec["padding"] is None


def test_special_ids_of_a_config_follow_their_pieces():
    settings = {"vocab_size": 9, "pad_token_id": 4, "eos_token_id": 7, "sep_token_id": None, "hidden_size": 4}
    assert renumbered(settings, {1: 0, 4: 1}) == {"vocab_size": 2, "pad_token_id": 1, "eos_token_id": None}


def test_padding_that_was_left_on_follows_its_piece(full):
    spec = json.loads((full / "tokenizer.json").read_text("utf-8")) | {"padding": {"pad_id": 3}}
    assert prune_spec(spec, {i: i - 2 for i in range(2, 60)} | {0: 60, 1: 61})["padding"] == {"pad_id": 1}
