"""Read files: txt, jsonl, csv, tsv and parquet, each also .gz, whole or in chunks."""

import gzip
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet

from kdlib.data import hub
from kdlib.errors import UserError

if TYPE_CHECKING:
    from datasets import Features

MOST_PACKED = 200  # text shrinks to a tenth, rarely to a hundredth; a file that unpacks to more may be an attack
MOST_COLUMNS = 10_000
CHUNK = 2**23  # bytes of a file that are read at once
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


def suffix(path: Path) -> str | None:
    """The kind of a file by its name, without .gz; None for a kind that is not read."""
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def read_file(path: Path, name: str | None = None) -> pd.DataFrame:
    """Read a local file as a table. `name` replaces its path in errors."""
    path = Path(os.path.expanduser(path))
    where = name or str(path)
    if not os.path.isfile(path) and suffix(path):
        raise UserError(f"{where}: no such file")
    try:
        return parse(path.name, path.read_bytes() if suffix(path) else b"", where)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None


def chunks(path: Path, name: str | None = None) -> Iterator[pd.DataFrame]:
    """Read a file of any size as tables of about PIECE bytes. Txt files are split at empty lines, if they have any."""
    path = Path(os.path.expanduser(path))
    packed, kind, where = path.name.lower().endswith(".gz"), suffix(path), name or str(path)
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    if size * (8 if packed else 1) <= CHUNK or (packed and kind == ".parquet"):
        yield read_file(path, name)
        return
    most = unpacked_limit(size) if packed else sys.maxsize
    try:
        if kind == ".parquet":
            yield from _parquet_parts(path, unpacked_limit(size))
            return
        with gzip.open(path) if packed else open(path, "rb") as file:
            file = _Limited(file, most, where)
            if kind in (".csv", ".tsv"):
                yield from _csv_parts(file, "," if kind == ".csv" else "\t")
            else:
                yield from _line_parts(file, kind, where)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    except Exception as error:
        raise UserError(f"{where}: not a readable {kind} file ({hub.reason(error)})") from None


class _Limited(io.RawIOBase):
    """A binary file of at most `most` bytes. Larger files and NUL bytes are refused."""

    def __init__(self, file: Any, most: int, where: str):
        self.file, self.most, self.where, self.done = file, most, where, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)
        self.done += count
        if self.done > self.most:
            raise UserError(f"{self.where}: has more than {self.most:,} bytes when unpacked; not read")
        if b"\0" in bytes(buffer[:count]):
            raise UserError(f"{self.where}: holds NUL bytes: not a text file")
        return count


def _line_parts(file: io.RawIOBase, kind: str, where: str) -> Iterator[pd.DataFrame]:
    line, documents = 1, 0
    for data in _cut(file, kind):
        rows = parse(kind, data, f"{where}, from line {line:,} on")
        if kind == ".txt" and len(rows):
            rows["document"] += documents
            documents = rows["document"].max() + 1
        yield rows
        line += data.count(b"\n")


def _cut(file: io.RawIOBase, kind: str) -> Iterator[bytes]:
    """The bytes of a file in chunks that end with a line; in a txt file before an empty one, if there is any."""
    stream, held = io.BufferedReader(file, 2**20), []
    while data := stream.read(CHUNK):
        breaks = [data.rfind(b"\n\n"), data.rfind(b"\n\r\n")] if kind == ".txt" else [-1]
        end = 1 + (max(breaks) if max(breaks) >= 0 else data.rfind(b"\n"))
        if end:
            yield b"".join([*held, data[:end]])
            held = []
        held.append(data[end:])
    if rest := b"".join(held):
        yield rest


def _csv_parts(file: io.RawIOBase, separator: str) -> Iterator[pd.DataFrame]:
    stream = io.BufferedReader(file, 2**20)
    columns = 1 + re.split(rb"[\r\n]", stream.peek().lstrip(b"\r\n"), maxsplit=1)[0].count(separator.encode())
    if columns > MOST_COLUMNS:
        raise ValueError(f"its first line has {columns:,} columns")
    rows = max(1, min(20_000, 2**20 // columns))
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would be cut
        yield from pd.read_csv(
            io.TextIOWrapper(stream, "utf-8-sig"), sep=separator, dtype=str, keep_default_na=False, index_col=False,
            chunksize=rows,
        )  # fmt: skip


def _parquet_parts(path: Path, most: int) -> Iterator[pd.DataFrame]:
    with pyarrow.parquet.ParquetFile(path) as file:
        size = 0
        for batch in _batches(file, 8192):
            size += batch.nbytes
            if size > most:
                raise ValueError(f"has more than {most:,} bytes when unpacked")
            yield _frame(pyarrow.Table.from_batches([batch], file.schema_arrow))


def parse(name: str, data: bytes, where: str, limit: int | None = None) -> pd.DataFrame:
    """Parse the bytes of a file.

    Columns of csv and tsv files are str. Classes in a parquet file of `datasets` get their names.

    Args:
        name: the file's name; its suffix says the kind.
        data: the bytes.
        where: the file's name in errors.
        limit: bytes that a .gz file may unpack to. Without it, a file that unpacks to more than MOST_PACKED times its
            size is refused too.

    Raises:
        UserError: for bytes that are no such file, or a text file with NUL bytes.
    """
    kind = suffix(Path(name))
    if kind is None:
        raise UserError(f"{where}: cannot read this kind of file; supported are {', '.join(SUFFIXES)}, each also .gz")
    try:
        if name.lower().endswith(".gz"):
            most = min(unpacked_limit(len(data)), limit or sys.maxsize)
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                data = packed.read(most + 1)
            if len(data) > most:
                raise UserError(f"{where}: has more than {most:,} bytes when unpacked; not read")
        if kind == ".parquet":
            return _read_parquet(data)
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise UserError(f"{where}: holds NUL bytes: not a text file")
        return {".txt": _read_text, ".jsonl": _read_json_lines, ".csv": _read_csv, ".tsv": _read_tsv}[kind](text)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    except Exception as error:  # the readers raise a dozen kinds; people need one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: not a readable {kind} file ({reason})") from None


def unpacked_limit(packed: int) -> int:
    """The number of bytes that so many packed bytes may unpack to."""
    return 2**26 + MOST_PACKED * packed


def _read_parquet(data: bytes) -> pd.DataFrame:
    file, batches, size = pyarrow.parquet.ParquetFile(io.BytesIO(data)), [], 0
    for batch in _batches(file, 1024):
        batches.append(batch)
        size += batch.nbytes
        if size > unpacked_limit(len(data)):
            raise ValueError(f"has more than {unpacked_limit(len(data)):,} bytes when unpacked")
    return _frame(pyarrow.Table.from_batches(batches, file.schema_arrow))


def _batches(file: pyarrow.parquet.ParquetFile, rows: int) -> Iterator[pyarrow.RecordBatch]:
    if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
        raise ValueError("two of its columns have the same name")
    for batch in file.iter_batches(rows):
        batch.validate(full=True)  # invalid UTF-8 would fail later, at an unrelated place
        yield batch


def _frame(table: pyarrow.Table) -> pd.DataFrame:
    rows = table.to_pandas(ignore_metadata=True)
    if b"huggingface" not in (table.schema.metadata or {}):
        return rows
    from datasets import Features

    return with_class_names(rows, Features.from_arrow_schema(table.schema))


def with_class_names(rows: pd.DataFrame, features: "Features") -> pd.DataFrame:
    """The rows with names instead of the numbers of classes; None for a number without a name."""
    for column, kind in features.items():
        names = getattr(getattr(kind, "feature", kind), "names", None)
        if names:

            def name(value: Any, names: list[str] = names) -> str | None:
                return names[int(value)] if value is not None and 0 <= value < len(names) else None

            rows[column] = [[name(v) for v in cell] if np.ndim(cell) else name(cell) for cell in rows[column]]
    return rows


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
                json.dumps(row, ensure_ascii=False).encode()  # tokenizers refuse half an emoji (a lone surrogate)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: not an object of names and values")
        rows.append(row)
    names = {name for row in rows for name in row}
    if _sparse(len(names), len(rows), sum(map(len, rows))):
        raise ValueError(f"{len(names):,} different names in {len(rows):,} rows, most of them in few")
    return pd.DataFrame(rows, dtype=object)


def _sparse(columns: int, rows: int, values: int) -> bool:
    """Whether a table with so many values would be huge and almost empty."""
    return columns * rows > 2**24 + 100 * values


def _read_csv(text: str, separator: str = ",") -> pd.DataFrame:
    columns = 1 + re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0].count(separator)
    if columns > MOST_COLUMNS:  # pandas needs minutes for so many column names
        raise ValueError(f"its first line has {columns:,} columns")
    lines = text.count("\n") + text.count("\r")
    if _sparse(columns, lines, lines + text.count(separator)):
        raise ValueError(f"its first line has {columns:,} columns, most others far fewer")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would be cut
        return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)


def _read_tsv(text: str) -> pd.DataFrame:
    return _read_csv(text, "\t")
