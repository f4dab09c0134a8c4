"""Pseudo-perplexity and cloze accuracy against slow loops over one token at a time."""

import numpy as np
import pytest
import tiny
import torch

from kdlib.errors import UserError
from kdlib.evaluation import cloze as module
from kdlib.evaluation.cloze import cloze, guess, mlm_rows, pseudo_perplexity
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


@torch.no_grad()
def slow(encoder):
    """(text, piece, loss, rank) of every token that is neither special nor of the prefix, each text and token alone."""
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
            piece = tokenizer.convert_ids_to_tokens(target)
            out.append((t, piece, -float(logits.log_softmax(-1)[target]), order.index(target)))
    return out


def test_pseudo_perplexity_equals_a_slow_loop(encoder, monkeypatch):
    monkeypatch.setattr(module, "tokens_per_batch", lambda: 40)
    expected = slow(encoder)
    losses = np.array([loss for _, _, loss, _ in expected])
    found = pseudo_perplexity(encoder, TEXTS)
    assert found["pseudo_perplexity"]["value"] == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert found["pseudo_perplexity"]["n"] == len(losses)
    words = sum(len(text.split()) for text in TEXTS) - 1  # the word that is unknown has no token to guess
    assert found["pseudo_perplexity_word"]["n"] == words
    assert found["pseudo_perplexity_word"]["value"] == pytest.approx(np.exp(losses.sum() / words), rel=1e-4)
    assert all(f["low"] < f["value"] < f["high"] for f in found.values())
    guesses = guess(encoder, TEXTS)
    np.testing.assert_allclose(guesses.loss, losses, rtol=1e-3, atol=1e-4)
    assert guesses.rank.tolist() == [rank for *_, rank in expected]
    assert guesses.text.tolist() == [text for text, *_ in expected]


def test_cloze_asks_for_whole_words_of_one_token(encoder):
    expected = [(piece, rank) for _, piece, _, rank in slow(encoder) if len(piece) > 1 and not piece.startswith("##")]
    found = cloze(encoder, TEXTS)
    for k in (1, 5):
        hits = [rank < k for _, rank in expected]
        assert found[f"cloze_top{k}"]["n"] == len(hits)
        assert found[f"cloze_top{k}"]["value"] == pytest.approx(np.mean(hits))
        assert found[f"cloze_top{k}"]["low"] <= np.mean(hits) <= found[f"cloze_top{k}"]["high"]
    assert cloze(encoder, TEXTS, limit=7)["cloze_top1"]["n"] == 7
    assert cloze(encoder, ["xyz", "\u4e00", ""]) == {}


def test_words_are_those_of_the_script():
    """A Devanagari vowel sign is no letter, but part of its word; a hyphen is not."""
    text = "हिन्दी aso-pusa"
    categories = module._whole_words
    from types import SimpleNamespace

    spans = [(0, 2), (0, 6), (6, 10), (7, 10), (10, 11), (11, 15), (12, 15)]
    encoding = SimpleNamespace(offsets=spans)
    found = categories(text, encoding, np.ones(len(spans), bool))
    assert found.tolist() == [False, True, True, True, False, True, False]


def test_rows_are_tidy_and_of_as_many_sentences_as_asked_for(encoder):
    rows = mlm_rows(encoder, TEXTS, "teacher")
    assert [row["metric"] for row in rows] == [
        "pseudo_perplexity",
        "pseudo_perplexity_word",
        "cloze_top1",
        "cloze_top5",
    ]
    assert all(row.keys() == {"model", "metric", "value", "low", "high", "n"} for row in rows)
    assert {row["model"] for row in rows} == {"teacher"}
    both = pseudo_perplexity(encoder, TEXTS) | cloze(encoder, TEXTS)
    assert [row["value"] for row in rows] == pytest.approx([both[row["metric"]]["value"] for row in rows], rel=1e-6)
    few = mlm_rows(encoder, TEXTS[:8], "teacher", sentences=2)
    assert few[1]["n"] < rows[1]["n"] and few == mlm_rows(encoder, TEXTS[:8], "teacher", sentences=2)


def test_a_head_that_knows_the_answer_is_never_surprised():
    encoder = tiny.encoder(layers=1)
    encoder.head = new_head(encoder.model)
    with torch.no_grad():
        encoder.head.bias[encoder.tokenizer.convert_tokens_to_ids("aso")] = 100.0
    assert pseudo_perplexity(encoder, ["aso aso"])["pseudo_perplexity"]["value"] == pytest.approx(1, abs=1e-3)
    assert cloze(encoder, ["aso aso"])["cloze_top1"]["value"] == 1
    found = cloze(encoder, ["aso pusa"])
    assert found["cloze_top1"]["value"] == 0.5


def test_words_are_counted_as_far_as_the_text_is_seen():
    encoder = tiny.encoder(layers=1)
    encoder.head, encoder.max_length = new_head(encoder.model), 6
    found = pseudo_perplexity(encoder, ["aso " * 50])
    assert found["pseudo_perplexity"]["n"] == found["pseudo_perplexity_word"]["n"] == 4


def test_no_head_and_nothing_to_guess_are_refused(encoder):
    with pytest.raises(UserError, match="no token to guess"):
        pseudo_perplexity(encoder, ["", "\u4e00"])
    with pytest.raises(UserError, match="no token to guess"):
        mlm_rows(encoder, [], "teacher")
    encoder.head = None
    for probe in (pseudo_perplexity, cloze):
        with pytest.raises(UserError, match="tiny has no masked-language head"):
            probe(encoder, TEXTS)
