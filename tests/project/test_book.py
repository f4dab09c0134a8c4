"""The book in a real browser: every page opens, its links and pictures are there, and its search finds a word."""

import functools
import http.server
import importlib.util
import re
import shutil
import threading
from base64 import b64encode
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from kdlib.config import load_profile
from kdlib.errors import UserError
from kdlib.study.run import Run

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update".split()
DOTS = b64encode((ROOT / "docs" / "screenshots" / "tokeniser.png").read_bytes()).decode()
needs_packages = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml")),
    reason="needs the packages of pip install 'kdlib[docs]'",
)


@pytest.fixture(scope="module")
def book():
    spec = importlib.util.spec_from_file_location("book", ROOT / "docs" / "book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the notebooks as if they had been executed: every code cell has a picture and a table."""
    run = Run(tmp_path_factory.mktemp("runs") / "mine", load_profile("smoke"))
    run.folder("notebooks/fil")
    for path in sorted([*NOTEBOOKS.glob("0[0-6]*.ipynb"), *NOTEBOOKS.glob("fil/*.ipynb")]):
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                data = {"image/png": DOTS, "text/plain": "<Image>"}
                table = {"text/html": "<table><tr><td>0.5</td></tr></table>", "text/plain": "0.5"}
                cell.outputs = [nbformat.v4.new_output("display_data", data=content) for content in (data, table)]
        nbformat.write(notebook, run.folder("notebooks") / path.relative_to(NOTEBOOKS))
    return run


@needs_packages
def test_a_run_without_executed_notebooks_is_refused(book, tmp_path):
    with pytest.raises(UserError, match="no executed notebooks; finish the run first"):
        book.executed(Run(tmp_path / "run", load_profile("smoke")))


@needs_packages
def test_solutions_are_folded_and_links_lead_into_the_book(book):
    notebook = nbformat.read(NOTEBOOKS / "00_start_here.ipynb", 4)
    found = book.for_book(notebook)
    assert "](../docs/" not in "".join(cell.source for cell in found.cells)
    translated = book.for_book(nbformat.read(NOTEBOOKS / "fil" / "00_magsimula_rito.ipynb", 4))
    text = "".join(cell.source for cell in translated.cells)
    assert "](../../glossary.md)" in text and "](path:../../../CONTRIBUTING.md)" in text and "/docs/" not in text
    solutions = [cell for cell in found.cells if "solution" in cell.metadata.get("tags", [])]
    assert solutions and all("hide-input" in cell.metadata.tags for cell in solutions)


@needs_packages
def test_a_translation_follows_its_original(book, run, tmp_path):
    names = [path.relative_to(run.path / "notebooks").as_posix() for path in book.executed(run)]
    assert names[:3] == ["00_start_here.ipynb", "fil/00_magsimula_rito.ipynb", "01_probe_the_teacher.ipynb"]
    pages = book.stage(run, tmp_path / "source")
    text = "".join(cell.source for cell in nbformat.read(pages / "notebooks" / names[1], 4).cells)
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    assert links and all((pages / "notebooks" / "fil" / link.removeprefix("path:")).is_file() for link in links)
    assert "notebooks/00_start_here\nnotebooks/fil/00_magsimula_rito\n" in (pages / "index.md").read_text("utf-8")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(book, run, tmp_path_factory):
    """The address of the built book, and the names of its pages."""
    out = tmp_path_factory.mktemp("book") / "book"
    assert book.main(run.path, out) == 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=out))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", sorted(str(path.relative_to(out)) for path in out.rglob("*.html"))
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.others = []  # addresses elsewhere that were asked for
        page.on("request", lambda r: None if r.url.startswith((site[0], "data:")) else page.others.append(r.url))
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(site[0]) else route.abort())
        yield page
        browser.close()


@pytest.mark.slow
@pytest.mark.browser
@needs_packages
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (apt-get install chromium)")
def test_every_page_is_whole_and_the_search_finds_a_word(site, page):
    address, names = site
    assert {"index.html", "api.html", "glossary.html", "notebooks/03_distill_a_student.html"} <= set(names)
    anchors, links = {}, []
    for name in names:
        assert page.goto(address + name, wait_until="load").ok, name
        broken, ids, hrefs, pictures = page.evaluate(
            """() => [
                [...document.images].filter((i) => !i.naturalWidth && i.loading != "lazy").map((i) => i.src),
                [...document.querySelectorAll("[id]")].map((element) => element.id),
                [...document.querySelectorAll("a[href]")].map((a) => a.href),
                document.images.length,
            ]"""
        )
        assert not broken, name
        assert not page.locator(".cell_output .traceback, .system-message, .problematic").count(), name
        assert pictures or not name.startswith("notebooks/"), name
        anchors[name] = set(ids)
        links += [(name, href[len(address) :]) for href in hrefs if href.startswith(address)]
    for name, link in links:
        target, _, anchor = link.partition("#")
        target = target.split("?")[0]
        if target.endswith(".html"):
            assert target in anchors, f"{name}: {link}"
            assert not anchor or anchor in anchors[target], f"{name}: {link}"
        elif target:
            assert page.request.head(address + target).ok, f"{name}: {link}"
    page.goto(address + "notebooks/03_distill_a_student.html")
    assert page.locator("math").count() > 5  # formulas need no script
    page.evaluate("document.documentElement.dataset.mode = document.documentElement.dataset.theme = 'dark'")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, ground[4:-1].split(","))) < 60
    page.goto(address + "search.html?q=fertility")
    page.locator("#search-results li a", has_text="Glossary").first.wait_for()
    assert not page.others
