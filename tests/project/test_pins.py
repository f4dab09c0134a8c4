"""What is installed is pinned, in one place, for pip, conda and pre-commit alike."""

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


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def conda():
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_every_direct_dependency_is_pinned():
    extras = [name for extra in project()["optional-dependencies"].values() for name in extra]
    named = {canonical(re.match(r"[\w.-]+", name)[0]) for name in project()["dependencies"] + extras}
    assert named - {"kdlib"} == set(pins())  # `dev` includes other extras as kdlib[...]; no pin is left over


def test_conda_environment_takes_the_same_pins():
    pip = next(entry["pip"] for entry in conda() if isinstance(entry, dict))
    assert "--constraint constraints.txt" in pip and "--editable .[dev]" in pip
    own = [line for line in pip if "==" in line]
    assert all(pins()[canonical(PIN.match(line)[1])] == PIN.match(line)[2] for line in own)


def test_conda_and_pip_agree_on_python():
    python = next(entry for entry in conda() if isinstance(entry, str) and entry.startswith("python="))
    assert project()["requires-python"] == ">=" + python.removeprefix("python=")


def test_pre_commit_takes_the_same_pins():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    taken = {hook["repo"].rpartition("/")[2].removesuffix("-pre-commit"): hook["rev"] for hook in hooks}
    assert set(taken) == {"ruff", "nbstripout"}
    assert all(revision.removeprefix("v") == pins()[name] for name, revision in taken.items())


def test_the_licence_is_the_one_the_project_names():
    assert project()["license"] == "Apache-2.0" and project()["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_citation_names_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == project()["version"]
