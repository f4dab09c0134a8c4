"""Writes the install cell at the top of every notebook, and badges that open it on Binder, Colab and Kaggle.

The one setting is `repository` under [tool.kdlib] in pyproject.toml: the address that git clones, such as
https://github.com/OWNER/NAME. While it is empty there are no badges. Run `python docs/launch.py` after a change.
"""

import re
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
CELL = "install"  # id and tag of the install cell
MARK = "<!-- launch -->"  # begins the line of badges
INSTALL = """\
# {does}
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("kdlib") is None:
    here = next((folder for folder in {places} if (folder / "pyproject.toml").is_file()), None)
    source = f"{{here.resolve()}}[notebooks]" if here else "{packed}"
    if not source:
        raise SystemExit("{absent}: pip install '.[notebooks]'")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)
    importlib.invalidate_caches()"""
WORDS = {  # what the install cell says, by the folder of the notebooks: "" are the English ones
    "": {
        "does": "Installs the kit on Binder, Colab or Kaggle. Where it is installed, this does nothing.",
        "absent": "kdlib is not installed. In a checkout of the project",
    },
    "fil": {
        "does": "Ini-install ang kit sa Binder, Colab o Kaggle. Kung naka-install na ito, wala itong ginagawa.",
        "absent": "Hindi naka-install ang kdlib. Sa isang checkout ng proyekto",
    },
}


def repository() -> str:
    """The address of the project's repository; empty: it has none yet."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["kdlib"]["repository"].rstrip("/")


def install_source(address: str, language: str = "") -> str:
    """The code of the install cell for a repository's address, in a notebook of that folder."""
    places = 'map(Path, (".", "..", "../.."))' if language else '(Path(), Path(".."))'
    packed = f"kdlib[notebooks] @ git+{address}" if address else ""
    return INSTALL.format(packed=packed, places=places, **WORDS[language])


def badges(address: str, path: str) -> str:
    """A line of badges for a notebook at `path` of a repository on GitHub; empty for another address."""
    _, github, place = address.removesuffix(".git").partition("https://github.com/")
    if not github:
        return ""
    file = f"{place}/blob/main/{path}"
    links = {
        "Open in Binder": f"https://mybinder.org/v2/gh/{place}/main?urlpath=lab/tree/{path}",
        "Open in Colab": f"https://colab.research.google.com/github/{file}",
        "Open in Kaggle": f"https://kaggle.com/kernels/welcome?src=https://github.com/{file}",
    }
    return f"{MARK}{' · '.join(f'[{name}]({link})' for name, link in links.items())}"


def launchable(notebook: nbformat.NotebookNode, address: str, path: str) -> nbformat.NotebookNode:
    """The notebook with badges below its title, and the install cell after its first cell."""
    title = notebook.cells[0]
    title.source = re.sub(rf"\n\n{MARK}.*", "", title.source)
    if line := badges(address, path):
        first, _, rest = title.source.partition("\n")
        title.source = f"{first}\n\n{line}\n{rest}"
    cell = next((cell for cell in notebook.cells if cell.get("id") == CELL), None)
    if cell is None:
        cell = nbformat.v4.new_code_cell(id=CELL, metadata={"tags": [CELL, "hide-input"]})
        notebook.cells.insert(1, cell)
    cell.metadata.setdefault("jupyter", {})["source_hidden"] = True
    cell.source = install_source(address, "/".join(path.split("/")[1:-1]))
    return notebook


def notebooks(folder: Path) -> list[Path]:
    """The notebooks of a folder and, in its own folder for each language, their translations."""
    return [path for language in WORDS for path in sorted((folder / language).glob("*.ipynb"))]


def main(folder: Path) -> None:
    """Rewrite the notebooks of a folder, and their translations."""
    for path in notebooks(folder):
        name = path.relative_to(folder).as_posix()
        nbformat.write(launchable(nbformat.read(path, 4), repository(), f"notebooks/{name}"), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "notebooks")
