"""Builds the book: the executed notebooks of a run and the pages of this folder, as a site that needs no network.

python docs/book.py --run runs/workshop --out build/book
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import nbformat
from sphinx.cmd.build import build_main

from kdlib.errors import UserError
from kdlib.files import new_folder
from kdlib.study.run import Run
from kdlib.study.runner import NotebookError, execute, notebook_folder

ROOT = Path(__file__).parents[1]
FIRST = ("00_start_here.ipynb", "fil/00_magsimula_rito.ipynb")  # no stages of a run, so they run for the book
OTHERS = ("README.md", "LICENSE", "CONTRIBUTING.md", "kdlib/data/bundled/README.md")  # pages link to them


def executed(run: Run) -> list[Path]:
    """The executed notebooks of a run in order, with the first ones: those are executed here if absent."""
    folder = run.path / "notebooks"
    if len(list(folder.glob("0*.ipynb"))) < 2:
        raise UserError(f"{folder}: no executed notebooks; finish the run first: kdlib run --out {run.path}")
    for first in FIRST:
        if not (folder / first).is_file():
            from rich.console import Console

            (folder / first).parent.mkdir(exist_ok=True)
            given = {"profile": str(run.path.resolve() / "profile.yaml"), "run_dir": str(run.path.resolve())}
            execute(notebook_folder() / first, folder / first, given, Console())
    english, others = sorted(folder.glob("0*.ipynb")), sorted(folder.glob("[!.]*/0*.ipynb"))
    return sorted([*english, *others], key=lambda path: path.name.partition("_")[0])  # a translation after its original


def for_book(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with links to the book's pages, and with folded code where the notebook folds it."""
    for cell in notebook.cells:
        cell.source = re.sub(r"(\]\((?:\.\./)+)docs/", r"\1", cell.source)
        outside = "](path:../../../CONTRIBUTING.md"  # no page of the book: a file to download, one folder deeper
        cell.source = cell.source.replace("](../../CONTRIBUTING.md", outside)
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata.tags = list(dict.fromkeys([*cell.metadata.get("tags", []), "hide-input"]))
    return notebook


def stage(run: Run, folder: Path) -> Path:
    """Put together what Sphinx reads, in the layout of the project. Returns the folder of the pages."""
    pages = folder / "docs"
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("book.py", "parameters.py", "__pycache__"))
    shutil.copytree(ROOT / "figures", folder / "figures")
    for name in OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    notebooks = {path: path.relative_to(run.path).with_suffix("") for path in executed(run)}
    for path, name in notebooks.items():
        (pages / name).parent.mkdir(exist_ok=True)
        nbformat.write(for_book(nbformat.read(path, 4)), pages / f"{name}.ipynb")
    index = pages / "index.md"
    names = "\n".join(name.as_posix() for name in notebooks.values())
    shown = f"run `{run.path.name}`: profile `{run.profile.name}`, language `{run.profile.language}`"
    made = f"The notebooks show the {shown}."
    toctree = f"{made}\n\n```{{toctree}}\n:maxdepth: 1\n:caption: Notebooks\n\n{names}\n```\n\n"
    index.write_text(index.read_text("utf-8").replace("```{toctree}", f"{toctree}```{{toctree}}", 1), "utf-8")
    return pages


def main(run: Path, out: Path) -> int:
    """Build the book of a run. Returns Sphinx's exit code."""
    source = out.with_name(out.name + "-source")
    with new_folder(source) as work:
        stage(Run(run), work)
    return build_main(["--quiet", str(source / "docs"), str(out)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/workshop"))
    parser.add_argument("--out", type=Path, default=Path("build/book"))
    given = parser.parse_args()
    try:
        sys.exit(main(given.run, given.out))
    except (UserError, NotebookError) as error:
        sys.exit(f"book: {error}")
