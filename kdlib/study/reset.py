"""Restore the notebooks and the prepared run. Nothing is deleted."""

import shutil
import subprocess
import time
from pathlib import Path

from kdlib.errors import UserError

WORK = ("notebooks", "runs")
HANDOUT = "handout"  # in an offline bundle: the notebooks and a finished small run
ASIDE = "set_aside"


def reset(folder: Path) -> Path | None:
    """Move `notebooks/` and `runs/` to `set_aside/<date and time>/`, and restore fresh copies.

    Notebooks come from `handout/`, or from the last commit of a git checkout, which has no runs.

    Args:
        folder: a checkout, or an unpacked offline bundle.

    Returns:
        The folder with what was there before; None where nothing was.

    Raises:
        UserError: before anything is moved, where there are no fresh copies; and where a folder cannot be written.
    """
    handout = folder / HANDOUT
    if not (handout / "notebooks").is_dir() and not _git(folder, "cat-file", "-e", "HEAD:./notebooks"):
        what = f"an unpacked bundle (with {HANDOUT}/) or a git checkout of the project"
        raise UserError(f"{folder.resolve()}: is not {what}; nothing was moved")
    there = [folder / name for name in WORK if (folder / name).exists()]
    aside = folder / ASIDE / time.strftime("%Y-%m-%d_%H%M%S")
    try:
        if there:
            aside.mkdir(parents=True)
        for path in there:
            path.rename(aside / path.name)
        if handout.is_dir():
            for path in handout.iterdir():
                shutil.copytree(path, folder / path.name)
        elif not _git(folder, "restore", "--source=HEAD", "--worktree", "--", "notebooks"):
            raise UserError(f"git could not restore {folder / 'notebooks'}; what was there is in {aside}")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: could not be reset ({reason}); what was moved is in {aside}") from None
    return aside if there else None


def _git(folder: Path, *arguments: str) -> bool:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True).returncode == 0
    except OSError:
        return False
