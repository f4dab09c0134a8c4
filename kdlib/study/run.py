"""A run's folder: its profile, its stages and its table of results."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock, Timeout

from kdlib.config import Profile, load_profile
from kdlib.errors import UserError
from kdlib.files import new_file, read_json, write_json

# What a row says: `model` has `value` for `metric`, on `task` in `language`, got by `method`, in the ablation `arm`, at
# `layer`, as a function of `x` (rows, seconds, another layer); low and high bound a 95% interval over `n` test items.
COLUMNS = [
    "stage",
    "model",
    "language",
    "task",
    "metric",
    "value",
    "seed",
    "method",
    "arm",
    "layer",
    "x",
    "low",
    "high",
    "n",
]
TEXT_COLUMNS = ["stage", "model", "language", "task", "metric", "method", "arm"]
WHOLE_COLUMNS = ["seed", "layer", "n"]
KINDS: dict[Any, Any] = {c: str if c in TEXT_COLUMNS else "Int64" if c in WHOLE_COLUMNS else float for c in COLUMNS}


class Run:
    """A run's folder: its profile, the artefacts of its stages, and the table of results.

    Args:
        path: the folder; created if absent.
        profile: written to `profile.yaml`; None: read from there.

    Raises:
        UserError: when the folder cannot be written, is not a run, or holds a link to a place outside of it, through
            which a run would change files of others.
    """

    def __init__(self, path: str | Path, profile: Profile | None = None):
        self.path = Path(path)
        kept = self.path / "profile.yaml"
        try:
            _refuse_links_out(self.path)
            there = kept.is_file()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"run folder {str(path)!r}: cannot be read ({reason})") from None
        if profile is None:
            if not there:
                raise UserError(f"{self.path}: no run here (profile.yaml is missing)")
            profile = load_profile(kept)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; a run needs a folder")
        self.profile = profile
        text = yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True)
        if not there or kept.read_bytes() != text.encode():
            with new_file(kept) as path:
                path.write_text(text, "utf-8")

    def folder(self, name: str) -> Path:
        """A sub-folder, created if absent."""
        folder = self.path / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
        return folder

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock this folder against other commands. The lock ends with the process.

        Raises:
            UserError: when another command holds it.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.path}: another kdlib run is using this folder; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be locked ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()

    @property
    def results_file(self) -> Path:
        """The table of results."""
        return self.path / "results.csv"

    def results(self) -> pd.DataFrame:
        """The table of results, tidy, one number a row; empty before the first stage."""
        if not self.results_file.is_file():
            return pd.DataFrame(columns=COLUMNS)
        return read_results(self.results_file)

    def record(self, stage: str, rows: list[dict] | pd.DataFrame) -> pd.DataFrame:
        """Replace the rows of a stage in the table. Returns the new rows as a table.

        Args:
            stage: the stage.
            rows: with model, metric and value; language is the profile's by default.
        """
        table = pd.DataFrame(rows)
        table["stage"] = stage
        if "language" not in table:
            table["language"] = None
        table["language"] = table["language"].fillna(self.profile.target)
        table = table.reindex(columns=COLUMNS).astype(dict.fromkeys(WHOLE_COLUMNS, "Int64"))
        others = self.results()
        others = others[others["stage"] != stage]
        merged = table if others.empty else pd.concat([others, table], ignore_index=True)
        with new_file(self.results_file) as path:
            merged.to_csv(path, index=False)
        return read_results(self.results_file).query("stage == @stage").reset_index(drop=True)

    def done(self, stage: str, key: str) -> bool:
        """Whether `stage` finished with the same `key` (a fingerprint of all it depends on)."""
        try:
            return read_json(self.path / "stages" / f"{stage}.json").get("key") == key
        except UserError:
            return False

    def mark(self, stage: str, key: str, seconds: float, data: Mapping[str, str]) -> None:
        """Record that `stage` finished. `data`: fingerprints of what it read, by kind."""
        kept = {"key": key, "seconds": round(seconds, 1), "data": dict(data)}
        write_json(self.folder("stages") / f"{stage}.json", kept)

    def changed(self, stage: str, data: Mapping[str, str]) -> list[str]:
        """The kinds of data that changed since `stage` finished; none where it never finished."""
        try:
            before = read_json(self.path / "stages" / f"{stage}.json").get("data")
        except UserError:
            return []
        return [name for name in data if data[name] != before.get(name)] if isinstance(before, dict) else []


def _refuse_links_out(folder: Path) -> None:
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root):
                raise UserError(f"{path}: a link to outside the run folder; a run keeps its files inside")


def read_results(path: Path) -> pd.DataFrame:
    """Read a results.csv as a table. Raises UserError for another file."""
    try:
        table = pd.read_csv(path, dtype=KINDS, keep_default_na=False, na_values=[""])  # "nan" is a language, Min Nan
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a table of results ({str(error).splitlines()[0]})") from None
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(f"{path}: not a table of results (no column {', '.join(missing)})")
    return table


def project_folder() -> Path:
    """The current folder, or the project when that is its `notebooks/`, as in a notebook opened by hand.

    A folder of translations in `notebooks/` counts too. The first notebook beside it tells it from a project that is
    itself in a folder of that name.
    """
    here = Path.cwd()
    if here.parent.name == "notebooks" and (here.parent / "00_start_here.ipynb").is_file():
        here = here.parent
    return here.parent if here.name == "notebooks" else here


def run_folder(run_dir: str | Path | None, profile: str) -> Path:
    """The run folder of a notebook or command: `run_dir`, or runs/<profile>.

    Relative paths start at `project_folder()`.
    """
    return project_folder() / (run_dir or Path("runs") / (Path(profile).stem.strip(". ") or "profile"))


def copy_figures(run: Run, target: Path) -> list[Path]:
    """Copy a finished run's figures to `target`. Raises UserError where there are none."""
    files = sorted((run.path / "figures").glob("*.png"))
    if not files:
        raise UserError(f"{run.path}: no figures yet; finish the run first")
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(file, target / file.name)) for file in files]


def find_run(run_dir: str | Path | None, profile: str = "workshop", overrides: Any = ()) -> Run:
    """The run of a notebook: a profile by name with overrides; the folder is created if absent."""
    return Run(run_folder(run_dir, profile), load_profile(profile, overrides))
