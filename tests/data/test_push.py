"""`kdlib push`: the real client against a hub on loopback; and what it says where it cannot."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
from hubserver import HubServer
from typer.testing import CliRunner

from kdlib.cli import app
from kdlib.config import load_profile
from kdlib.data import hub
from kdlib.files import SEAL, seal
from kdlib.study.run import Run


@pytest.fixture
def run(tmp_path):
    """A run folder with a very small student."""
    run = Run(tmp_path / "run", load_profile("smoke"))
    tiny.encoder(layers=1).save(run.folder("student"))
    seal(run.path / "student", key="abc")
    return run.path


def push(*arguments):
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.slow
def test_a_student_arrives_whole_private_and_with_its_card(run, tmp_path):
    with HubServer(tmp_path / "hub") as server:
        environment = os.environ | server.environment(tmp_path / "home") | {"HF_TOKEN": "hf_made_up"}
        command = [sys.executable, "-m", "kdlib", "push", "--run", str(run), "--to", "owner/student"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{server.url}/owner/student\n" and server.private == {"owner/student"}
    sent = {p.relative_to(run / "student") for p in (run / "student").rglob("*") if p.is_file()}
    there = tmp_path / "hub" / "models" / "owner" / "student"
    assert {p.relative_to(there) for p in there.rglob("*") if p.is_file()} == {p for p in sent if p.name != SEAL}
    assert (there / "model.safetensors").read_bytes() == (run / "student" / "model.safetensors").read_bytes()
    assert (there / "README.md").read_text("utf-8").startswith("---\nbase_model: ")


def test_offline_nothing_is_uploaded(run, monkeypatch):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    code, said = push("--run", run, "--to", "owner/student")
    assert code == 2 and said == "kdlib: model 'owner/student': HF_HUB_OFFLINE is set; nothing was uploaded\n"


class Refusing:
    """A client whose hub answers `status`; 0: nobody answers."""

    def __init__(self, status):
        self.status = status

    def create_repo(self, *_, **__):
        if not self.status:
            raise ConnectionError("nobody is there")
        error = RuntimeError("Forbidden\nYou are not ...")
        error.response = SimpleNamespace(status_code=self.status)
        raise error


@pytest.mark.parametrize(
    "status, says", [(401, "has no right to write there"), (403, "has no right to write there"), (0, "nobody is")]
)
def test_what_the_hub_answers_is_one_line(run, monkeypatch, status, says):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_made_up")
    monkeypatch.setattr(hub, "HfApi", lambda: Refusing(status))
    monkeypatch.setattr(hub, "WAITS", (0,))
    code, said = push("--run", run, "--to", "owner/student")
    assert code == 2 and says in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["owner/na me", "a/b/c", "--"])
def test_a_name_that_is_none_is_told(run, monkeypatch, name):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_made_up")
    code, said = push("--run", run, f"--to={name}")
    assert code == 2 and "not uploaded" in said and len(said.splitlines()) == 1


def test_without_a_token_nothing_is_uploaded(run, monkeypatch):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    code, said = push("--run", run, "--to", "owner/student")
    assert code == 2 and "no token" in said and "HF_TOKEN" in said
