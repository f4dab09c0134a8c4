"""Rows from anywhere, and a record of where they came from.

A hub data set, a file of one, a file from the web, a local folder, or a local file of a kind in `readers.SUFFIXES`. A
zip is read as a folder, in memory: nothing of it is written to disk.
"""

import hashlib
import io
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pandas as pd

from kdlib.config import Corpus, Source, Task
from kdlib.data import hub
from kdlib.data.readers import SUFFIXES, chunks, joined, suffix, tables, unpacked_limit, with_class_names
from kdlib.errors import LONGEST, UserError

ABOUT = re.compile(
    r"(dataset_dict|dataset_infos?|state)\.json|(cache|tmp)-?\w*\.arrow"
)  # what `datasets` writes beside rows
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(rf"hf://datasets/({HUB_ID.pattern})/(.+)")
ADDRESS = re.compile(r"https?://\S+")
T = TypeVar("T")
Spec = TypeVar("Spec", Corpus, Task)
Files = dict[str, Callable[[], Iterable[pd.DataFrame]]]  # path in the place -> a reader of that file in parts


@dataclass(frozen=True)
class Origin:
    """A record of what was read.

    Attributes:
        source: as in the profile.
        revision: the commit, where a hub gives one.
        sha256: of the texts and labels; equal for equal rows in any kind of file.
        rows: number of rows of each split (documents, for a corpus).
        removed: training rows left out because their text is in test.
        skipped: rows left out because they have no text or no label.
        repeated: share of a corpus's sentences that occurred before in it.
        notes: what was changed in the rows, such as labels with spaces around them.
        passed_over: the sources tried before, each with what was wrong.
    """

    source: str
    revision: str | None
    sha256: str
    rows: dict[str, int]
    removed: int = 0
    skipped: int = 0
    repeated: float = 0.0
    notes: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


def digest(rows: Iterable[Any]) -> str:
    """sha256 of JSON-like rows, in order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(row_bytes(row))
    return total.hexdigest()


def row_bytes(row: Any) -> bytes:
    """A row in the form that `digest` hashes."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def first_of(spec: Spec, load: Callable[[Spec], T], what: str) -> tuple[T, tuple[str, ...]]:
    """`load` the first place of `spec` that can be read. Returns the result, and why earlier places failed.

    The places are the spec's own and its fallbacks. A fallback has the spec's columns unless it names others.

    Raises:
        UserError: with the errors of all places.
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
    room = (LONGEST - len(what) - 120) // len(places)  # long errors are shortened so that every place is named
    listed = "; ".join(
        f"({number}) {why if len(why) <= room else why[: room - 4] + ' ...'}" for number, why in enumerate(failures, 1)
    )
    raise UserError(f"{what}: none of its {len(places)} sources can be read: {listed}{hub.WAY_ON}")


def repaired(text: str) -> str:
    """Text without the marks of bad conversion: UTF-8 read as another encoding, HTML entities, soft hyphens.

    ftfy does the work; quotes stay curly, and characters are composed (NFC).
    """
    import ftfy

    return ftfy.fix_text(text, uncurl_quotes=False, unescape_html=True).replace("\u00ad", "")


def embedded_rows(name: str) -> pd.DataFrame:
    """A file of the kit by its name in `bundled`, without ending."""
    return pd.read_json(
        (resources.files("kdlib.data") / "bundled" / f"{name}.jsonl").open("rb"), lines=True, dtype=False
    )


def read_rows(source: Source, columns: list[str] = (), split: str | None = None) -> pd.DataFrame:
    """Read a source as a table: `read_table` without the commit."""
    return read_table(source, columns, split)[0]


def read_table(source: Source, columns: list[str] = (), split: str | None = None) -> tuple[pd.DataFrame, str | None]:
    """Read a source as a table. Returns it with its commit, where a hub gives one.

    A txt file gives a row a line, with the columns `text` and `document`, the number of its block between empty lines
    (of its line, where there are none).

    Args:
        source: the source.
        columns: columns that must exist.
        split: replaces `source.split`; it may be a place itself. Of a folder or zip, the files whose path has the split
            as a word are read; all files, where none has and `split` is not given.

    Raises:
        UserError: for a source that is missing, empty, of another kind than its name says, or lacks a column.
    """
    files, commit = _files(source)
    if split and _is_place(split) and split not in (files or ()):
        place = dict(source=split, split="test", subset=None, revision=None)
        return read_table(source.model_copy(update=place), columns)
    if files is None:
        rows, commit = hub.dataset(source.source, source.subset, split or source.split, source.revision)
        rows = with_class_names(rows.to_pandas(), rows.features)
    else:
        rows = joined(_apart(_chosen(source, files, split)))
    if rows.empty:
        raise UserError(f"{source.source}: no rows")
    _check_columns(source, columns, rows.columns)
    return rows, commit


def stream_rows(
    source: Source, columns: list[str] = (), whole: bool = False
) -> tuple[Iterator[dict[str, Any]], str | None]:
    """The rows of `read_table` one by one, read when needed, and their commit.

    Txt rows of different files have different documents.

    Args:
        source: the source.
        columns: columns that must exist: in each file, or with `whole` in one of them.
        whole: all rows will be read; then a hub data set is downloaded first.
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
    """The rows, after a check that each row (with `apart`: one of them) has the columns."""
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
    """The files of a source, and their commit; None for a hub data set, whose client chooses the files."""
    name, commit = source.source, None
    how: Any = dict(encoding=source.encoding, words=getattr(source, "kind", None) == "tokens")
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path.is_dir, False for any name no file can have
        found = [file.relative_to(path) for file in sorted(path.rglob("*")) if suffix(file) and file.is_file()]
        hidden = [any(part.startswith(".") for part in file.parts) or ABOUT.fullmatch(file.name) for file in found]
        found = [file for file, hide in zip(found, hidden) if not hide]
        return {str(file): lambda file=file: chunks(path / file, **how) for file in found}, None
    if match := HUB_FILE.fullmatch(name):
        path, commit = hub.file(*match.groups(), source.revision)
    elif ADDRESS.fullmatch(name):
        path = hub.fetch(name)
    elif not os.path.isfile(path) and not looks_local(name):
        if HUB_ID.fullmatch(name):
            return None, None
        raise UserError(f"{name!r}: no such file or folder, and not a hub id (owner/name)")
    if path.name.lower().endswith(".zip"):
        return _zip_files(path, name, how), commit
    return {"": lambda: chunks(path, name, **how)}, commit


def local_state(source: Source) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of change of a local file or folder, to see changes. None for other sources."""
    path = Path(os.path.expanduser(source.source))
    if not os.path.exists(path):
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _zip_files(path: Path, name: str, how: dict[str, Any]) -> Files:
    """The files in a zip, read in memory. Names of members are never used as paths. `how`: see `readers.tables`."""
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
    members = [m for m in members if not ABOUT.fullmatch(PurePosixPath(m.filename).name)]
    if sum(member.file_size for member in members) > min(hub.LARGEST, unpacked_limit(path.stat().st_size)):
        raise UserError(
            f"{name}: its files are far larger than the zip, or have more than {hub.LARGEST / 2**30:.0f} GB"
        )

    def read(member: zipfile.ZipInfo) -> Iterator[pd.DataFrame]:
        where = f"{name}: {member.filename}"
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                data = b"".join(iter(lambda: stream.read(2**20), b""))  # no more than the stated size
        except Exception as error:  # broken, encrypted, or packed with an unknown method
            raise UserError(f"{where}: cannot be unpacked ({hub.reason(error)})") from None
        yield from tables(io.BytesIO(data), member.filename, where, **how, limit=hub.LARGEST)

    return {m.filename: lambda member=m: read(member) for m in sorted(members, key=lambda m: m.filename)}


def _chosen(source: Source, files: Files, split: str | None) -> Files:
    """The files of a folder or zip that `split` names, else those of the source's split, else all."""
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
    """The tables of files, each read when needed. Documents of different files of text stay separate."""
    documents = 0
    for name, read in files.items():
        before = documents
        for rows in read():
            if suffix(Path(name)) in (".txt", ".conll", ".conllu") and "document" in rows and len(rows):
                rows["document"] += before
                documents = rows["document"].max() + 1
            yield rows


def looks_local(name: str) -> bool:
    """Whether a name is that of a local file or folder, by its suffix or its start."""
    return suffix(Path(name)) is not None or name.lower().endswith(".zip") or name.startswith((".", "/", "~"))


def _is_place(split: str) -> bool:
    return bool(HUB_FILE.fullmatch(split) or ADDRESS.fullmatch(split)) or looks_local(split)
