"""How far a piece of work is, told where somebody looks."""

import json
from types import SimpleNamespace

import IPython.display
import pytest

from kdlib import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: now.seconds))
    return now


def test_runner_reads_a_report(tmp_path, monkeypatch, clock):
    file = tmp_path / "progress.json"
    monkeypatch.setenv(progress.FILE, str(file))
    report = progress.Progress("distilling", 8)
    clock.seconds += 4
    report.update(2, "loss 0.5")
    assert json.loads(file.read_text()) == dict(label="distilling", done=2, total=8, note="loss 0.5", left=12.0)
    report.close()


def test_notebook_shows_one_line_that_goes_when_the_work_is_done(monkeypatch, clock):
    monkeypatch.delenv(progress.FILE, raising=False)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=True))
    shown = []
    handle = SimpleNamespace(update=lambda bundle, raw: shown.append(bundle))
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw, display_id: shown.append(bundle) or handle)
    seen = []
    for item in progress.track("abcd", "encoding"):
        seen.append(item)
        clock.seconds += 0.9
    assert seen == list("abcd") and all(set(bundle) == {"text/plain"} for bundle in shown)
    lines = [bundle["text/plain"] for bundle in shown]
    assert lines[0].startswith("encoding:  50%") and "2/4" in lines[0] and lines[-1] == "" and len(lines) == 4


def test_work_of_a_moment_shows_nothing(monkeypatch, clock):
    monkeypatch.delenv(progress.FILE, raising=False)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.setattr(IPython.display, "display", lambda *a, **k: pytest.fail("shown"))
    assert list(progress.track("ab", "encoding")) == ["a", "b"]


def test_elsewhere_there_is_a_bar(monkeypatch):
    monkeypatch.delenv(progress.FILE, raising=False)
    report = progress.Progress("encoding", 2)
    report.update(1, "half")
    assert report.bar.n == 1 and report.bar.postfix == "half" and report.line is None
    report.close()
