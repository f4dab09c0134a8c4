"""Rows from anywhere, and where they came from.

A hub data set, a file of one, a file from the web, a local folder, or a local txt, jsonl, csv, tsv or parquet file
(each also .gz); a zip of such files is read as a folder, in memory: nothing of it is ever written to disk.
"""

import gzip
import hashlib
import io
import json
import os
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow.parquet

from kdlib import hub
from kdlib.config import Corpus, Source, Task
from kdlib.errors import LONGEST, UserError

if TYPE_CHECKING:
    from datasets import Features

MOST_PACKED = 200  # text packs to a tenth of its size, seldom to a hundredth; what unpacks to more is a trap
MOST_COLUMNS = 10_000
PIECE = 2**23  # bytes of a file that are read at once
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(rf"hf://datasets/({HUB_ID.pattern})/(.+)")
ADDRESS = re.compile(r"https?://\S+")

T = TypeVar("T")
Spec = TypeVar("Spec", Corpus, Task)
Files = dict[str, Callable[[], Iterable[pd.DataFrame]]]  # what reads each file of a place in pieces, by its path there


@dataclass(frozen=True)
class Origin:
    """What was read. source: as the profile names it; revision: the commit, where a hub gives one; sha256: of the
    texts and labels as read, the same for the same rows in any kind of file; rows: how many each split has (documents,
    for a corpus); removed: training rows left out because their text stands in test; passed_over: the sources tried
    before, each with what was wrong."""

    source: str
    revision: str | None
    sha256: str
    rows: dict[str, int]
    removed: int = 0
    passed_over: tuple[str, ...] = ()


def digest(rows: Iterable[Any]) -> str:
    """sha256 of JSON-like rows, in order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(line(row))
    return total.hexdigest()


def line(row: Any) -> bytes:
    """A row as `digest` takes it in."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def first_of(spec: Spec, load: Callable[[Spec], T], what: str) -> tuple[T, tuple[str, ...]]:
    """`load` of the first place of `spec` that can be read, and why those before it could not.

    The places are the spec's own and its fallbacks; columns that a fallback does not name are the spec's. Raises the
    error of the only place, or one UserError with all of theirs.
    """
    places = [spec]
    for other in spec.fallbacks:
        columns = set(type(other).model_fields) - set(Source.model_fields) - {"test"}
        places.append(
            spec.model_copy(update={k: v for k, v in other if k not in columns or v is not None} | {"fallbacks": []})
        )
    failures: list[str] = []
    for place in places:
        try:
            return load(place), tuple(failures)
        except UserError as error:
            if len(places) == 1:
                raise
            why = str(error).removesuffix(hub.WAY_ON)
            failures.append(why if place.source in why else f"{place.source}: {why}")
    room = (LONGEST - len(what) - 120) // len(places)  # an error is cut in its middle; each place is to be told of
    listed = "; ".join(
        f"({number}) {why if len(why) <= room else why[: room - 4] + ' ...'}" for number, why in enumerate(failures, 1)
    )
    raise UserError(f"{what}: none of its {len(places)} sources can be read: {listed}{hub.WAY_ON}")


def embedded_rows(name: str) -> pd.DataFrame:
    """One of the files that come with the kit: documents, sentiment, dengue, entities or parallel."""
    return pd.read_json((resources.files("kdlib.data") / f"{name}.jsonl").open("rb"), lines=True, dtype=False)


def read_rows(source: Source, columns: list[str] = (), split: str | None = None) -> pd.DataFrame:
    """The rows of a source as a table: `read_table` without the commit."""
    return read_table(source, columns, split)[0]


def read_table(source: Source, columns: list[str] = (), split: str | None = None) -> tuple[pd.DataFrame, str | None]:
    """The rows of a source as a table, and the commit they are of, where a hub gives one.

    columns: those that must be there. split: overrides `source.split`; it may itself name a place. Of a folder or zip,
    the files whose path is or holds the split as a word are read; all, where none does and `split` is not given. A txt
    file gives a column `text`, a line a row, and a column `document` that counts the blocks between empty lines (the
    lines, where there are none). Raises UserError when the source is missing, empty, not what its name says, or lacks
    a column.
    """
    files, commit = _files(source)
    if split and _is_place(split) and split not in (files or ()):
        return read_table(Source(source=split, split="test"), columns)
    if files is None:
        rows, commit = hub.dataset(source.source, source.subset, split or source.split, source.revision)
        rows = _named(rows.to_pandas(), rows.features)
    else:
        rows = _join(_chosen(source, files, split))
    if rows.empty:
        raise UserError(f"{source.source}: no rows")
    _check_columns(source, columns, rows.columns)
    return rows, commit


def stream_rows(
    source: Source, columns: list[str] = (), whole: bool = False
) -> tuple[Iterator[dict[str, Any]], str | None]:
    """The rows of a source one by one, as `read_table` has them, fetched as they are asked for; and their commit.

    Files are read in pieces, none before its rows are asked for. Txt rows of different files have different documents.
    whole: all rows will be asked for. Then a hub data set is loaded first, into the hub's cache, and of several files a
    column has to be in one, as in `read_table`; else in each.
    """
    files, commit = _files(source)
    if files is None:
        rows, commit = hub.dataset(source.source, source.subset, source.split, source.revision, streaming=not whole)
        return _checked(source, columns, rows), commit
    chosen = _chosen(source, files, None)
    rows = (row for table in _apart(chosen) for row in table.to_dict("records"))
    return _checked(source, columns, rows, apart=whole and len(chosen) > 1), commit


def _checked(
    source: Source, columns: list[str], rows: Iterable[dict[str, Any]], apart: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows, which have to have the columns, each row or (apart) one of them."""
    there: dict[str, None] = {}
    try:
        for row in rows:
            if not apart:
                _check_columns(source, columns, row)
            elif not row.keys() <= there.keys():
                there |= dict.fromkeys(row)
            yield row
        if apart:
            _check_columns(source, columns, there)
    except UserError:
        raise
    except Exception as error:  # a stream can break anywhere, in a dozen ways
        raise UserError(f"{source.source}: reading stopped: {hub.reason(error)}{hub.WAY_ON}") from None


def _check_columns(source: Source, columns: list[str], there: Iterable[str]) -> None:
    missing = [column for column in columns if column not in there]
    if missing:
        raise UserError(
            f"{source.source}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, there))}"
        )


def _files(source: Source) -> tuple[Files | None, str | None]:
    """The files of a source, and the commit they are of; None for a hub data set, whose files its client picks."""
    name, commit = source.source, None
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path.is_dir, False for any name no file can have
        found = [file.relative_to(path) for file in sorted(path.rglob("*")) if suffix(file) and file.is_file()]
        found = [file for file in found if not any(part.startswith(".") for part in file.parts)]
        return {str(file): lambda file=file: pieces(path / file) for file in found}, None
    if match := HUB_FILE.fullmatch(name):
        path, commit = hub.file(*match.groups(), source.revision)
    elif ADDRESS.fullmatch(name):
        path = hub.fetch(name)
    elif not os.path.isfile(path) and not looks_local(name):
        if HUB_ID.fullmatch(name):
            return None, None
        raise UserError(f"{name!r}: no such file or folder, and not a hub id (owner/name)")
    if path.name.lower().endswith(".zip"):
        return _zip_files(path, name), commit
    return {"": lambda: pieces(path, name)}, commit


def local_state(source: Source) -> list[tuple[str, int, int]] | None:
    """What tells whether a local file, or those of a folder, are still what they were: names, sizes, times of change.
    None for what is not here."""
    path = Path(os.path.expanduser(source.source))
    if not os.path.exists(path):
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _zip_files(path: Path, name: str) -> Files:
    """The files in a zip, read in memory: what members are called never becomes a path on this machine."""
    if not os.path.isfile(path):
        raise UserError(f"{name}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except Exception as error:  # a damaged list of members fails in many ways
        raise UserError(f"{name}: not a readable zip ({hub.reason(error)})") from None
    for member in members:
        inside = PurePosixPath(member.filename.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{name}: holds {member.filename!r}, a link or a path to elsewhere; not read")
    hidden = re.compile(r"(^|/)(\.|__MACOSX/)")
    members = [m for m in members if suffix(Path(m.filename)) and not hidden.search(m.filename)]
    if sum(member.file_size for member in members) > min(hub.LARGEST, _most(path.stat().st_size)):
        raise UserError(
            f"{name}: its files are far larger than the zip, or have more than {hub.LARGEST / 2**30:.0f} GB"
        )

    def read(member: zipfile.ZipInfo) -> pd.DataFrame:
        where = f"{name}: {member.filename}"
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                data = b"".join(iter(lambda: stream.read(2**20), b""))  # no more than the size the member states
        except Exception as error:  # broken, encrypted, or packed in a way that Python has no way for
            raise UserError(f"{where}: cannot be unpacked ({hub.reason(error)})") from None
        return parse(member.filename, data, where, hub.LARGEST)

    return {m.filename: lambda member=m: [read(member)] for m in sorted(members, key=lambda m: m.filename)}


def _chosen(source: Source, files: Files, split: str | None) -> Files:
    """The files of a folder or zip that `split` names, else the source's split, else all; a single file as it is."""
    if list(files) == [""]:
        if split:
            raise UserError(f"{source.source}: a file has no split {split!r}; name the file with the test rows")
        return files
    wanted = split or source.split
    word = re.compile(rf"(?<![^\W\d_]){re.escape(wanted)}(?![^\W\d_])")
    found = [name for name in files if name == wanted] or [name for name in files if word.search(name)]
    if not found and not split:
        found = list(files)
    if not found:
        named = f" with {split!r} in their name" if split else ""
        raise UserError(f"{source.source}: no {', '.join(SUFFIXES)} files{named} in it")
    return {name: files[name] for name in found}


def _apart(files: Files) -> Iterator[pd.DataFrame]:
    """The tables of files, each read when its turn comes; documents of txt files stay apart."""
    documents = 0
    for name, read in files.items():
        before = documents
        for rows in read():
            if suffix(Path(name)) == ".txt" and len(rows):
                rows["document"] += before
                documents = rows["document"].max() + 1
            yield rows


def _join(files: Files) -> pd.DataFrame:
    return pd.concat(_apart(files), ignore_index=True)


def suffix(path: Path) -> str | None:
    """The kind of file by its name, without a .gz behind it; None if it is none we read."""
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def looks_local(name: str) -> bool:
    """Whether a name is a file's or folder's here: it has the ending of one, or starts as a path does."""
    return suffix(Path(name)) is not None or name.lower().endswith(".zip") or name.startswith((".", "/", "~"))


def _is_place(split: str) -> bool:
    return bool(HUB_FILE.fullmatch(split) or ADDRESS.fullmatch(split)) or looks_local(split)


def read_file(path: Path, name: str | None = None) -> pd.DataFrame:
    """One local file as a table; `name` is what errors call it, if it is not to be its path."""
    path = Path(os.path.expanduser(path))
    where = name or str(path)
    if not os.path.isfile(path) and suffix(path):
        raise UserError(f"{where}: no such file")
    try:
        return parse(path.name, path.read_bytes() if suffix(path) else b"", where)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None


def pieces(path: Path, name: str | None = None) -> Iterator[pd.DataFrame]:
    """`read_file` for files of any size: a table for each PIECE of bytes or so.

    Txt files of more than that are cut at empty lines, where they have any.
    """
    path = Path(os.path.expanduser(path))
    packed, kind, where = path.name.lower().endswith(".gz"), suffix(path), name or str(path)
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    if size * (8 if packed else 1) <= PIECE or (packed and kind == ".parquet"):
        yield read_file(path, name)
        return
    most = _most(size) if packed else sys.maxsize
    try:
        if kind == ".parquet":
            yield from _parquet_pieces(path, _most(size))
            return
        with gzip.open(path) if packed else open(path, "rb") as file:
            file = _Limited(file, most, where)
            if kind in (".csv", ".tsv"):
                yield from _csv_pieces(file, "," if kind == ".csv" else "\t")
            else:
                yield from _line_pieces(file, kind, where)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    except Exception as error:
        raise UserError(f"{where}: not a readable {kind} file ({hub.reason(error)})") from None


class _Limited(io.RawIOBase):
    """A binary file that is read up to `most` bytes; more is refused, as NUL bytes are."""

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


def _line_pieces(file: io.RawIOBase, kind: str, where: str) -> Iterator[pd.DataFrame]:
    line, documents = 1, 0
    for data in _cut(file, kind):
        rows = parse(kind, data, f"{where}, from line {line:,} on")
        if kind == ".txt" and len(rows):
            rows["document"] += documents
            documents = rows["document"].max() + 1
        yield rows
        line += data.count(b"\n")


def _cut(file: io.RawIOBase, kind: str) -> Iterator[bytes]:
    """The bytes of a file in pieces that end with a line; in a txt file before an empty one, if there is any."""
    stream, held = io.BufferedReader(file, 2**20), []
    while data := stream.read(PIECE):
        breaks = [data.rfind(b"\n\n"), data.rfind(b"\n\r\n")] if kind == ".txt" else [-1]
        end = 1 + (max(breaks) if max(breaks) >= 0 else data.rfind(b"\n"))
        if end:
            yield b"".join([*held, data[:end]])
            held = []
        held.append(data[end:])
    if rest := b"".join(held):
        yield rest


def _csv_pieces(file: io.RawIOBase, separator: str) -> Iterator[pd.DataFrame]:
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


def _parquet_pieces(path: Path, most: int) -> Iterator[pd.DataFrame]:
    with pyarrow.parquet.ParquetFile(path) as file:
        size = 0
        for batch in _batches(file, 8192):
            size += batch.nbytes
            if size > most:
                raise ValueError(f"has more than {most:,} bytes when unpacked")
            yield _frame(pyarrow.Table.from_batches([batch], file.schema_arrow))


def parse(name: str, data: bytes, where: str, limit: int | None = None) -> pd.DataFrame:
    """The rows in the bytes of a file of the kind that `name` ends in; `where` is what errors call it.

    Every column of a csv or tsv file is str; classes in a parquet file that `datasets` wrote have their names; NUL
    bytes are refused in text files. limit: bytes that a .gz file may have at most when unpacked; without one, too, what
    unpacks to far more than it is (MOST_PACKED) is refused.
    """
    kind = suffix(Path(name))
    if kind is None:
        raise UserError(f"{where}: cannot read this kind of file; known are {', '.join(SUFFIXES)}, each also .gz")
    try:
        if name.lower().endswith(".gz"):
            most = min(_most(len(data)), limit or sys.maxsize)
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


def _most(packed: int) -> int:
    """How many bytes so many packed bytes may unpack to."""
    return 2**26 + MOST_PACKED * packed


def _read_parquet(data: bytes) -> pd.DataFrame:
    file, batches, size = pyarrow.parquet.ParquetFile(io.BytesIO(data)), [], 0
    for batch in _batches(file, 1024):
        batches.append(batch)
        size += batch.nbytes
        if size > _most(len(data)):
            raise ValueError(f"has more than {_most(len(data)):,} bytes when unpacked")
    return _frame(pyarrow.Table.from_batches(batches, file.schema_arrow))


def _batches(file: pyarrow.parquet.ParquetFile, rows: int) -> Iterator[pyarrow.RecordBatch]:
    if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
        raise ValueError("two of its columns have the same name")
    for batch in file.iter_batches(rows):
        batch.validate(full=True)  # text that is no UTF-8 would fail later, wherever it is first looked at
        yield batch


def _frame(table: pyarrow.Table) -> pd.DataFrame:
    rows = table.to_pandas(ignore_metadata=True)
    if b"huggingface" not in (table.schema.metadata or {}):
        return rows
    from datasets import Features

    return _named(rows, Features.from_arrow_schema(table.schema))


def _named(rows: pd.DataFrame, features: "Features") -> pd.DataFrame:
    """The rows with the names of classes, which are stored as numbers; None for a number without a name."""
    for column, kind in features.items():
        names = getattr(getattr(kind, "feature", kind), "names", None)
        if names:

            def name(value: Any) -> str | None:
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
                json.dumps(row, ensure_ascii=False).encode()  # half an emoji is no text, and no tokenizer takes it
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
    """Whether a table of so many values would be all but empty, and immense."""
    return columns * rows > 2**24 + 100 * values


def _read_csv(text: str, separator: str = ",") -> pd.DataFrame:
    columns = 1 + re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0].count(separator)
    if columns > MOST_COLUMNS:  # pandas takes minutes to tell so many names apart
        raise ValueError(f"its first line has {columns:,} columns")
    lines = text.count("\n") + text.count("\r")
    if _sparse(columns, lines, lines + text.count(separator)):
        raise ValueError(f"its first line has {columns:,} columns, most others far fewer")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would be cut
        return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)


def _read_tsv(text: str) -> pd.DataFrame:
    return _read_csv(text, "\t")
