"""`make demo`: the newest run is taken, and teacher and student answer a sentence in a real browser."""

import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny

from kdlib.config import load_profile
from kdlib.errors import UserError
from kdlib.files import seal
from kdlib.study.demo import load_demo, newest_run
from kdlib.study.run import Run

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two runs of very small models, and the notebook."""
    place = tmp_path_factory.mktemp("demo")
    tiny.encoder(layers=2).save(place / "teacher")
    for i, name in enumerate(("new", "old")):
        run = Run(place / "runs" / name, load_profile("smoke", {"teacher.source": str(place / "teacher")}))
        tiny.encoder(layers=1).save(run.folder("student"))
        seal(run.path / "student", key="abc")
        os.utime(run.path / "student" / "made.json", (10**9 - i, 10**9 - i))
    (place / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "07_try_the_student.ipynb", place / "notebooks")
    return place


def test_newest_run_with_a_student_is_taken(place, monkeypatch):
    (place / "runs" / "unfinished").mkdir(exist_ok=True)
    assert newest_run(place / "runs") == place / "runs" / "new"
    monkeypatch.chdir(place / "notebooks")
    demo = load_demo()
    assert demo.run.path == place / "runs" / "new" and len(demo.sentences) == 300
    assert [encoder.layers for encoder in demo.encoders.values()] == [2, 1]
    assert [task.name for task in demo.tasks] == ["topic", "entities"]
    assert load_demo("runs/old").run.path == place / "runs" / "old"


def test_without_a_run_the_demo_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run with a student; make one with kdlib run"):
        load_demo()
    with pytest.raises(UserError, match="no student here"):
        load_demo("runs/none")


@pytest.fixture(scope="module")
def voila(place):
    """The address and the token of the page, started as `make demo` starts it."""
    import voila

    makefile = (ROOT / "Makefile").read_text()
    styles = re.search(r"^OWN_STYLES = (.+)$", makefile, re.M)[1]
    started = re.search(r"^demo:(?:.*\n)+?\t\$\(BIN\)/voila (.+)$", makefile, re.M)[1]
    arguments = shlex.split(started.replace("$(OWN_STYLES)", styles))
    assert "--Voila.ip=127.0.0.1" in arguments and "--Voila.auto_token=True" in arguments
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    share = Path(voila.__file__).parents[4] / "share" / "jupyter"  # where its templates are installed
    more = ["--no-browser", f"--port={port}", f"--Voila.token={token}"]
    server = subprocess.Popen(
        [sys.executable, "-m", "voila", *arguments, *more], cwd=place,
        stdout=(place / "voila.log").open("w"), stderr=subprocess.STDOUT,
        env=os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "JUPYTER_PATH": str(share),
        },
    )  # fmt: skip
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{address}/login", timeout=30)
                break
            except OSError:
                assert server.poll() is None, (place / "voila.log").read_text()
                time.sleep(0.1)
        yield address, token
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (apt-get install chromium)")
def test_both_models_answer_a_sentence_without_another_address(voila):
    from playwright.sync_api import sync_playwright

    address, token = voila
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page, answered = browser.new_page(), []
        page.on("response", lambda response: answered.append(response.url))
        assert "login" in page.goto(address).url  # nobody gets in without the token
        page.goto(f"{address}/?token={token}", timeout=240_000, wait_until="commit")
        box = page.locator("input[type=text]")
        box.wait_for(timeout=240_000)
        assert "new" in page.locator("body").text_content()
        box.fill("ang bata ay natulog")
        box.press("Enter")
        page.get_by_text("Nearest to: ang bata ay natulog").wait_for(timeout=60_000)
        text = page.locator("body").text_content()
        assert re.search(r"time for this text\s*[\d.]+ ms\s*[\d.]+ ms", text) and "import" not in text
        assert "error" not in text.lower() and all(url.startswith((address, "data:", "blob:")) for url in answered)
        browser.close()
