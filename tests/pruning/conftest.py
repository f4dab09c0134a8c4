"""Fixtures: small models and tokenizers of every kind, pruned once."""

from types import SimpleNamespace

import pytest
import torch
from pruning.pairs import ACCENTED, FOREIGN, KINDS, build, train_bpe, train_unigram, train_wordpiece
from transformers import PreTrainedModel

from kdlib.pruning.model import prune_model
from kdlib.pruning.selection import select_tokens
from kdlib.pruning.tokenizer import prune_tokenizer


@pytest.fixture(scope="session")
def corpus(parallel):
    return [row["tgl"] for row in parallel[:120]] + ACCENTED


@pytest.fixture(scope="session")
def training(parallel):
    sentences = [row[code] for row in parallel[:200] for code in ("tgl", "eng", "spa", "ind", "ceb")]
    return sentences + (ACCENTED + FOREIGN) * 3


@pytest.fixture(scope="session")
def tokenizers(training):
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = {
                "wordpiece": lambda: train_wordpiece(training),
                "unigram": lambda: train_unigram(training),
                "unigram shifted": lambda: train_unigram(training, before=["<old>", "<older>"]),
                "bpe": lambda: train_bpe(training),
                "bpe shifted": lambda: train_bpe(training, before=["<old>", "<older>"]),
            }[kind]()
        return made[kind]

    return make


@pytest.fixture(scope="session")
def studies(tokenizers, corpus, tmp_path_factory):
    made = {}

    def make(kind):
        if kind in made:
            return made[kind]
        tokenizer = tokenizers(kind)
        model = build(kind, tokenizer)
        chosen = select_tokens(tokenizer, corpus, words=["magandang", "Batangas"], extra=["query: "])
        small, pruned = prune_tokenizer(tokenizer, chosen.ids), prune_model(model, tokenizer, chosen.ids)
        folder = tmp_path_factory.mktemp("pruned")
        small.save_pretrained(folder)
        pruned.save_pretrained(folder)
        made[kind] = SimpleNamespace(
            kind=kind, tokenizer=tokenizer, model=model, chosen=chosen, small=small, pruned=pruned, folder=folder,
            ids=torch.tensor(chosen.ids), corpus=corpus,
        )  # fmt: skip
        return made[kind]

    return make


@pytest.fixture(params=KINDS)
def study(request, studies):
    return studies(request.param)


@pytest.fixture
def no_model(monkeypatch):
    """Building a model fails."""

    def refuse(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
