"""Pseudo-perplexity and cloze accuracy against slow loops over one token at a time."""

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdlib.errors import UserError
from kdlib.evaluation import cloze as module
from kdlib.evaluation.cloze import guess, mlm_rows
from kdlib.models.mlm_head import new_head

TEXTS = [*tiny.texts(8), "ang xyz, aso.", "", "\u4e00", "bata-bata pusa"]


@pytest.fixture(params=["", "bata: "])
def encoder(request):
    encoder = tiny.encoder(layers=2, prefix=request.param)
    torch.manual_seed(3)
    encoder.head = new_head(encoder.model)
    for parameter in encoder.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def measured(encoder, texts):
    """The rows of `mlm_rows` by metric."""
    return {row["metric"]: row for row in mlm_rows(encoder, texts, "teacher")}


@torch.no_grad()
def slow(encoder):
    """(text, token, loss, rank) of every token that is neither special nor in the prefix, one at a time."""
    tokenizer, out = encoder.tokenizer, []
    start = len(tokenizer(encoder.prefix).input_ids) - 1 if encoder.prefix else 1
    for t, text in enumerate(TEXTS):
        ids = tokenizer(encoder.prefix + text, return_tensors="pt").input_ids
        for at in range(start, ids.shape[1] - 1):
            target = int(ids[0, at])
            if target == tokenizer.unk_token_id:
                continue
            hidden = ids.clone()
            hidden[0, at] = tokenizer.mask_token_id
            states = encoder.model(input_ids=hidden, attention_mask=torch.ones_like(ids)).last_hidden_state
            logits = encoder.head(states[0, at], encoder.model.get_input_embeddings().weight)
            order = logits.argsort(descending=True).tolist()
            token = tokenizer.convert_ids_to_tokens(target)
            out.append((t, token, -float(logits.log_softmax(-1)[target]), order.index(target)))
    return out


def test_pseudo_perplexity_equals_a_slow_loop(encoder, monkeypatch):
    monkeypatch.setattr(module, "tokens_per_batch", lambda: 40)
    expected = slow(encoder)
    losses = np.array([loss for _, _, loss, _ in expected])
    found = measured(encoder, TEXTS)
    assert found["pseudo_perplexity"]["value"] == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert found["pseudo_perplexity"]["n"] == len(losses)
    words = sum(len(text.split()) for text in TEXTS) - 1  # the word that is unknown has no token to guess
    assert found["pseudo_perplexity_word"]["n"] == words
    assert found["pseudo_perplexity_word"]["value"] == pytest.approx(np.exp(losses.sum() / words), rel=1e-4)
    assert all(f["low"] < f["value"] < f["high"] for metric, f in found.items() if metric.startswith("pseudo"))
    guesses = guess(encoder, TEXTS)
    np.testing.assert_allclose(guesses.loss, losses, rtol=1e-3, atol=1e-4)
    assert guesses.rank.tolist() == [rank for *_, rank in expected]
    assert guesses.text.tolist() == [text for text, *_ in expected]


def test_cloze_scores_whole_words_that_are_one_token(encoder):
    expected = [(token, rank) for _, token, _, rank in slow(encoder) if len(token) > 1 and not token.startswith("##")]
    found = measured(encoder, TEXTS)
    for k in (1, 5):
        hits = [rank < k for _, rank in expected]
        assert found[f"cloze_top{k}"]["n"] == len(hits)
        assert found[f"cloze_top{k}"]["value"] == pytest.approx(np.mean(hits))
        assert found[f"cloze_top{k}"]["low"] <= np.mean(hits) <= found[f"cloze_top{k}"]["high"]
    assert measured(encoder, ["xyz", "\u4e00", ""]).keys() == {"pseudo_perplexity", "pseudo_perplexity_word"}


def spelling(model, pre_tokenizer):
    """An encoder whose tokens are those of `model`."""
    encoder = tiny.encoder(layers=1)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    special = dict(unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]")
    encoder.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    encoder.head = new_head(encoder.model)
    return encoder


def numbered(*tokens):
    return {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[MASK]", *tokens])}


def test_a_vowel_sign_is_part_of_a_word_and_a_hyphen_is_not():
    vocabulary = numbered("हिन्दी", "हिन्द", "##ु", "aso", "pusa", "-")
    encoder = spelling(models.WordPiece(vocabulary, unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer())
    guesses = guess(encoder, ["हिन्दी हिन्दु aso-pusa"])  # the second word is two tokens, its sign the second one
    assert guesses.whole.tolist() == [True, False, False, True, False, True] and guesses.words.tolist() == [3]


def test_a_token_may_include_the_space_before_its_word():
    model = models.WordLevel(numbered("\u2581aso", "\u2581pusa"), unk_token="[UNK]")
    encoder = spelling(model, pre_tokenizers.Metaspace(prepend_scheme="always"))
    assert guess(encoder, ["aso pusa"]).whole.tolist() == [True, True]


def test_rows_are_tidy_and_use_as_many_sentences_as_asked_for(encoder):
    rows = mlm_rows(encoder, TEXTS, "teacher")
    assert [row["metric"] for row in rows] == [
        "pseudo_perplexity",
        "pseudo_perplexity_word",
        "cloze_top1",
        "cloze_top5",
    ]
    assert all(row.keys() == {"model", "metric", "value", "low", "high", "n"} for row in rows)
    assert {row["model"] for row in rows} == {"teacher"}
    few = mlm_rows(encoder, TEXTS[:8], "teacher", sentences=2)
    assert few[1]["n"] < rows[1]["n"] and few == mlm_rows(encoder, TEXTS[:8], "teacher", sentences=2)


def test_a_head_that_knows_the_answer_has_perplexity_one():
    encoder = tiny.encoder(layers=1)
    encoder.head = new_head(encoder.model)
    with torch.no_grad():
        encoder.head.bias[encoder.tokenizer.convert_tokens_to_ids("aso")] = 100.0
    found = measured(encoder, ["aso aso"])
    assert found["pseudo_perplexity"]["value"] == pytest.approx(1, abs=1e-3) and found["cloze_top1"]["value"] == 1
    assert measured(encoder, ["aso pusa"])["cloze_top1"]["value"] == 0.5


def test_words_are_counted_up_to_the_truncation():
    encoder = tiny.encoder(layers=1)
    encoder.head, encoder.max_length = new_head(encoder.model), 6
    found = measured(encoder, ["aso " * 50])
    assert found["pseudo_perplexity"]["n"] == found["pseudo_perplexity_word"]["n"] == 4


def test_no_head_and_nothing_to_guess_are_refused(encoder):
    with pytest.raises(UserError, match="no token to guess"):
        guess(encoder, ["", "\u4e00"])
    with pytest.raises(UserError, match="no token to guess"):
        mlm_rows(encoder, [], "teacher")
    encoder.head = None
    with pytest.raises(UserError, match="tiny has no masked-language head"):
        guess(encoder, TEXTS)
    with pytest.raises(UserError, match="tiny has no masked-language head"):
        mlm_rows(encoder, TEXTS, "teacher")
