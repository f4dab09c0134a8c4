"""Back to the start: fresh notebooks, the prepared run, and nobody's work lost."""

import subprocess

import pytest

from kdlib.errors import UserError
from kdlib.study import reset


def files(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def bundle(tmp_path):
    for name, text in (("notebooks/00.ipynb", "fresh"), ("runs/smoke/results.csv", "prepared")):
        (tmp_path / "handout" / name).parent.mkdir(parents=True)
        (tmp_path / "handout" / name).write_text(text)
    return tmp_path


def test_first_time_in_a_bundle_lays_everything_out(bundle):
    assert reset.reset(bundle) is None
    assert files(bundle / "notebooks") == {"00.ipynb": "fresh"}
    assert files(bundle / "runs") == {"smoke/results.csv": "prepared"}


def test_work_is_set_aside_and_everything_is_fresh(bundle):
    reset.reset(bundle)
    (bundle / "notebooks" / "00.ipynb").write_text("my answers")
    (bundle / "runs" / "mine").mkdir()
    (bundle / "runs" / "mine" / "results.csv").write_text("my numbers")
    aside = reset.reset(bundle)
    assert files(bundle / "notebooks") == {"00.ipynb": "fresh"}
    assert files(bundle / "runs") == {"smoke/results.csv": "prepared"}
    kept = files(aside)
    assert kept["notebooks/00.ipynb"] == "my answers" and kept["runs/mine/results.csv"] == "my numbers"
    assert aside.parent == bundle / "set_aside"


def test_a_checkout_gets_the_notebooks_of_its_last_commit(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00.ipynb").write_text("fresh")
    git("add", ".")
    git("commit", "-m", "start")
    (tmp_path / "notebooks" / "00.ipynb").write_text("my answers")
    (tmp_path / "notebooks" / "mine.ipynb").write_text("my own")
    (tmp_path / "runs").mkdir()
    aside = reset.reset(tmp_path)
    assert files(tmp_path / "notebooks") == {"00.ipynb": "fresh"} and not (tmp_path / "runs").exists()
    assert files(aside) == {"notebooks/00.ipynb": "my answers", "notebooks/mine.ipynb": "my own"}


def test_where_nothing_fresh_can_be_had_nothing_is_moved(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00.ipynb").write_text("my answers")
    with pytest.raises(UserError, match="nothing was moved"):
        reset.reset(tmp_path)
    assert files(tmp_path) == {"notebooks/00.ipynb": "my answers"}


def test_resets_within_one_second_lose_nothing(bundle, monkeypatch):
    monkeypatch.setattr(reset.time, "strftime", lambda form: "now")
    reset.reset(bundle)
    (bundle / "notebooks" / "00.ipynb").write_text("my answers")
    first = reset.reset(bundle)
    with pytest.raises(UserError, match="could not be reset"):
        reset.reset(bundle)
    assert files(first)["notebooks/00.ipynb"] == "my answers" and files(bundle / "notebooks") == {"00.ipynb": "fresh"}
