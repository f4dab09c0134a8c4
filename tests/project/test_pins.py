"""What is installed is pinned, in one place, for pip and conda alike."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([0-9][\w.]*)$")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(PIN.match(line) for line in lines)
    return {canonical(PIN.match(line)[1]): PIN.match(line)[2] for line in lines}


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    assert {canonical(re.match(r"[\w.-]+", name)[0]) for name in named} <= set(pins())


def test_conda_environment_takes_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    assert "--constraint constraints.txt" in pip
    own = [line for line in pip if "==" in line]
    assert all(pins()[canonical(PIN.match(line)[1])] == PIN.match(line)[2] for line in own)


def test_conda_and_pip_agree_on_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(entry for entry in environment if isinstance(entry, str) and entry.startswith("python="))
    assert project["requires-python"] == ">=" + python.removeprefix("python=")
