"""The pages of the documentation are current: parameters, modules, links, and the length of the README."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest

import kdlib
from kdlib import config
from kdlib.study.published import MARKED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "offline" / "INSTALL.md"])


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
        "| `student.init` | `alternate`, `late`, `first`, `last`, `random` or list of whole numbers | `alternate` | "
        in table
    )
    assert "| `tasks[].name` | text | (required) | " in table
    assert "The same keys as `teacher`." in table  # of baselines


def test_an_old_table_is_replaced_and_the_rest_of_the_page_kept(parameters):
    before, after = parameters.MARKS
    page = parameters.page(f"above\n{before}\nold\n{after}\nbelow\n")
    assert page.startswith(f"above\n{before}\n\n### The study") and page.endswith(f"{after}\nbelow\n")
    assert "old\n" not in page and parameters.page(page) == page


def test_the_api_page_names_every_module():
    found = {module.name for module in pkgutil.walk_packages(kdlib.__path__, "kdlib.") if not module.ispkg}
    named = re.findall(r"^\.\. automodule:: (\S+)$", (DOCS / "api.md").read_text("utf-8"), re.M)
    assert sorted(named) == sorted(found - {"kdlib.__main__", "kdlib.cli"})  # the command line is in reference.md


def prose(page):
    """The text of a page, or the markdown of a notebook."""
    if page.suffix == ".md":
        return page.read_text("utf-8")
    return "\n".join(cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "markdown")


def anchors(page):
    """What a link to a page can name after the #: its headings, and what it marks with <a id="...">."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    return slugs + re.findall(r'<a id="([^"]+)"></a>', prose(page))


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_every_term_of_the_glossary_has_an_anchor_of_its_own():
    terms = re.findall(r"^- .+$", prose(DOCS / "glossary.md"), re.M)
    # Lower case and hyphens: the same name on GitHub, in JupyterLab and in the book.
    assert [term for term in terms if not re.match(r'- <a id="[a-z0-9]+(-[a-z0-9]+)*"></a>\*\*', term)] == []
    names = anchors(DOCS / "glossary.md")
    assert len(names) == len(set(names)) == len(terms) + 1  # and the title


@pytest.mark.parametrize("name", ("00", "01", "02", "02b", "03", "04", "04b", "05"))
def test_a_notebook_links_to_its_terms_in_the_glossary(name):
    (notebook,) = (path for path in NOTEBOOKS if path.stem.startswith(f"{name}_"))
    terms = re.findall(r"\]\(\.\./docs/glossary\.md#([^)\s]+)\)", prose(notebook))
    assert terms and len(terms) == len(set(terms)), "each term once, where it is first used"


def test_the_readme_is_short():
    written = MARKED.sub("", (ROOT / "README.md").read_text("utf-8"))  # without the tables of a run
    assert len(written.split()) <= 1000
