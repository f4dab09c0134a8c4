"""docs/reference.md lists every parameter of a profile, as config.py has them now."""

import importlib.util
import re
from pathlib import Path

import pytest

from kdlib import config

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def parameters():
    spec = importlib.util.spec_from_file_location("parameters", DOCS / "parameters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_the_current_tables_of_parameters(parameters):
    text = (DOCS / "reference.md").read_text("utf-8")
    assert parameters.page(text) == text, "run make docs"


def test_every_parameter_is_in_the_tables(parameters):
    table = parameters.reference_table()
    named = set(re.findall(r"^\| `([\w.\[\]<>]+)` \|", table, re.M)) | set(re.findall(r"^### `(.+)`$", table, re.M))
    missing = set(config.all_keys()) - named
    assert all(key.startswith("baselines.") for key in missing)  # there as baselines.<name>
    assert {"distill.learning_rate", "tasks[].name", "corpus.fallbacks[].text", "parallel", "baselines"} <= named


def test_a_table_tells_type_limits_and_default(parameters):
    table = parameters.reference_table()
    assert "| `distill.warmup` | number (≥ 0, < 1) | `0.06` | " in table
    assert (
        "| `student.init` | `alternate`, `first`, `last`, `random` or list of whole numbers | `alternate` | " in table
    )
    assert "| `tasks[].name` | text | (required) | " in table
    assert "The same keys as `teacher`." in table  # of baselines


def test_an_old_table_is_replaced_and_the_rest_of_the_page_kept(parameters):
    before, after = parameters.MARKS
    page = parameters.page(f"above\n{before}\nold\n{after}\nbelow\n")
    assert page.startswith(f"above\n{before}\n\n### The study") and page.endswith(f"{after}\nbelow\n")
    assert "old\n" not in page and parameters.page(page) == page
