"""JupyterLab in a real browser: notebooks opened, run, their controls moved, the training stopped and taken up again.

Pictures of the pages are kept in runs/screenshots/.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from notebooks.test_notebooks import unreadable_outputs

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "runs" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
# A study small enough to be watched; its training has enough steps to be stopped between two of them.
OVERRIDES = [
    "corpus.max_documents=40", "probe.languages_rows=30", "distill.max_texts=80", "distill.batch_tokens=256",
    "distill.epochs=5", "distill.evaluations=2",
]  # fmt: skip
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
BROKEN = re.compile("error (displaying|creating|rendering) widget|failed to load model class|loading widget", re.I)
CELL = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell"
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}  # nor the question whether there may be some
ANSWER, RUNNING = 30_000, 240_000  # milliseconds for the page to do as told, for cells to run on a busy machine

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the notebooks, with small parameters, beside a place for their run."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for path in (folder / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        cell.source = f'profile = "smoke"\nrun_dir = "runs/browser"\noverrides = {OVERRIDES}'
        nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """The address and the token of a JupyterLab started as `make lab` starts it."""
    started = re.search(r"^lab:.*\n\t\$\(BIN\)/jupyter (.+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert "--ServerApp.ip=127.0.0.1" in started
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, settings = secrets.token_hex(16), folder / "config" / "lab" / "user-settings" / "@jupyterlab"
    (settings / "apputils-extension").mkdir(parents=True)
    (settings / "apputils-extension" / "notification.jupyterlab-settings").write_text(json.dumps(NO_NEWS))
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter", *started.replace("$(ROOT)", "--allow-root").split(),
         "--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"],
        cwd=folder, stdout=(folder / "lab.log").open("w"), stderr=subprocess.STDOUT,
        env=os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "IPYTHONDIR": str(folder / "ipython"),
        },
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=30)
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.1)
        yield address, token
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Lab:
    """A page of JupyterLab with one notebook, and what a reader does with it."""

    def __init__(self, page, address, token, folder):
        self.page, self.address, self.token, self.folder = page, address, token, folder
        self.failures = []  # of the page's own scripts
        page.on("pageerror", lambda error: self.failures.append(str(error)))
        page.set_default_timeout(ANSWER)

    def open(self, name):
        self.name = name
        self.page.goto(f"{self.address}/lab/tree/notebooks/{name}.ipynb?token={self.token}&reset")
        self.page.locator(CELL).first.wait_for()
        self.page.locator("#jp-main-statusbar", has_text=re.compile(r"Python 3.*Idle")).wait_for()
        self.page.keyboard.press("Control+b")  # the list of files goes, the notebook gets its room

    def menu(self, *names):
        for name in names:
            labels = self.page.locator(".lm-MenuBar-itemLabel, .lm-Menu-itemLabel")
            labels.filter(has_text=re.compile(f"^{name}$")).click()

    def cell(self, text):
        """The code cell that holds these words."""
        return self.page.locator(CELL, has=self.page.locator(".jp-InputArea", has_text=text))

    def wait_for_cells(self, cells=CELL):
        """Wait until the cells have run, or one has failed. Folded cells, the solutions, show no number."""
        self.page.wait_for_function(
            """([cells, errors]) => {
                const shown = document.querySelectorAll(`:is(${cells}) .jp-InputPrompt:not(.jp-Placeholder-prompt)`);
                const prompts = [...shown].map(prompt => prompt.textContent.trim());
                const done = prompts.length && prompts.every(text => /^\\[\\d+\\]:$/.test(text));
                return done || document.querySelector(errors);
            }""",
            arg=[cells, ERRORS],
            timeout=RUNNING,
        )

    def wait_for_change(self, place, what, old):
        arguments = [place.element_handle(), what, old]
        self.page.wait_for_function("([element, what, old]) => element[what] != old", arg=arguments)

    def errors(self):
        return self.page.locator(ERRORS).all_text_contents()

    def check(self):
        """No error in any output, no widget that does not show, no failed script."""
        assert not self.errors()
        outputs = self.page.locator(".jp-OutputArea-output").all_text_contents()
        assert outputs and not [text for text in outputs if BROKEN.search(text)]
        assert not self.failures

    def picture(self, name, place=None):
        """Keep a picture of this place, or of all that is to be seen."""
        if place:
            place.scroll_into_view_if_needed()
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (place or self.page).screenshot(path=SCREENSHOTS / f"{name}.png")

    def save(self):
        """The notebook as JupyterLab saves it; the kernel is shut down."""
        path = self.folder / "notebooks" / f"{self.name}.ipynb"
        before = path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        for _ in range(300):
            if path.stat().st_mtime_ns != before:
                break
            time.sleep(0.1)
        headers = {"Authorization": f"token {self.token}"}
        for kernel in self.page.request.get(f"{self.address}/api/kernels", headers=headers).json():
            self.page.request.delete(f"{self.address}/api/kernels/{kernel['id']}", headers=headers)
        return nbformat.read(path, 4)


@pytest.fixture
def page(browser, lab, folder, request):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = Lab(context.new_page(), *lab, folder)
    yield page
    page.picture(f"end_of_{request.node.name}")  # what a failed test had before it
    context.close()


def test_no_one_gets_in_without_the_token(lab):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{lab[0]}/api/contents", timeout=60)
    assert refused.value.code == 403


def test_controls_answer(page, folder):
    page.open("02_prune_the_vocabulary")
    page.picture("opened")
    page.menu("Run", "Run All Cells")
    page.wait_for_cells()
    page.check()

    tokeniser = page.cell("widgets.tokeniser")
    text = tokeniser.locator(".widget-html-content")
    before = text.text_content()
    tokeniser.locator("input[type=text]").fill("Magandang umaga, kumusta ka na?")
    page.wait_for_change(text, "textContent", before)
    page.picture("tokeniser", tokeniser)

    panel = page.cell("widgets.vocabulary_size")
    page.picture("vocabulary", panel)
    text, image = panel.locator(".widget-html-content"), panel.locator("img")
    before = text.text_content(), image.get_attribute("src")
    handle, track = panel.locator(".noUi-handle"), panel.locator(".noUi-target").bounding_box()
    place = handle.bounding_box()
    page.page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    page.page.mouse.down()
    page.page.mouse.move(track["x"] + track["width"] / 10, place["y"] + place["height"] / 2, steps=5)
    page.page.mouse.up()
    page.wait_for_change(text, "textContent", before[0])
    page.wait_for_change(image, "src", before[1])
    page.check()
    page.picture("vocabulary_moved", panel)
    assert not unreadable_outputs(page.save(), folder)


def test_training_stops_at_the_button_and_goes_on(page, folder):
    page.open("03_distill_a_student")
    page.menu("Run", "Run All Cells")
    cell = page.cell("study.distill(")
    button = cell.get_by_role("button", name="Stop at a checkpoint")
    cell.locator("img").or_(page.page.locator(ERRORS)).first.wait_for(timeout=RUNNING)  # the curve has begun
    assert not page.errors()
    page.picture("training", cell)
    button.click()
    stopped = cell.locator(ERRORS)
    stopped.wait_for()
    step, steps = map(int, re.fullmatch(r"Stopped at step (\d+) of (\d+), .*\n?", stopped.text_content()).groups())
    assert 0 < step < steps and len(page.errors()) == 1
    assert "Stopped." in cell.locator(".widget-html-content").text_content()
    assert list(folder.glob(f"runs/browser/artefacts/student-*-checkpoints/checkpoint-{step}"))
    page.picture("stopped", cell)

    cell.locator(".cm-content").click()
    page.page.keyboard.press("Control+Enter")
    cell.get_by_role("button", name="Finished").wait_for(timeout=RUNNING)
    page.menu("Run", "Run Selected Cell and All Below")
    page.wait_for_cells()
    page.check()
    page.picture("finished", cell)
    page.picture("learning_curve", page.cell("figures.learning_curve"))
    page.picture("attention", page.cell("widgets.attention_heads"))
    page.picture("layer_map", page.cell("widgets.layer_map_editor"))
    assert not unreadable_outputs(page.save(), folder)
