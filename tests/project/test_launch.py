"""The install cell and the badges of the notebooks."""

import importlib.util
import subprocess
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
ADDRESS, PATH = "https://github.com/owner/name", "notebooks/x.ipynb"


@pytest.fixture(scope="module")
def launch():
    spec = importlib.util.spec_from_file_location("launch", ROOT / "docs" / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def notebook():
    title, code = nbformat.v4.new_markdown_cell("# Title\n\nText."), nbformat.v4.new_code_cell("1 + 1")
    return nbformat.v4.new_notebook(cells=[title, code])


def test_without_an_address_there_is_an_install_cell_and_no_badge(launch, notebook):
    found = launch.launchable(notebook, "", PATH)
    nbformat.validate(found)
    assert [cell.source.split("\n")[0][:7] for cell in found.cells] == ["# Title", "# Insta", "1 + 1"]
    assert found.cells[0].source == "# Title\n\nText." and "git+" not in found.cells[1].source
    assert launch.badges("https://example.org/owner/name", PATH) == ""


def test_badges_name_the_repository_and_go_again_with_it(launch, notebook):
    once = nbformat.writes(launch.launchable(notebook, ADDRESS, PATH))
    assert nbformat.writes(launch.launchable(notebook, ADDRESS + ".git", PATH)).count("Open in") == 3
    assert nbformat.writes(launch.launchable(notebook, ADDRESS, PATH)) == once  # twice is as once
    assert notebook.cells[0].source.startswith(f"# Title\n\n{launch.MARK}[Open in Binder](") and "name/main?" in once
    assert "colab.research.google.com/github/owner/name/blob/main/notebooks/x.ipynb" in once
    assert f"git+{ADDRESS}" in notebook.cells[1].source and len(notebook.cells) == 3
    launch.launchable(notebook, "", PATH)
    assert notebook.cells[0].source == "# Title\n\nText."


def test_install_cell_does_nothing_where_the_kit_is_installed(launch, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it installs something"))
    exec(launch.install_source(ADDRESS), {})


def test_install_cell_installs_the_checkout_else_the_repository(launch, monkeypatch, tmp_path):
    installed = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: installed.append(command[-1]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "elsewhere" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "notebooks")
    exec(launch.install_source(ADDRESS), {})
    with pytest.raises(SystemExit, match="kdlib is not installed"):
        exec(launch.install_source(""), {})
    (tmp_path / "elsewhere" / "pyproject.toml").write_text("")
    exec(launch.install_source(""), {})
    (tmp_path / "elsewhere" / "notebooks" / "fil").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / "notebooks" / "fil")
    exec(launch.install_source("", "fil"), {})
    checkout = f"{tmp_path / 'elsewhere'}[notebooks]"
    assert installed == [f"kdlib[notebooks] @ git+{ADDRESS}", checkout, checkout]


def test_notebooks_of_the_project_have_the_current_install_cell(launch):
    """Change it in docs/launch.py, or the address in pyproject.toml, then run docs/launch.py."""
    paths = launch.notebooks(ROOT / "notebooks")
    assert {path.parent.name for path in paths} == {"notebooks", "fil"}
    for path in paths:
        notebook = nbformat.read(path, 4)
        before = nbformat.writes(notebook)
        name = path.relative_to(ROOT).as_posix()
        assert nbformat.writes(launch.launchable(notebook, launch.repository(), name)) == before, path
