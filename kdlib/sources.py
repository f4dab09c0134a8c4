"""Rows from anywhere: a hub data set, a local folder, or a local txt, jsonl, csv, tsv or parquet file (each also .gz)."""

import re
from importlib import resources
from pathlib import Path

import pandas as pd

from kdlib.config import Source
from kdlib.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def embedded_rows(name: str) -> pd.DataFrame:
    """One of the files that come with the kit: documents, sentiment, dengue, entities or parallel."""
    return pd.read_json((resources.files("kdlib.data") / f"{name}.jsonl").open("rb"), lines=True, dtype=False)


def read_rows(source: Source, columns: list[str] = (), split: str | None = None) -> pd.DataFrame:
    """The rows of a source as a table.

    source: a local file or folder, or a hub id. columns: those that must be there. split: overrides `source.split`;
    for a local source it may itself be a file. A txt file gives a column `text`, a line a row, and a column
    `document` that counts the blocks between empty lines. Raises UserError when the source is missing, empty, not what its name says,
    or lacks a column.
    """
    path = Path(source.source)
    name = source.source
    if split and looks_local(split):
        path, name = Path(split), split
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if suffix(file) and (not split or split in file.name)]
        if not files:
            named = f" with {split!r} in their name" if split else ""
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} files{named} in this folder")
        rows = pd.concat([read_file(file) for file in files], ignore_index=True)
    elif path.is_file() or looks_local(name):
        rows = read_file(path)
    elif HUB_ID.fullmatch(name):
        rows = _read_hub(source, split or source.split)
    else:
        raise UserError(f"{name!r}: no such file or folder, and not a hub id (owner/name)")
    missing = [column for column in columns if column not in rows.columns]
    if missing:
        raise UserError(f"{name}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, rows.columns))}")
    if rows.empty:
        raise UserError(f"{name}: no rows")
    return rows


def suffix(path: Path) -> str | None:
    """The kind of file by its name, without a .gz behind it; None if it is none we read."""
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def looks_local(name: str) -> bool:
    return suffix(Path(name)) is not None or name.startswith((".", "/", "~"))


def read_file(path: Path) -> pd.DataFrame:
    """One local file as a table; all text columns are str, NUL bytes refused."""
    path = Path(path).expanduser()
    kind = suffix(path)
    if kind is None:
        raise UserError(f"{path}: cannot read this kind of file; known are {', '.join(SUFFIXES)}, each also .gz")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        match kind:
            case ".txt":
                return _read_text(path)
            case ".jsonl":
                rows = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
            case ".csv" | ".tsv":
                rows = pd.read_csv(path, sep="," if kind == ".csv" else "\t", keep_default_na=False, encoding="utf-8")
            case ".parquet":
                rows = pd.read_parquet(path)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except (OSError, ValueError, EOFError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: not a readable {kind} file ({str(error).splitlines()[0]})") from None
    return rows


def _read_text(path: Path) -> pd.DataFrame:
    lines = pd.io.common.get_handle(path, "r", compression="infer", encoding="utf-8")
    with lines as handle:
        text = handle.handle.read()
    if "\0" in text:
        raise UserError(f"{path}: holds NUL bytes: not a text file")
    rows, document = [], 0
    for line in text.splitlines():
        if line.strip():
            rows.append((line.strip(), document))
        else:
            document += 1
    return pd.DataFrame(rows, columns=["text", "document"])


def _read_hub(source: Source, split: str) -> pd.DataFrame:
    import datasets

    try:
        return datasets.load_dataset(source.source, source.subset, split=split, revision=source.revision).to_pandas()
    except Exception as error:  # the client raises a dozen kinds; the reader needs one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"hub data set {source.source!r} (split {split!r}) could not be loaded: {reason}. "
            "Offline? Use source=embedded or a local file."
        ) from None
