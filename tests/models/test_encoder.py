"""Vectors of an encoder: equal to the plainest way to get them, in order, from the right tokens."""

import json

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel, RobertaTokenizer

from kdlib.batching import model_inputs, pad
from kdlib.models import encoder as module
from kdlib.models.encoder import Encoder, first_tokens, text_vectors, word_vectors
from kdlib.models.families import positions
from kdlib.models.sentence import mean_pool

TEXTS = [*tiny.texts(12), "", "ang", "ñ", "ang aso " * 40, "kumain"]
WORDS = [text.split() for text in TEXTS]


@pytest.fixture(params=["", "si ", "bata: "])
def encoder(request):
    return tiny.encoder(layers=2, prefix=request.param)


@torch.inference_mode()
def states_of(encoder, ids):
    """Hidden states of one text alone, without padding: [layers + 1, tokens, hidden]."""
    output = encoder.model(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), output_hidden_states=True
    )
    return torch.stack(output.hidden_states)[:, 0]


def reference(encoder, *text):
    first, *second = text
    ids = encoder.tokenizer(encoder.prefix + first, *second, truncation=True, max_length=encoder.max_length).input_ids
    return states_of(encoder, ids).mean(1).numpy()


def test_text_vectors_equal_one_text_at_a_time(encoder, monkeypatch):
    monkeypatch.setattr(module, "tokens_per_batch", lambda: 64)  # several batches of several texts
    found = text_vectors(encoder, TEXTS, [0, 1, 2])
    assert found.shape == (len(TEXTS), 3, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack([reference(encoder, text) for text in TEXTS]), atol=1e-5)


def test_last_layer_is_the_default_and_layers_keep_their_order(encoder):
    both = text_vectors(encoder, TEXTS, [2, 0])
    np.testing.assert_allclose(text_vectors(encoder, TEXTS)[:, 0], both[:, 0], atol=1e-6)
    np.testing.assert_allclose(text_vectors(encoder, TEXTS, [0])[:, 0], both[:, 1], atol=1e-6)


def test_order_of_texts_does_not_matter(encoder):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = text_vectors(encoder, [TEXTS[i] for i in order])
    np.testing.assert_allclose(shuffled, text_vectors(encoder, TEXTS)[order], atol=1e-5)


def test_pairs_are_encoded_together(encoder):
    pairs = list(zip(TEXTS[:6], TEXTS[6:12]))
    found = text_vectors(encoder, pairs)[:, 0]
    np.testing.assert_allclose(found, np.stack([reference(encoder, *pair)[-1] for pair in pairs]), atol=1e-5)


def test_word_vectors_are_the_states_of_first_tokens(encoder):
    vectors, places = word_vectors(encoder, WORDS, [1, 2])
    assert vectors.shape == (len(places), 2, 32) and vectors.dtype == np.float32 and places.dtype.kind == "i"

    def encode(words):
        return encoder.tokenizer(words, add_special_tokens=False, is_split_into_words=True).input_ids

    prefix = encoder.prefix.split()
    ids = [[*[2, *encode(prefix + words)][: encoder.max_length - 1], 3] if prefix + words else [] for words in WORDS]
    states = [states_of(encoder, row)[1:].numpy() if row else None for row in ids]
    for (text, word), vector in zip(places, vectors):
        before = prefix + WORDS[text][:word]
        at = 1 + (len(encode(before)) if before else 0)
        assert ids[text][at] == encode(WORDS[text][word : word + 1])[0]
        np.testing.assert_allclose(vector, states[text][:, at], atol=1e-5)


def test_places_count_words_without_the_prefix_in_order(encoder):
    _, places = word_vectors(encoder, WORDS)
    assert places.tolist() == sorted(places.tolist())
    for text, words in enumerate(WORDS):
        found = [w for t, w in places if t == text]
        assert found == list(range(len(found)))
        assert len(found) == len(words) or len(words) > 30


def test_truncation_drops_the_last_words(encoder):
    room = encoder.max_length - 2 - len(encoder.tokenizer(encoder.prefix, add_special_tokens=False).input_ids)
    _, places = word_vectors(encoder, [["ang"] * 100])
    assert places.tolist() == [[0, w] for w in range(room)]
    assert len(encoder.tokenize(["ang " * 100])[0].ids) == encoder.max_length


def test_word_that_begins_before_the_cut_is_kept():
    short = tiny.encoder(layers=1)
    short.max_length = 5
    _, places = word_vectors(short, [["aso", "xyz", "pusa"]])  # xyz is three tokens, of which two fit
    assert places.tolist() == [[0, 0], [0, 1]]


def test_words_without_tokens_are_left_out():
    vectors, places = word_vectors(tiny.encoder(layers=1), [["", "aso"], [], ["\u200b", "pusa"]])
    assert [0, 1] in places.tolist() and [2, 1] in places.tolist() and [0, 0] not in places.tolist()
    assert len(vectors) == len(places)


def test_nothing_to_encode_gives_nothing(encoder):
    assert text_vectors(encoder, [], [0, 1]).shape == (0, 2, 32)
    for texts in ([], [[]]):
        vectors, places = word_vectors(encoder, texts)
        assert vectors.shape == (0, 1, 32) and places.shape == (0, 2) and places.dtype.kind == "i"


def test_texts_may_be_any_sequence(encoder):
    expected = text_vectors(encoder, TEXTS[:3])
    np.testing.assert_array_equal(text_vectors(encoder, tuple(TEXTS[:3])), expected)
    np.testing.assert_array_equal(text_vectors(encoder, np.array(TEXTS[:3])), expected)


def with_token_types(layers=2):
    """A BERT whose tokenizer marks the second text of a pair, as BERT's own does."""
    encoder = tiny.encoder(layers)
    encoder.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    encoder.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return encoder


def test_token_types_tell_the_texts_of_a_pair_apart():
    plain, typed = tiny.encoder(layers=2), with_token_types()
    assert typed.token_types and not plain.token_types
    pairs = list(zip(TEXTS[:6], TEXTS[6:12]))
    features = typed.tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
    assert features["token_type_ids"].max() == 1
    with torch.inference_mode():
        expected = mean_pool(typed.model(**features).last_hidden_state, features["attention_mask"])
    found = text_vectors(typed, pairs)[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - text_vectors(plain, pairs)[:, 0]).max() > 0.01
    np.testing.assert_array_equal(text_vectors(typed, TEXTS), text_vectors(plain, TEXTS))
    np.testing.assert_array_equal(word_vectors(typed, WORDS)[0], word_vectors(plain, WORDS)[0])


def test_models_that_know_no_token_types_get_none():
    tokenizer = with_token_types().tokenizer
    sizes = dict(vocab_size=len(tokenizer), pad_token_id=0)
    distilbert = DistilBertModel(DistilBertConfig(dim=32, hidden_dim=64, n_layers=1, n_heads=4, **sizes)).eval()
    roberta = byte_level().model  # rows for one type only
    for model in (distilbert, roberta):
        encoder = Encoder(model, tokenizer, "one", max_length=32)
        assert not encoder.token_types and text_vectors(encoder, [("ang aso", "kumain")]).shape == (1, 1, 32)


def test_model_inputs():
    inputs = model_inputs([[5, 6, 7], [8]], [[0, 1, 1], [0]], 9)
    assert {name: value.tolist() for name, value in inputs.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [0, 0, 0]],
    }
    assert list(model_inputs([[5]], None, 9)) == ["input_ids", "attention_mask"]


def byte_level(splits_digits=False):
    """A RoBERTa with a byte-level BPE, in which a word is known by the space before it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [f" {text}" for text in tiny.texts(300)],
        trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    spec = json.loads(backend.to_str())["model"]
    tokenizer = RobertaTokenizer(vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]])
    if splits_digits:
        parts = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=66, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    return Encoder(RobertaModel(config).eval(), tokenizer, "tiny RoBERTa", max_length=32)


@pytest.mark.parametrize("splits_digits", [False, True])
def test_byte_level_bpe_knows_words_in_lists_by_a_space(splits_digits):
    encoder = byte_level(splits_digits)
    words = ["ang", "aso", "ay", "kumain"]
    listed = encoder.tokenize([words])[0]
    assert listed.ids == encoder.tokenize([" " + " ".join(words)])[0].ids
    assert listed.tokens[1:-1] == ["Ġang", "Ġaso", "Ġay", "Ġkumain"]
    assert listed.word_ids == [None, 0, 1, 2, 3, None]
    assert encoder.tokenize(["ang aso"])[0].tokens[1] != "Ġang"  # and texts are as they were before
    vectors, places = word_vectors(encoder, [words])
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]] and np.isfinite(vectors).all()


def test_positions_are_as_many_as_the_model_takes():
    for encoder, limit in ((tiny.encoder(layers=1), 64), (byte_level(), 64)):
        assert positions(encoder.model.config) == limit
        encoder.max_length = limit
        assert np.isfinite(text_vectors(encoder, ["ang " * 100])).all()
        encoder.max_length = limit + 1
        with pytest.raises((IndexError, RuntimeError)):
            text_vectors(encoder, ["ang " * 100])


def test_padding():
    ids, mask = pad([[5, 6, 7], [8], []], 1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1], [1, 1, 1]] and mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_pooling_never_counts_padding():
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[7.0], [100.0], [100.0]], [[9.0], [9.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert mean_pool(states, mask).tolist() == [[2.0], [7.0], [0.0]]


def test_first_tokens():
    assert first_tokens([None, 0, 0, 1, 2, 2, None], 0) == [(0, 1), (1, 3), (2, 4)]
    assert first_tokens([None, 0, 0, 1, 2, 2, None], 1) == [(0, 3), (1, 4)]
    assert first_tokens([None, None], 0) == []


def test_size(encoder):
    assert (encoder.layers, encoder.hidden) == (2, 32)
    assert encoder.parameters == sum(t.numel() for t in encoder.model.state_dict().values() if t.is_floating_point())


def test_saved_folder_loads_without_the_library(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    from kdlib.models.encoder import Encoder

    saved = tiny.encoder(layers=2)
    saved.save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    again = Encoder(model, tokenizer, "again", max_length=32)
    np.testing.assert_allclose(text_vectors(again, TEXTS), text_vectors(saved, TEXTS), atol=1e-6)


def test_sizes_and_speeds_have_a_row_a_measure():
    from kdlib.evaluation.speed import size_rows, speed_rows

    one = tiny.encoder(layers=1)
    sizes = {row["metric"]: row["value"] for row in size_rows(one, "one")}
    assert sizes["parameters"] == one.parameters and sizes["megabytes"] == one.parameters * 4 / 1e6
    rows = speed_rows({"one": one, "two": one}, tiny.texts(20), runs=3, batch=4)
    assert [(row["metric"], row["model"]) for row in rows] == [
        (metric, name) for metric in ("latency_ms", "sentences_per_second") for name in ("one", "two")
    ]
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in rows)
