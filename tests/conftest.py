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
def documents():
    """The embedded corpus as its file has it: id, topic, register, sentences."""
    return read_rows("documents.jsonl")
