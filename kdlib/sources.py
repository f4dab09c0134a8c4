"""Rows from anywhere.

A hub data set, a local folder, or a local txt, jsonl, csv, tsv or parquet file (each also .gz).
"""

import gzip
import io
import json
import os
import re
import warnings
from importlib import resources
from pathlib import Path

import numpy as np
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
    for a local source it may itself be a file. Of a folder, the files named after the split are read; all, where none
    is and `split` is not given. A txt file gives a column `text`, a line a row, and a column `document` that counts the
    blocks between empty lines (the lines, where there are none). Raises UserError when the source is missing, empty,
    not what its name says, or lacks a column.
    """
    name = split if split and looks_local(split) else source.source
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path.is_dir, False for any name no file can have
        wanted = None if split == name else split
        rows = _read_folder(path, wanted or source.split, must=bool(wanted))
    elif os.path.isfile(path) or looks_local(name):
        rows = read_file(path)
    elif HUB_ID.fullmatch(name):
        rows = _read_hub(source, split or source.split)
    else:
        raise UserError(f"{name!r}: no such file or folder, and not a hub id (owner/name)")
    if rows.empty:
        raise UserError(f"{name}: no rows")
    missing = [column for column in columns if column not in rows.columns]
    if missing:
        raise UserError(
            f"{name}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, rows.columns))}"
        )
    return rows


def suffix(path: Path) -> str | None:
    """The kind of file by its name, without a .gz behind it; None if it is none we read."""
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def looks_local(name: str) -> bool:
    return suffix(Path(name)) is not None or name.startswith((".", "/", "~"))


def _read_folder(folder: Path, split: str, must: bool) -> pd.DataFrame:
    """The files named after `split`; all, where none is and it is no `must`. Documents of txt files stay apart."""
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if suffix(file) and file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    word = re.compile(rf"(?<![^\W\d_]){re.escape(split)}(?![^\W\d_])")
    chosen = [file for file in files if word.search(str(file))] or (files if not must else [])
    if not chosen:
        named = f" with {split!r} in their name" if must else ""
        raise UserError(f"{folder}: no {', '.join(SUFFIXES)} files{named} in this folder")
    tables, documents = [], 0
    for file in chosen:
        rows = read_file(folder / file)
        if suffix(file) == ".txt" and len(rows):
            rows["document"] += documents
            documents = rows["document"].max() + 1
        tables.append(rows)
    return pd.concat(tables, ignore_index=True)


def read_file(path: Path) -> pd.DataFrame:
    """One local file as a table; every column of a csv or tsv file is str, NUL bytes are refused in text files."""
    path = Path(os.path.expanduser(path))
    kind = suffix(path)
    if kind is None:
        raise UserError(f"{path}: cannot read this kind of file; known are {', '.join(SUFFIXES)}, each also .gz")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
        if kind == ".parquet":
            return pd.read_parquet(io.BytesIO(data))
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise UserError(f"{path}: holds NUL bytes: not a text file")
        return {".txt": _read_text, ".jsonl": _read_json_lines, ".csv": _read_csv, ".tsv": _read_tsv}[kind](text)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except Exception as error:  # the readers raise a dozen kinds; people need one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable {kind} file ({reason})") from None


def _read_text(text: str) -> pd.DataFrame:
    lines = [line.strip() for line in text.strip().splitlines()]
    blocks = "" in lines
    rows, document = [], 0
    for line in lines:
        if line:
            rows.append((line, document))
        document += not (line and blocks)
    return pd.DataFrame(rows, columns=["text", "document"])


def _read_json_lines(text: str) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # half an emoji is no text, and no tokenizer takes it
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: not an object of names and values")
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def _read_csv(text: str, separator: str = ",") -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would be cut
        return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)


def _read_tsv(text: str) -> pd.DataFrame:
    return _read_csv(text, "\t")


def _read_hub(source: Source, split: str) -> pd.DataFrame:
    import datasets

    try:
        rows = datasets.load_dataset(source.source, source.subset, split=split, revision=source.revision)
        table = rows.to_pandas()
        for column, kind in rows.features.items():  # classes are stored as numbers; take their names
            names = getattr(getattr(kind, "feature", kind), "names", None)
            if names:

                def name(value):
                    return names[int(value)] if 0 <= value < len(names) else None

                table[column] = [[name(v) for v in cell] if np.ndim(cell) else name(cell) for cell in table[column]]
        return table
    except Exception as error:  # the client raises a dozen kinds; the reader needs one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"hub data set {source.source!r} (split {split!r}) could not be loaded: {reason}. "
            "Offline? Use source=embedded or a local file."
        ) from None
