"""A pruned tokenizer: the same tokens, renumbered, and no more unknown tokens."""

import json
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning.pairs import ACCENTED, KINDS, native, unknowns
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from kdlib.models.tokenizer_files import token_list
from kdlib.pruning.selection import script_of, select_tokens
from kdlib.pruning.tokenizer import prune_tokenizer


@pytest.mark.slow
def test_pruning_removes_rows(study):
    assert len(study.chosen.ids) < 0.8 * len(study.tokenizer)
    assert study.chosen.dropped == 0


def test_pruned_ids_are_the_full_ids_renumbered(study):
    for text in [*study.corpus, "query: " + study.corpus[0], "magandang", "Batangas", ""]:
        assert study.ids[study.small(text).input_ids].tolist() == study.tokenizer(text).input_ids


def test_pairs_are_renumbered_too(study):
    for first, second in zip(study.corpus, study.corpus[1:]):
        full = study.tokenizer(first, second, return_token_type_ids=True)
        small = study.small(first, second, return_token_type_ids=True)
        assert study.ids[small.input_ids].tolist() == full.input_ids
        assert small.token_type_ids == full.token_type_ids


def test_ids_stay_below_the_vocabulary_size(study):
    rows = study.pruned.config.vocab_size
    assert rows == len(study.chosen.ids) == len(study.small) == study.pruned.get_input_embeddings().num_embeddings
    assert max(study.small.get_vocab().values()) == rows - 1
    assert sorted(study.small.get_vocab().values()) == list(range(rows))


def test_pieces_keep_their_names(study):
    full, small = token_list(study.tokenizer), token_list(study.small)
    assert small == [full[i] for i in study.chosen.ids]


def test_special_tokens_are_all_there(study):
    assert study.small.special_tokens_map == study.tokenizer.special_tokens_map
    for name in study.tokenizer.special_tokens_map:
        assert study.ids[getattr(study.small, f"{name}_id")] == getattr(study.tokenizer, f"{name}_id")


def test_mask_token_is_found_in_text(study):
    masked = f"Ang {study.small.mask_token} ay kumain."
    ids = study.small(masked).input_ids
    assert ids.count(study.small.mask_token_id) == 1
    assert study.ids[ids].tolist() == study.tokenizer(masked).input_ids


def test_casing_and_accents_survive_saving(study):
    again = AutoTokenizer.from_pretrained(study.folder)
    assert again("Peña").input_ids != again("peña").input_ids != again("pena").input_ids
    for text in [*study.corpus, "Peña  PEÑA pen\u0303a"]:
        assert again(text).input_ids == study.small(text).input_ids
    for text in ACCENTED[:1]:
        assert again.decode(again(text).input_ids, skip_special_tokens=True).replace(" .", ".") == text


def test_normaliser_and_the_rest_of_the_file_stay_as_they_were(study):
    full = json.loads(study.tokenizer.backend_tokenizer.to_str())
    small = json.loads((study.folder / "tokenizer.json").read_text("utf-8"))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert small[part] == full[part]
    assert [t["content"] for t in small["added_tokens"]] == [t["content"] for t in full["added_tokens"]]


def post_processor_ids(node):
    """(token, id) of every special token that a post-processor names."""
    if node["type"] == "TemplateProcessing":
        return [pair for token in node["special_tokens"].values() for pair in zip(token["tokens"], token["ids"])]
    return [tuple(node["sep"]), tuple(node["cls"])]


def test_saved_file_reads_right_for_transformers_4(study):
    spec = json.loads((study.folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = spec["model"]["vocab"]
    ids = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    for token in spec["added_tokens"]:
        assert ids.setdefault(token["content"], token["id"]) == token["id"]
    assert sorted(ids.values()) == list(range(len(study.chosen.ids)))
    named = post_processor_ids(spec["post_processor"])
    assert named and all(ids[token] == i for token, i in named)
    if spec["model"]["type"] == "Unigram":
        assert spec["model"]["vocab"][spec["model"]["unk_id"]][0] == study.tokenizer.unk_token
    raw = Tokenizer.from_file(str(study.folder / "tokenizer.json"))
    assert raw.encode(study.corpus[0]).ids == study.small(study.corpus[0]).input_ids


def test_padding_left_on_by_an_earlier_call_is_renumbered(studies):
    study = studies("bpe shifted")
    study.tokenizer(study.corpus[:2], padding=True)
    small = prune_tokenizer(study.tokenizer, study.chosen.ids)
    assert json.loads(small.backend_tokenizer.to_str())["padding"]["pad_id"] == study.small.pad_token_id


def test_pruning_leaves_the_full_ones_alone(study):
    assert len(study.tokenizer) > len(study.small)
    assert study.model.config.vocab_size == study.model.get_input_embeddings().num_embeddings > len(study.tokenizer)
    before = study.tokenizer.backend_tokenizer.to_str()
    prune_tokenizer(study.tokenizer, study.chosen.ids)
    assert study.tokenizer.backend_tokenizer.to_str() == before


def test_pruning_twice_changes_nothing_more(study):
    again = select_tokens(study.small, study.corpus, words=["magandang", "Batangas"], extra=["query: "])
    assert again.ids == list(range(len(study.small)))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_native_tokenizer_class_survives_pruning_and_saving(kind, tokenizers, studies, corpus, tmp_path):
    tokenizer = native(kind, tokenizers(kind))
    chosen = select_tokens(tokenizer, corpus)
    small = prune_tokenizer(tokenizer, chosen.ids)
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer) and len(again) == len(chosen.ids) < len(tokenizer)
    for text in [*corpus, f"Ang {tokenizer.mask_token} ay kumain."]:
        ids = again(text).input_ids
        assert ids == small(text).input_ids
        assert [chosen.ids[i] for i in ids] == tokenizer(text).input_ids


def test_unseen_words_meet_no_more_unknowns(study, training):
    draw, seen = random.Random(0), {char for text in training for char in text}
    alphabet = sorted(char for char in seen if script_of(char) <= {"Latn"} and not char.isspace())
    assert {"ñ", "ó", "2", "A", "z", "%", "😀"} <= set(alphabet) and "Д" not in alphabet
    for _ in range(200):
        words = ["".join(draw.choices(alphabet, k=draw.randint(1, 12))) for _ in range(draw.randint(1, 6))]
        text = " ".join(words)
        assert unknowns(study.small, text) <= unknowns(study.tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_any_latin_text_meets_no_more_unknowns(kind, studies):
    study = studies(kind)
    latin = [chr(i) for i in range(0x250) if script_of(unicodedata.normalize("NFKC", chr(i))) <= {"Latn"}]

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.text(st.sampled_from(latin), max_size=30))
    def check(text):
        assert unknowns(study.small, text) <= unknowns(study.tokenizer, text)

    check()


def test_held_out_sentences_meet_no_more_unknowns(study, parallel):
    for row in parallel[200:260]:
        for code in ("tgl", "eng", "spa"):
            assert unknowns(study.small, row[code]) <= unknowns(study.tokenizer, row[code])


def test_held_out_sentences_decode_to_themselves(study, parallel):
    for row in parallel[200:230]:
        if not unknowns(study.tokenizer, row["tgl"]):
            ids = study.small(row["tgl"]).input_ids
            full = study.tokenizer(row["tgl"]).input_ids
            decoded = study.small.decode(ids, skip_special_tokens=True)
            assert decoded == study.tokenizer.decode(full, skip_special_tokens=True)
