"""Read files of text, tables and tagged words, in parts or whole.

A file is opened, unpacked, limited and decoded in one place, `tables`. A kind of file is one row in TEXT or in BINARY.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from kdlib.data import hub, wikipedia
from kdlib.errors import UserError

if TYPE_CHECKING:
    from datasets import Features

MOST_PACKED = 200  # text shrinks to a tenth, rarely to a hundredth; a file that unpacks to more may be an attack
MOST_COLUMNS = 10_000
CHUNK = 2**23  # characters of a file that are read at once
PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file), "zstd"),
}


def suffix(path: Path) -> str | None:
    """The kind of a file by its name, without .gz and the like; None for a kind that is not read."""
    name = path.name.lower().removesuffix(_packing(path.name) or "")
    return next((kind for kind in SUFFIXES if name.endswith(kind)), None)


def _packing(name: str) -> str | None:
    return next((end for end in PACKED if name.lower().endswith(end)), None)


def read_file(path: Path, name: str | None = None) -> pd.DataFrame:
    """Read a local file as a table. `name` replaces its path in errors."""
    return joined(chunks(path, name))


def joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The parts as one table; an empty one where there are none."""
    return pd.concat([pd.DataFrame(), *parts], ignore_index=True)


def chunks(
    path: Path, name: str | None = None, encoding: str | None = None, words: bool = False
) -> Iterator[pd.DataFrame]:
    """Read a local file of any size as tables. `name` replaces its path in errors; for the rest see `tables`."""
    path, where = Path(os.path.expanduser(path)), name or str(path)
    if not os.path.isfile(path) and suffix(path):
        raise UserError(f"{where}: no such file")
    try:
        with open(path, "rb") if suffix(path) else io.BytesIO() as file:
            yield from tables(file, path.name, where, encoding, words)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None


def tables(
    file: BinaryIO, name: str, where: str, encoding: str | None = None, words: bool = False, limit: int | None = None
) -> Iterator[pd.DataFrame]:
    """Read a binary file as tables of at most about CHUNK characters.

    Columns of csv and tsv files are str. Classes in the parquet and arrow files of `datasets` get their names.

    Args:
        file: the file.
        name: its name; the suffix says the kind.
        where: its name in errors.
        encoding: of a text file; None: UTF-8.
        words: read a txt file as CoNLL: a word and its tag a line.
        limit: bytes that a packed file may unpack to. Without it, a file that unpacks to more than MOST_PACKED times
            its size is refused too.

    Raises:
        UserError: for bytes that are no such file, another encoding, or a text file with NUL characters.
    """
    kind, packing = suffix(Path(name)), _packing(name)
    if kind is None:
        raise UserError(
            f"{where}: cannot read this kind of file; supported are {', '.join(SUFFIXES)}, "
            f"each also {', '.join(PACKED)}"
        )
    if words and kind == ".txt":
        kind = ".conll"
    most = min(unpacked_limit(file.seek(0, 2)), limit or sys.maxsize)
    file.seek(0)
    try:
        stream = PACKED[packing](file) if packing else file
        limited = io.BufferedReader(_Limited(stream, most if packing else sys.maxsize, where), 2**20)
        if kind == ".xml":
            yield from wikipedia.articles(limited)
        elif kind in BINARY:
            yield from BINARY[kind](io.BytesIO(limited.read()) if packing else file, most)
        else:
            newline = "" if kind in (".csv", ".tsv") else None
            yield from TEXT[kind](_Text(limited, encoding or "utf-8-sig", newline=newline))
    except UserError:
        raise
    except UnicodeError as error:
        raise UserError(_other_encoding(where, encoding, error)) from None
    except LookupError as error:
        if encoding and encoding in str(error):
            raise UserError(f"{where}: there is no encoding {encoding!r}; such as cp1252 or utf-16") from None
        raise UserError(f"{where}: not a readable {kind} file ({hub.reason(error)})") from None
    except ModuleNotFoundError as error:
        raise UserError(
            f"{where}: a {kind} file needs the package {error.name}: pip install 'kdlib[files]'"
            + ("; or save the sheet as CSV" if kind == ".xlsx" else "")
        ) from None
    except Exception as error:  # the readers raise a dozen kinds; people need one line
        raise UserError(f"{where}: not a readable {kind} file ({hub.reason(error)})") from None


def _other_encoding(where: str, encoding: str | None, error: UnicodeError) -> str:
    """One line about text in another encoding than expected: which one it looks like, and how to name it."""
    if encoding:
        return f"{where}: not {encoding} text; name its encoding, or none for UTF-8"
    import charset_normalizer

    start = getattr(error, "start", 0)
    sample = bytes(getattr(error, "object", b""))[max(0, start - 5000) : start + 5000]
    found = [match.encoding for match in charset_normalizer.from_bytes(sample)] or ["cp1252"]
    guess = "cp1252" if "cp1252" in found else found[0]  # of the many that fit western text, what spreadsheets write
    return f"{where}: not UTF-8 text; it looks like {guess}: name it with encoding: {guess}"


class _Limited(io.RawIOBase):
    """A binary file of at most `most` bytes. Larger files are refused."""

    def __init__(self, file: Any, most: int, where: str):
        self.file, self.most, self.where, self.done = file, most, where, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)
        self.done += count
        if self.done > self.most:
            raise UserError(f"{self.where}: has more than {self.most:,} bytes when unpacked; not read")
        return count


class _Text(io.TextIOWrapper):
    """A text file without NUL characters. `held` is read before the rest."""

    held = ""

    def read(self, size: int | None = -1) -> str:
        text, self.held = self.held or super().read(size), ""
        if "\0" in text:
            raise UserError(f"{self.buffer.raw.where}: holds NUL bytes: not a text file")  # pyright: ignore
        return text


def unpacked_limit(packed: int) -> int:
    """The number of bytes that so many packed bytes may unpack to."""
    return 2**26 + MOST_PACKED * packed


def _cut(file: io.TextIOBase, *ends: str) -> Iterator[str]:
    """The text of a file in parts that end with the first of `ends` that they have."""
    held: list[str] = []
    while data := file.read(CHUNK):
        found = next((data.rfind(end) + len(end) for end in ends if end in data), 0)
        if len(data) == CHUNK and found:  # else it is the last of the file
            yield "".join([*held, data[:found]])
            held, data = [], data[found:]
        held.append(data)
    if rest := "".join(held):
        yield rest


def _text(file: io.TextIOBase) -> Iterator[pd.DataFrame]:
    """A row a line. `document` is the number of its block between empty lines; of its line, where there are none."""
    document, blocks = 0, False
    for part in _cut(file, "\n\n", "\n"):
        lines = [line.strip() for line in part.strip().splitlines()]
        blocks, rows = blocks or "" in lines, []
        for line in lines:
            if line:
                rows.append((line, document))
            document += not (line and blocks)
        document += blocks
        yield pd.DataFrame(rows, columns=["text", "document"])


def _json_lines(file: io.TextIOBase) -> Iterator[pd.DataFrame]:
    number, sparse = 0, _Sparse("different names")
    for part in _cut(file, "\n"):
        rows = []
        for line in part.split("\n"):
            number += 1
            if line.strip():
                try:
                    rows.append(_record(json.loads(line), line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number:,}: {error}") from None
        number -= part.endswith("\n")
        sparse.check({name for row in rows for name in row}, len(rows), sum(map(len, rows)))
        yield pd.DataFrame(rows, dtype=object)


def _json(file: io.TextIOBase) -> Iterator[pd.DataFrame]:
    """An array of records; or a record a line, as many files with this name have."""
    text = "".join(_cut(file, "\n"))
    if not text.lstrip().startswith("["):
        yield from _json_lines(io.StringIO(text))
        return
    rows = [_record(row, "") for row in json.loads(text)]
    if "\\u" in text:
        _refuse_half_characters(rows)
    _Sparse("different names").check({name for row in rows for name in row}, len(rows), sum(map(len, rows)))
    yield pd.DataFrame(rows, dtype=object)


def _record(row: Any, text: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("not an object of names and values")
    if "\\u" in text:
        _refuse_half_characters(row)
    return row


def _refuse_half_characters(value: Any) -> None:
    """Raise ValueError for half an emoji (a lone surrogate); tokenizers refuse it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(str(error)) from None


class _Sparse:
    """A check that the parts of a table, joined, are not huge and almost empty."""

    def __init__(self, said: str):
        self.names: set[str] = set()
        self.rows = self.values = 0
        self.said = said

    def check(self, names: Iterable[str], rows: int, values: int) -> None:
        """Count a part with so many rows and values."""
        self.names.update(names)
        self.rows, self.values = self.rows + rows, self.values + values
        if len(self.names) * self.rows > 2**24 + 100 * self.values:
            raise ValueError(f"{len(self.names):,} {self.said} in {self.rows:,} rows, most of them in few")


def _csv(file: _Text, separators: str = ",;\t|") -> Iterator[pd.DataFrame]:
    """A table with a header. Its separator is the one that the header has most often."""
    file.held = file.read(CHUNK)
    header = re.sub('"[^"]*"', "", re.split(r"[\r\n]", file.held.lstrip("\r\n"), maxsplit=1)[0])
    separator = max(separators, key=header.count)
    columns = 1 + header.count(separator)
    if columns > MOST_COLUMNS:  # pandas needs minutes for so many column names
        raise ValueError(f"its first line has {columns:,} columns")
    sparse = _Sparse("columns")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would be cut
        for rows in pd.read_csv(
            file, sep=separator, dtype=str, keep_default_na=False, index_col=False,
            chunksize=max(1, min(20_000, 2**20 // columns)),
        ):  # fmt: skip
            if columns > 100:
                sparse.check(rows.columns, len(rows), int((rows != "").to_numpy().sum()))
            yield rows


def _conll(file: io.TextIOBase, universal: bool = False) -> Iterator[pd.DataFrame]:
    """A row a sentence: `text` and `label` are lists of words and tags; `document` where the file says so.

    CoNLL: the first and the last column, divided by tabs or spaces; a line -DOCSTART- starts a document. CoNLL-U
    (`universal`): forms; upos (also as `label`), xpos and each feature; neither multiword ranges nor empty nodes.
    """
    number, columns, document = 0, 10 if universal else None, None
    for part in _cut(file, "\n\n"):
        sentences: list[dict[str, Any]] = []
        tokens: list[dict[str, str]] = []
        for line in [*part.split("\n"), ""]:
            number += 1
            cells = line.split("\t") if "\t" in line else line.split()
            if line.startswith(("-DOCSTART-", "# newdoc")):
                document = (document or 0) + 1
            elif not line.strip():
                if tokens:
                    names = dict.fromkeys(name for token in tokens for name in token)
                    found = {name: [token.get(name, "_") for token in tokens] for name in names}
                    sentences.append(found | ({} if document is None else {"document": document}))
                tokens = []
            elif line.startswith("#") and len(cells) != columns:
                continue  # a comment
            else:
                columns = columns or len(cells)
                if len(cells) != columns or columns < 2:
                    raise ValueError(f"line {number:,}: {len(cells)} columns instead of {max(2, columns)}")
                if not universal:
                    tokens.append({"text": cells[0], "label": cells[-1]})
                elif cells[0].isdigit():
                    features = dict(item.split("=", 1) for item in cells[5].split("|") if "=" in item)
                    tokens.append(features | {"text": cells[1], "label": cells[3], "upos": cells[3], "xpos": cells[4]})
        number -= 1 + part.endswith("\n")
        yield pd.DataFrame(sentences)


def _parquet(file: BinaryIO, most: int) -> Iterator[pd.DataFrame]:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        yield from _arrow_batches(parquet.schema_arrow, parquet.iter_batches(8192), most)


def _arrow(file: BinaryIO, most: int) -> Iterator[pd.DataFrame]:
    """An Arrow stream, as `save_to_disk` of datasets writes it, or an Arrow file."""
    start = file.read(6)
    file.seek(0)
    if start == b"ARROW1":
        reader = pa.ipc.open_file(file)
        batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = reader = pa.ipc.open_stream(file)
    yield from _arrow_batches(reader.schema, batches, most)


def _arrow_batches(schema: pa.Schema, batches: Iterable[pa.RecordBatch], most: int) -> Iterator[pd.DataFrame]:
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two of its columns have the same name")
    size, features = 0, None
    if b"huggingface" in (schema.metadata or {}):
        from datasets import Features

        features = Features.from_arrow_schema(schema)
    for batch in batches:
        batch.validate(full=True)  # invalid UTF-8 would fail later, at an unrelated place
        size += batch.nbytes
        if size > most:
            raise ValueError(f"has more than {most:,} bytes when unpacked")
        rows = pa.Table.from_batches([batch], schema).to_pandas(ignore_metadata=True)
        yield with_class_names(rows, features) if features else rows


def with_class_names(rows: pd.DataFrame, features: "Features") -> pd.DataFrame:
    """The rows with names instead of the numbers of classes; None for a number without a name."""
    for column, kind in features.items():
        names = getattr(getattr(kind, "feature", kind), "names", None)
        if names:

            def name(value: Any, names: list[str] = names) -> str | None:
                return names[int(value)] if value is not None and 0 <= value < len(names) else None

            rows[column] = [[name(v) for v in cell] if np.ndim(cell) else name(cell) for cell in rows[column]]
    return rows


def _xlsx(file: BinaryIO, most: int) -> Iterator[pd.DataFrame]:
    """The first sheet of a workbook. Its first row names the columns; values are str, as in a CSV file."""
    import openpyxl

    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > most:
            raise ValueError(f"has more than {most:,} bytes when unpacked")
    book = openpyxl.load_workbook(file, read_only=True, data_only=True)
    rows = book.worksheets[0].iter_rows(values_only=True, max_col=MOST_COLUMNS)
    names = [str(cell) for cell in next(rows, ()) if cell is not None]
    filled = [["" if cell is None else str(cell) for cell in row[: len(names)]] for row in rows if any(row)]
    yield pd.DataFrame(filled, columns=names, dtype=str)


TEXT: dict[str, Callable[[_Text], Iterator[pd.DataFrame]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, separators="\t"),
    ".conll": _conll,
    ".conllu": partial(_conll, universal=True),
}
BINARY: dict[str, Callable[[BinaryIO, int], Iterator[pd.DataFrame]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".xlsx": _xlsx,
}
SUFFIXES = (*TEXT, *BINARY, ".xml")
