"""Fixtures that several test files share."""

import gc
import json
import logging
import os
from importlib import resources

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the machine, before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))

import pytest
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
logging.getLogger("traitlets").setLevel(logging.ERROR)  # a kernel's client that is collected late warns in another test
LONG = ["notebooks", "runner", "browser", "exercises", "soak", "distill"]  # files of tests that take minutes


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what reads the embedded teacher. The long files come first: no worker is left with one at the end."""
    for item in items:
        if "teacher_folder" in item.fixturenames:
            item.add_marker("teacher")
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def pytest_collection_finish():
    """What the libraries have made is no garbage: the Trainer looks for some at every start, a third of a second."""
    gc.freeze()


def read_rows(name):
    lines = (resources.files("kdlib") / "data" / "bundled" / name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def parallel():
    """The parallel sentences: columns tgl, eng, spa, ind, ceb."""
    return read_rows("parallel.jsonl")


@pytest.fixture(scope="session")
def teacher_folder():
    """The embedded teacher, converted once into the cache of this machine."""
    from kdlib.models import embedded_teacher

    return embedded_teacher.folder()


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
