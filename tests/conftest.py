"""Fixtures that several test files share."""

import json
import os
from importlib import resources

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()


def read_rows(name):
    lines = (resources.files("kdlib") / "data" / name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def parallel():
    """The parallel sentences: columns tgl, eng, spa, ind, ceb."""
    return read_rows("parallel.jsonl")


@pytest.fixture(scope="session")
def teacher_folder():
    """The embedded teacher, converted once into the cache of this machine."""
    from kdlib import embedded

    return embedded.folder()


@pytest.fixture(scope="session")
def teacher_tokenizer(teacher_folder):
    return AutoTokenizer.from_pretrained(teacher_folder)


@pytest.fixture(scope="session")
def teacher_model(teacher_folder):
    return AutoModel.from_pretrained(teacher_folder).eval()


@pytest.fixture(scope="session")
def toy_tokenizer():
    """A WordPiece tokenizer of letters: every word becomes as many tokens as it has letters."""
    from transformers import BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", *letters, *("##" + letter for letter in letters)]
    return BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)})


@pytest.fixture(scope="session")
def toy_encoder(toy_tokenizer):
    """A random BERT of two layers over `toy_tokenizer`, without a prefix."""
    import torch
    from transformers import BertConfig, BertModel

    from kdlib.encoder import Encoder

    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(BertConfig(vocab_size=len(toy_tokenizer), max_position_embeddings=64, **shape)).eval()
    return Encoder(model, toy_tokenizer, "toy", "", 32)
