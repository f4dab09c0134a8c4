"""What readers are given that means them harm, and what they are to make of it: the cases of fuzz.py.

A case is built of values that hypothesis draws and of valid files that a seeded generator damages.
"""

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import os
import pickle
import stat
import struct
import tempfile
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch
from xml.sax.saxutils import escape

import models.test_embedded_teacher as test_embedded
import numpy as np
import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import tiny
import torch
import yaml
from hypothesis import strategies as st
from matplotlib.figure import Figure
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
from transformers.utils import logging

from kdlib import config
from kdlib import files as store
from kdlib.data import corpus, sources, tasks
from kdlib.data.readers import read_file
from kdlib.distillation.objectives import check_objectives
from kdlib.errors import UserError
from kdlib.evaluation.benchmark import Trial, save_trials
from kdlib.evaluation.metrics import Metric
from kdlib.models import embedded_teacher, loading, mlm_head, safetensors_files
from kdlib.models.encoder import text_vectors
from kdlib.models.safetensors_files import HEAD_FILE
from kdlib.pruning import selection
from kdlib.study import arms
from kdlib.study.plan import Graph
from kdlib.study.run import COLUMNS, Run, find_run, run_folder
from kdlib.study.stage import Context, Source, Stage, contents
from kdlib.study.stages import read_training
from kdlib.study.study import Study
from kdlib.viz import figures, tables

CANARY = "KDLIB_FUZZ_CANARY"  # the variable that names the file which code of the input would write


@dataclass
class Case:
    """files: the folder's content, None for a folder, a Link for a symbolic link; about: other arguments of the reader;
    names: an error must contain one of them."""

    files: dict[str, "bytes | Link | None"]
    about: Any = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    to: str


@dataclass(frozen=True)
class Reader:
    """values: drawn by hypothesis; build: makes a case of them; read: returns, or raises UserError; share: reading is
    so slow that only one case in so many is read."""

    name: str
    values: st.SearchStrategy
    build: Callable[[Any, Random], Case]
    read: Callable[[Path, Case], None]
    share: int = 1


# -- values and damage

# fmt: off
NASTY = [
    "", " ", "\0", "\n", "\r", "\r\n", "\t", "\x0b", "\x1b[31m", "\x7f", "\x85", "\xa0", "\ufeff", "\ufffe", "\u200b",
    "\u200d", "\u202e", "\u2028", "\u2029", "\ud800", "\udfff", "\ud83d\ude00", "😀", "e\u0301" * 9, "ﷺ", "𝒳", "'", '"',
    '""', '"""', "`", "\\", "\\u0000", "\\ud800", ",", ";", "|", "#", "=1+1", "%s%n", "{0}", "${HOME}", "$(touch x)",
    "<b>", "nan", "NaN", "null", "None", "true", "no", "~", "-", ".", "..", "../../x", "/etc/passwd", "C:\\x", "-0",
    "0x1F", "1e999", "9" * 5000, "query: ", "<s>", "[MASK]", "O", "B-", "I-PER", "embedded", "train", "test",
    "__class__", "a" * 3000, "ñ" * 300,
]
# fmt: on
TEXT = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(), max_size=8),  # lone surrogates too
    st.sampled_from(NASTY),
    st.lists(st.sampled_from(NASTY + tiny.WORDS), max_size=4).map(" ".join),
)
TEXTS = st.lists(TEXT, min_size=1, max_size=4)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**400, 1e308, 1e-320]),
)
ODD = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=6,
)
ODDS = st.lists(ODD, min_size=1, max_size=5)


def damage(data: bytes, rng: Random) -> bytes:
    """Bits flipped, numbers overwritten, parts cut, doubled or made noise; more often near the ends."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        share = rng.random() ** rng.choice((1, 1, 4))
        at = int(len(data) * (1 - share if rng.random() < 0.3 else share))
        length = int(2 ** rng.uniform(0, 10))
        kind = rng.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = rng.randbytes(1)
        elif kind == 2:
            number = rng.choice((0, 1, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            width = rng.choice((1, 2, 4, 8))
            data[at : at + width] = (number % 256**width).to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            data[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, -0.0)))
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            data[at:at] = data[at : at + length]
        elif kind == 7:
            data[at : at + length] = rng.randbytes(rng.choice((length, 1)))
        else:
            data[at:at] = rng.choice(NASTY).encode("utf-8", "surrogatepass")
    return bytes(data)


def bend(tree: Any, odds: list, rng: Random) -> Any:
    """A copy of a tree of dicts and lists, with some of its values odd, gone, renamed or wrapped."""
    tree = json.loads(json.dumps(tree))
    for odd in odds[: rng.choice((1, 1, 2, 5))]:
        holder = tree
        while isinstance(holder, (dict, list)) and holder:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.25:
                break
            holder = holder[key]
        else:
            return odd
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = [holder[key]]
        elif kind == 2:
            holder[key] = {str(odd)[:50]: holder[key]}
        elif kind == 3 and isinstance(holder, dict):
            holder[str(odd)[:50]] = holder.pop(key)
        elif kind < 7 and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice((-1, 0, 1, 2, 7, 10**4, 10**6, 2**31, 10**12, 10**30, 0.5, holder[key] + 1))
        elif kind < 7 and isinstance(holder[key], str):
            holder[key] = str(odd)
        else:
            holder[key] = odd
    return tree


def dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def clean(text: str) -> str:
    """The text without lone surrogates, for what cannot be written with them."""
    return text.encode("utf-8", "replace").decode()


def encoded(text: str, rng: Random) -> bytes:
    """Text as bytes: mostly UTF-8, now and then in another encoding, with or without its mark."""
    others = ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis"]
    if rng.random() < 0.4:
        return text.encode(rng.choice(others), "replace")
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.3 else "replace")


def gzipped(data: bytes, rng: Random) -> bytes:
    """Data as a gzip file, or nearly."""
    packed = gzip.compress(data, 1)
    kind = rng.randrange(8)
    if kind == 0:
        return packed[: rng.randrange(len(packed))]
    if kind == 1:
        return damage(packed, rng)
    others = {2: data, 3: gzip.compress(packed, 1), 4: packed + b"\0" * 20, 5: packed + rng.randbytes(9)}
    return others.get(kind, packed)


@functools.cache
def gzip_bomb() -> bytes:
    """Two gigabytes of one letter in two megabytes."""
    return gzip.compress(b"a" * (1 << 24)) * 128


@functools.cache
def zip_bomb() -> bytes:
    """A gigabyte and a half of one letter in a zip."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("train.txt", "w") as member,
    ):
        for _ in range(96):
            member.write(b"a" * (1 << 24))
    return out.getvalue()


@functools.cache
def parquet_bomb() -> bytes:
    """Four gigabytes of one text in some kilobytes."""
    table, out = pa.table({"text": pa.array(["ang bata " * 110] * 50_000)}), io.BytesIO()
    with pa.parquet.ParquetWriter(out, table.schema, compression="zstd") as writer:
        for _ in range(80):
            writer.write_table(table)
    return out.getvalue()


@functools.cache
def xlsx_bomb() -> bytes:
    """A workbook with one cell at the far corner of a sheet, and gigabytes of spaces beside it."""
    out = io.BytesIO(_xlsx([["text"]]))
    with zipfile.ZipFile(out) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    sheet = files["xl/worksheets/sheet1.xml"].decode()
    row = '<row r="1048576"><c r="XFD1048576" t="inlineStr"><is><t>a</t></is></c></row></sheetData>'
    files["xl/worksheets/sheet1.xml"] = sheet.replace("</sheetData>", row).encode()
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


# -- code that must not run

EVIL = f"import os\nopen(os.environ[{CANARY!r}], 'w').close()\n"
EVIL_MODULE = f"""{EVIL}
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
class EvilConfig(BertConfig):
    model_type = "evil"
class EvilModel(BertModel):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Bad:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f': > "${CANARY}"',)


@functools.cache
def pickles() -> list[bytes]:
    """Pickles that run a command: bare, as PyTorch writes them new and old, and as NumPy does."""
    out = [pickle.dumps(Bad(), protocol) for protocol in (0, 2, 4)]
    for new in (True, False):
        stream = io.BytesIO()
        torch.save({"embeddings.word_embeddings.weight": Bad()}, stream, _use_new_zipfile_serialization=new)
        out.append(stream.getvalue())
    stream = io.BytesIO()
    np.save(stream, np.array([Bad()], dtype=object), allow_pickle=True)
    return [*out, stream.getvalue()]


# -- what comes back must be in order


def check_text(value: Any) -> None:
    """Text that a tokenizer takes."""
    assert isinstance(value, str) and value.strip(), f"no text: {value!r}"
    value.encode()


def check_cell(value: Any) -> None:
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        check_cell([*value, *value.values()])
    elif isinstance(value, (list, tuple, np.ndarray)):
        for item in value[:1000]:
            check_cell(item)


def check_table(table: pd.DataFrame) -> None:
    assert all(isinstance(column, str) for column in table.columns), f"columns {list(table.columns)!r}"
    assert table.columns.is_unique, f"columns {list(table.columns)!r}"
    check_cell(list(table.columns))
    for at in range(min(table.shape[1], 50)):
        check_cell(list(table.iloc[:200, at]))


# -- the embedded format

INT32 = st.sampled_from([0, 1, 2, 31, 2**31 - 1, -1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1)
UINT32 = st.sampled_from([0, 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
SMALL = st.integers(0, 40)
NAMES = ("HIDDEN", "LAYERS", "HEADS", "FFN", "ROWS", "POSITIONS", "TYPES")
FIELDS = {  # the arguments of test_embedded.tiny_file
    "magic": st.binary(min_size=4, max_size=4),
    "version": UINT32,
    "sizes": st.tuples(*(st.just(getattr(test_embedded, name)) | INT32 | SMALL for name in NAMES)),
    "eps": st.floats(width=32),
    "block": INT32,
    "tokens": st.lists(TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")), max_size=14),
    "scores": st.lists(st.floats(width=32), max_size=20),
    "special": st.fixed_dictionaries({name: SMALL | INT32 for name in test_embedded.SPECIAL}),
    "count": INT32 | SMALL,
    "offsets": st.lists(UINT32 | st.sampled_from(test_embedded.OFFSETS), max_size=20),
    "table": st.dictionaries(st.integers(0, 0x110000), st.lists(UINT32, max_size=5), max_size=4),
    "entries": INT32 | SMALL,
    "table_bytes": UINT32 | SMALL,
    "number": INT32 | SMALL,
    "sizes_in_bytes": st.dictionaries(
        st.sampled_from(["emb.word", "emb.ln.w", "l0.q.w", "l1.oln.b"]), st.integers(0, 2**64 - 1), max_size=2
    ),
    "past_end": st.integers(-10_000, 10_000) | st.just(2**40),
}


TENSORS = test_embedded.tiny_tensors()


@functools.cache
def valid_embedded() -> bytes:
    return test_embedded.tiny_file(tensors=TENSORS)


def build_embedded(fields: dict, rng: Random) -> Case:
    data = valid_embedded()
    chance = rng.random()
    if chance < 0.4:
        index = data.index(b"l1.oln.b") + 40  # header, vocabulary and tensor index end about here
        data = damage(data[:index], rng) + data[index:]
    elif chance < 0.55:
        data = damage(data, rng)
    elif chance < 0.6:
        data = rng.choice((b"", b"E5S1", *pickles(), rng.randbytes(rng.randrange(4000))))
    else:
        try:
            data = test_embedded.tiny_file(tensors=TENSORS, **fields)
        except struct.error:  # a field that no file can hold
            data = damage(data, rng)
    return Case({"teacher.bin": data}, names=("teacher.bin",))


def read_embedded(here: Path, case: Case) -> None:
    contents = embedded_teacher.read_file(here / "teacher.bin")
    assert all(np.isfinite(tensor).all() for tensor in contents.tensors.values())
    embedded_teacher.build_model(contents)
    embedded_teacher.build_tokenizer(contents)("bata ñ \u200b")


# -- tables

TABLE = st.lists(st.dictionaries(TEXT | st.just("text"), ODD, max_size=4), max_size=6)
KINDS = ("txt", "jsonl", "csv", "tsv", "parquet", "json", "arrow", "conll", "conllu", "xlsx", "xml")
FEATURES = [
    {"info": {"features": {"text": {"_type": "ClassLabel", "names": ["a"]}}}},
    {"info": {"features": {"text": {"_type": "Value", "dtype": "x"}}}},
    {"info": {"features": {"text": {"_type": "Evil"}, "gone": {"_type": "ClassLabel", "names": []}}}},
    {"index_columns": ["gone"], "columns": [{"name": "text", "pandas_type": "x"}], "column_indexes": [{}]},
]


def written(kind: str, rows: list[dict], rng: Random) -> bytes:
    """Rows as a file of a kind."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["text"]
    texts = [[str(row.get(name, "")) for name in names] for row in rows]
    if kind in ("parquet", "arrow"):
        return _parquet(names, texts, rng, kind)
    if kind == "xlsx":
        return _xlsx([names, *texts])
    if kind == "xml":
        return encoded(WIKI % "\n".join(PAGE % tuple(map(escape, (cells[0], " ".join(cells)))) for cells in texts), rng)
    if kind in ("conll", "conllu"):
        lines = [["1"] * (9 if kind == "conllu" else 0) + [cell, *cells[:1]] for cells in texts for cell in cells]
        return encoded("\n".join(rng.choice("\t ").join(line) + "\n" * (rng.random() < 0.2) for line in lines), rng)
    if kind == "json":
        return json.dumps(rows, indent=rng.choice((None, 1))).encode()
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
        return rng.choice(("\n", "\n", "\r\n", "\n\n", "\r")).join(lines).encode("utf-8", "surrogatepass")
    if kind == "txt":
        return encoded("\n".join(" ".join(cells) for cells in texts), rng)
    separator = {"csv": ",", "tsv": "\t"}[kind]
    if rng.random() < 0.4:  # whatever the cells hold
        return encoded("\n".join(separator.join(cells) for cells in [names, *texts]), rng)
    out = io.StringIO()
    csv.writer(out, delimiter=separator, escapechar="\\").writerows([names, *texts])
    return encoded(out.getvalue(), rng)


WIKI = "<mediawiki><siteinfo><namespaces><namespace key='6'>Talaksan</namespace></namespaces></siteinfo>%s</mediawiki>"
PAGE = "<page><title>%s</title><ns>0</ns><revision><text>%s</text></revision></page>"
ENTITIES = "".join(f"<!ENTITY a{i + 1} '{f'&a{i};' * 10}'>" for i in range(12))
LAUGHS = f"<!DOCTYPE m [<!ENTITY a0 'ha'>{ENTITIES}]>"


def _xlsx(lines: list[list[str]]) -> bytes:
    book, out = openpyxl.Workbook(write_only=True), io.BytesIO()
    sheet = book.create_sheet()
    for cells in lines:
        sheet.append([ILLEGAL_CHARACTERS_RE.sub("", clean(cell)) for cell in cells])
    book.save(out)
    return out.getvalue()


def _parquet(names: list[str], texts: list[list[str]], rng: Random, kind: str) -> bytes:
    columns, out = [], io.BytesIO()
    for cells in zip(*texts) if texts else [()] * len(names):
        cells = [clean(cell)[:500] for cell in cells]
        plain, cell_kind = pa.array(cells, pa.string()), rng.randrange(12)
        numbers = [len(cell) for cell in cells]
        others = {
            0: lambda: pa.array([cell.encode() for cell in cells], pa.binary()),
            1: lambda: pa.array(numbers, rng.choice((pa.int64(), pa.uint64(), pa.float16(), pa.timestamp("ns")))),
            2: lambda: pa.array([[cell, cell] for cell in cells]),
            3: lambda: pa.array([{"a": cell, "b": [1]} for cell in cells]),
            4: plain.dictionary_encode,
            5: lambda: pa.nulls(len(cells)),
        }
        columns.append(others.get(cell_kind, lambda: plain)())
    names = [clean(name) for name in names]
    table = pa.Table.from_arrays(columns, names[:1] * len(names) if rng.random() < 0.1 else names)
    if rng.random() < 0.2:
        table = table.replace_schema_metadata({rng.choice(("huggingface", "pandas")): dumped(rng.choice(FEATURES))})
    if kind == "arrow":
        new = rng.choice((pa.ipc.new_stream, pa.ipc.new_file))
        with new(out, table.schema, options=pa.ipc.IpcWriteOptions(compression=rng.choice((None, "zstd")))) as writer:
            writer.write_table(table)
        return out.getvalue()
    pa.parquet.write_table(table, out, compression=rng.choice(("none", "snappy", "gzip", "zstd")))
    return out.getvalue()


def huge(kind: str, rng: Random) -> bytes:
    """Ten megabytes in a line, in depth, in width, or in emptiness; or names that are never the same."""
    if kind == "jsonl" and rng.random() < 0.2:
        return "\n".join(f'{{"{i}": {i}}}' for i in range(50_000)).encode()
    if kind in ("csv", "tsv") and rng.random() < 0.1:
        return ({"csv": ",", "tsv": "\t"}[kind].join(map(str, range(9000))) + "\n1" * 1_000_000).encode()
    letters = rng.choice(("a", "ñ", '"', " ", "\\", "[", '{"a":', "a,", "\n", "\u200b", "9", "a\t", ". "))
    text = letters * (10_000_000 // len(letters))
    forms = {
        "jsonl": ('{"text": "%s"}', '{"text": %s}', '{"text": 1%s}', '{"%s": 1}', "%s"),
        "csv": ("text\n%s", 'text\n"%s"', 'text\n"%s', "%s\n1", "text,label\n%s,1", "%s"),
        "tsv": ("text\n%s", 'text\n"%s"', 'text\n"%s', "%s\n1", "text\tlabel\n%s\t1", "%s"),
        "json": ('[{"text": "%s"}]', '[{"text": %s}]', "[%s]", "%s"),
        "conll": ("%s O", "a %s", "%s"),
        "xml": (WIKI % (PAGE % ("a", "%s")), f"{LAUGHS}<mediawiki>%s&a12;</mediawiki>", "<mediawiki>%s", "%s"),
    }
    return (rng.choice(forms.get(kind, ("%s",))) % text).encode()


SHORT = (b"", b" ", b"\n\n", b"\0", b"\xef\xbb\xbf", b"PAR1", b"PAR1PAR1", b"\x1f\x8b", b"text\n", b"text")
DEEP = (
    b'{"text":' + b"[" * 10**5,
    b'{"text":' * 3000 + b"1" + b"}" * 3000,
    b'{"text":' + b"[" * 990 + b"1" + b"]" * 990 + b"}",
    b'{"text": "\\ud800"}',
    b'{"text": ' + b"9" * 5000 + b"}",
    b'{"text": "a", "text": {"b": 1e999}}',
)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def build_table(kind: str) -> Callable[[list[dict], Random], Case]:
    def build(rows: list[dict], rng: Random) -> Case:
        if rng.random() < 0.7:
            rows = rows + [{"text": " ".join(rng.choices(tiny.WORDS, k=3)), "label": str(i % 2)} for i in range(3)]
        name, chance = f"data.{rng.choice((kind, kind, kind.upper()))}", rng.random()
        if chance < 0.002:
            data = {"parquet": parquet_bomb, "xlsx": xlsx_bomb}.get(kind, lambda: huge(kind, rng))()
        elif chance < 0.03:
            data = rng.choice((*SHORT, *(DEEP if kind == "jsonl" else ()), *pickles()))
        else:
            data = written(kind, rows, rng)
            data = damage(data, rng) if chance < 0.4 else data
        if rng.random() < 0.25:
            name, data = f"{name}.gz", gzip_bomb() if rng.random() < 0.006 else gzipped(data, rng)
        elif rng.random() < 0.2:
            end = rng.choice(list(PACKERS))
            data = PACKERS[end](data)
            name, data = name + end, damage(data, rng) if rng.random() < 0.3 else data
        return Case({name: data}, name, (name,))

    return build


def read_table(here: Path, case: Case) -> None:
    check_table(read_file(here / case.about))
    assert len(sources.read_rows(config.Source(source=str(here / case.about)), ["text"]))


# -- corpora and tasks


def build_corpus(values: tuple[list[str], list], rng: Random) -> Case:
    texts, odds = values
    rows: Any = [{"text": f"{' '.join(rng.choices(tiny.WORDS, k=6))}. {i}!", "page": f"p{i // 2}"} for i in range(30)]
    for text in texts:
        rng.choice(rows)[rng.choice(("text", "page"))] = text
    rows = _rows(bend(rows, odds, rng) if rng.random() < 0.3 else rows)
    kind = rng.choice(KINDS)
    if kind == "txt":
        data = encoded("\n\n".join(str(row.get("text")) for row in rows), rng)
    else:
        data = written(kind, rows, rng)
    data = damage(data, rng) if rng.random() < 0.3 else data
    spec: dict[str, Any] = {"source": f"text.{kind}"}
    if rng.random() < 0.3:
        spec["document"] = rng.choice(("page", "text", *texts))
    if rng.random() < 0.1:
        spec["text"] = rng.choice(texts)
    if rng.random() < 0.2:
        spec |= {"max_documents": 10, "streaming": rng.random() < 0.5}
    files: dict[str, Any] = {f"text.{kind}": data}
    place = rng.random()
    if place < 0.15:
        spec["source"], files = "folder", {f"folder/{i}-train.{kind}": data for i in range(2)}
        files |= {"folder/b.txt": Link("b.txt"), "folder/c.jsonl": None, "folder/d.csv": Link("/dev/zero")}
    elif place < 0.4:
        spec["source"], files = "text.zip", {"text.zip": evil_zip({f"train.{kind}": data}, texts, rng)}
    return Case(files, spec, ("text.", "folder", "corpus"))


def _rows(tree: Any) -> list[dict]:
    return [row for row in tree if isinstance(row, dict)] if isinstance(tree, list) else []


def evil_zip(files: dict[str, bytes], texts: list[str], rng: Random) -> bytes:
    """A zip of files, with what would be written elsewhere, or fill the memory."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        chance = rng.random()
        if chance < 0.1:
            paths = ("../../victim.txt", "/tmp/kdlib-fuzz.txt", "..\\..\\victim.txt", "a/../../../victim.txt")
            archive.writestr(rng.choice(paths), "ang bata")
        elif chance < 0.2:
            link = zipfile.ZipInfo("link.txt")
            link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, "/etc/passwd")
        elif chance < 0.3:
            for name in (*files, *texts):  # some twice
                archive.writestr(clean(name).replace("\0", "") or "x", b"x\n" * 9)
        elif chance < 0.302:
            return zip_bomb()
        elif chance < 0.304:
            archive.writestr("train.jsonl.gz", gzip_bomb())
    return damage(out.getvalue(), rng) if rng.random() < 0.4 else out.getvalue()


def read_corpus(here: Path, case: Case) -> None:
    spec = config.Corpus(**case.about | {"source": str(here / case.about["source"])})
    loaded = corpus.load_corpus(spec, "ceb", 0)
    assert loaded.train and loaded.heldout
    for document in loaded.train + loaded.heldout:
        assert document.sentences
        for sentence in document.sentences:
            check_text(sentence)


def build_task(values: tuple[list[str], list], rng: Random) -> Case:
    texts, odds = values
    kind = rng.choice(("classify", "multilabel", "pair", "tokens"))
    lists = rng.random() < 0.5

    def row(i: int) -> dict:
        words, tags = [*rng.choices(tiny.WORDS, k=5), str(i)], ["B-PER", "I-PER", "O", "O", "O", "O"]
        more = {"second": f"si {i}", "label": rng.choice("ab"), "on": i % 2, "off": i // 2 % 2}
        if kind == "tokens":
            return more | (
                {"text": words, "label": tags} if lists else {"text": " ".join(words), "label": " ".join(tags)}
            )
        return more | {"text": " ".join(words)}

    rows: Any = [row(i) for i in range(24)]
    if rng.random() < 0.4:
        for text in texts:
            rng.choice(rows)[rng.choice(("text", "label", "second", "on"))] = text
    rows = _rows(bend(rows, odds, rng) if rng.random() < 0.4 else rows)
    form = rng.choice(KINDS[1:])
    data = written(form, rows, rng)
    spec: dict[str, Any] = {"name": rng.choice(("mine", *texts)), "kind": kind, "source": f"rows.{form}"}
    spec["label"] = ["on", "off"] if kind == "multilabel" else "label"
    if kind == "pair":
        spec["second"] = "second"
    chance = rng.random()
    if chance < 0.1:
        spec[rng.choice(("text", "second", "label"))] = rng.choice(texts)
    elif chance < 0.15:
        spec["label"] = texts
    if rng.random() < 0.3:
        spec["test"] = rng.choice(("test.jsonl", "rows.jsonl", "train", *texts))
    if rng.random() < 0.1:
        spec["split"] = rng.choice(texts)
    test = written("jsonl", [row(i) for i in range(50, 60)], rng)
    files = {"test.jsonl": test, f"rows.{form}": damage(data, rng) if rng.random() < 0.3 else data}
    return Case(files, spec, ("rows.", "test", "task", spec.get("test", "task")))


def read_task(here: Path, case: Case) -> None:
    spec = case.about | {"source": str(here / case.about["source"])}
    task = tasks.load_task(config.Task(**spec), corpus.Corpus([], [], []))
    tasks.check(task, set())
    for split in (task.train, task.test):
        assert len(split.texts) == len(split.targets) > 0
        for text, target in zip(split.texts, split.targets):
            for part in [text] if isinstance(text, str) else text:
                check_text(part)
            for number in target if isinstance(target, list) else [target]:
                assert isinstance(number, int) and 0 <= number < max(2, len(task.labels))


# -- profiles and overrides

SHIPPED = [(Path(config.__file__).parent / "profiles" / f"{name}.yaml").read_text() for name in config.profile_names()]
# fmt: off
YAML = [
    "[" * 20_000, "{a: " * 3000, "- " * 5000, "a: &a [*a, *a]", "&a *a", "seed: !!python/object/apply:os.system ['x']",
    "language: !!binary aGk=", "language: 2020-01-01", "seed: 0x10", "seed: 1_000", "seed: 1:30", "? {a: b}\n: c",
    "%YAML 9.9\n---\na: 1", "tasks: &t [{name: topic}]\nbaselines: {a: *t}", "!!set {a, b}", "!!omap [a: 1]",
    "--- a\n--- b", "a: |\n b", "'", "\t", "? ", "seed: " + "9" * 5000, "baselines: [a]", "tasks: {a: b}",
    "students: {x: {student.layers: 2}, 1: {}}", "students: {x: {students: {}}}", "students: {x: {seed: 1}}",
    "students: {x: 1}", "ablations: {arms: {../x: {a: {}}}}", "ablations: {arms: {a: {b: {c: 1}}}}",
    "ablations: {arms: {a: {b: {distill: 1}}}}", "ablations: {arms: {a: {b: {student.layers.x: 1}}}}",
    "ablations: {arms: {a: {b: {student: {layers: 2}}}}}", "ablations: {arms: {a: {1: {distill.epochs: 2}}}}",
    "baselines: {x: {source: y, z: 1}}", "distill: {objectives: {hidden: -1}}", "distill: {objectives: {}}",
]
# fmt: on
BOMB = "k0: &k0 [x]\n" + "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]\n" for i in range(1, 9))
YAML += [f"{place}\n{textwrap.indent(BOMB, ' ' * 6)}" for place in ("students:\n  a:", "ablations:\n  arms:\n    a:")]
YAML += [BOMB, f"ablations:\n  arms:\n    a:\n      student.init:\n{textwrap.indent(BOMB, ' ' * 8)}"]
KEYS = [*config.all_keys(), "ablations.arms", "ablations.arms.init.last", "students.x", "baselines.x", "tasks"]
PROFILE = ("profile", "parameter", "--set", "override", "ablations.", "objective", "mine.yaml", "students")


def build_profile(values: tuple[list[str], list, list[str]], rng: Random) -> Case:
    texts, odds, keys = values
    text, chance = rng.choice(SHIPPED), rng.random()
    if chance < 0.2:
        data = dumped(bend(yaml.safe_load(text), odds, rng))
    elif chance < 0.4:
        tree = bend(yaml.safe_load(text), odds, rng)
        data = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    elif chance < 0.5:
        data = rng.choice(YAML).encode()
    elif chance < 0.55:
        data = encoded("\n".join(texts), rng)
    else:
        data = damage(text.encode(), rng) if chance < 0.75 else encoded(text, rng)
    overrides: Any = []
    chance = rng.random()
    if chance < 0.2:
        given = [rng.choice((*texts, *YAML, dumped(odd).decode())) for odd in odds]
        overrides = [f"{key}={value}" for key, value in zip([*keys, *texts], given)]
        overrides = " ".join(overrides) if chance < 0.1 else overrides
    elif chance < 0.4:
        overrides = dict(zip([*keys, *texts], odds)) if chance < 0.35 else odds[0]
    return Case({"mine.yaml": data}, overrides, PROFILE)


def read_profile(here: Path, case: Case) -> None:
    profile = config.load_profile(here / "mine.yaml", case.about)
    arms.arms(profile)
    check_objectives(profile.distill.objectives)
    run = Run(here / "run", profile)
    assert Run(run.path).profile == profile
    context = Context(run.path, torch.device("cpu"), profile.distill.precision)
    with patch.object(Source, "content", "as it was"):
        assert all(report.key for report in Graph(profile, context).reports.values())


# -- model folders and tokenizers


@functools.cache
def model_files() -> dict[str, bytes]:
    """A small model folder with a masked-language head."""
    encoder = tiny.encoder(layers=2, hidden=16)
    encoder.head = mlm_head.new_head(encoder.model)
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder))
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@functools.cache
def small_model() -> torch.nn.Module:
    return tiny.encoder(layers=2, hidden=16).model


def bent_header(data: bytes, odds: list, rng: Random) -> bytes:
    """A safetensors file whose header lies."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = dumped(bend(json.loads(data[8:end]), odds, rng))
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, len(data)))
    return length.to_bytes(8, "little") + header + data[end:]


def build_model(*names: str) -> Callable[[list, Random], Case]:
    """Cases of a model folder of which some of the files `names` are damaged."""

    def build(odds: list, rng: Random) -> Case:
        files: dict[str, Any] = dict(model_files())
        for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2)))):
            chance, data = rng.random(), files[name]
            if chance < 0.03:
                del files[name]
            elif chance < 0.06:
                links = Link("gone"), Link("/dev/zero"), Link(name)
                files[name] = rng.choice((None, *links, b"", b"{}", b"[]", b"null", b"\0" * 9, *DEEP))
            elif chance < 0.12:
                files[name] = rng.choice(pickles())
            elif chance < 0.35:
                files[name] = damage(data, rng)
            elif name.endswith(".json"):
                files[name] = dumped(bend(json.loads(data), odds, rng))
            else:
                files[name] = bent_header(data, odds, rng)
        if rng.random() < 0.15:
            trap(files, rng)
        named = ("model", "victim.txt", "passwd")  # the last two are shards that an index names
        return Case({f"model/{name}": data for name, data in files.items()}, rng.random() < 0.3, named)

    return build


def trap(files: dict[str, Any], rng: Random) -> None:
    """Add code of the model's own, in the ways that the libraries know."""
    classes = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModel": "evil.EvilModel",
        "AutoTokenizer": [None, "evil.EvilTokenizer"],
    }
    unknown = {"model_type": "evil", "architectures": ["EvilModel"], "tokenizer_class": "EvilTokenizer"}
    for name in rng.sample(("config.json", "tokenizer_config.json"), rng.choice((1, 2))):
        files[name] = dumped(json.loads(model_files()[name]) | {"auto_map": classes} | rng.choice(({}, unknown)))
    files |= {
        "evil.py": EVIL_MODULE.encode(),
        "__init__.py": EVIL.encode(),
        "custom_generate/generate.py": EVIL.encode(),
    }
    chance = rng.random()
    if chance < 0.3:
        files.pop("model.safetensors", None)
        files["pytorch_model.bin"] = rng.choice(pickles())
    elif chance < 0.4:
        files["adapter_config.json"] = dumped(
            {"base_model_name_or_path": "evil", "peft_type": "LORA", "auto_mapping": classes}
        )
    elif chance < 0.5:
        shard = rng.choice(("../../victim.txt", "/etc/passwd", "evil.py", "model.safetensors"))
        index = dumped({"metadata": {}, "weight_map": {"pooler.dense.bias": shard}})
        files["model.safetensors.index.json"] = rng.choice((index, index, b"[]", b'{"weight_map": 3}', *DEEP))
        files.pop("model.safetensors", None)
    elif chance < 0.6:
        files["chat_template.jinja"] = b"{{ cycler.__init__.__globals__.os.system('x') }}"
    elif chance < 0.8:
        files.pop("tokenizer.json", None)
        files[rng.choice(("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"))] = rng.choice(
            (b"[UNK]\n", *pickles())
        )


def read_model(here: Path, case: Case) -> None:
    encoder = loading.load_encoder(here / "model", "model", allow_pickle=case.about)
    assert text_vectors(encoder, ["ang bata ay natulog", "ñ 😀 \u200b"]).shape == (2, 1, encoder.hidden)


def read_weights(here: Path, case: Case) -> None:
    folder = safetensors_files.weights_folder(here / "model")
    for tensor in safetensors_files.stored_tensors(folder).values() if folder else ():
        assert 0 <= tensor.start and tensor.start + tensor.size <= tensor.file.stat().st_size
        assert tensor.width


def read_head(here: Path, case: Case) -> None:
    mlm_head.load_head(here / "model" / HEAD_FILE, small_model())


# -- run folders


def stages_of(study: Study) -> dict[str, Stage]:
    """A stage of each kind that reads a folder of its own."""
    return {"condition": study.graph.condition, "distill": study.graph.distill, "ablations": study.graph.grid[0][1][0]}


@functools.cache
def run_files() -> dict[str, bytes | None]:
    """A run folder with a bit of everything."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", config.load_profile("smoke"))
        score = dict(task="topic", metric="macro_f1", value=0.5, low=0.1, high=0.9, n=20)
        models = [score | dict(model=model, method="probe", seed=0) for model in ("teacher", "student")]
        run.record("benchmark", models)
        run.record("ablations", [score | dict(model="student", method=name, arm="a") for name in ("fraction", "init")])
        with patch.object(Source, "content", "as it was"):
            study = Study(run.path, "smoke")
            for name, stage in stages_of(study).items():
                run.mark(name, stage.key, 1.0, contents(stage))
                stage.folder.mkdir(parents=True)
                (stage.folder / "curve.csv").write_text("split,step,seconds,loss\nheldout,1,0.5,2.0\n")
                store.write_json(stage.folder / "facts.json", {"texts": 3})
                store.write_json(stage.folder / "numbers.json", {"parameters": 3})
                save_trials(stage.folder / "trials.npz", [Trial("a", "b", "probe", 0, [Metric("f1", np.ones((2, 3)))])])
                store.seal(stage.folder, key=stage.key)
        for name in ("figures", "notebooks", "cache", "vocabulary"):
            run.folder(name)
        files = sorted(run.path.rglob("*"))
        return {str(file.relative_to(run.path)): None if file.is_dir() else file.read_bytes() for file in files}


def build_run(values: tuple[list[str], list], rng: Random) -> Case:
    texts, odds = values
    files: dict[str, Any] = dict(run_files())
    for name in rng.sample([name for name, data in files.items() if data is not None], rng.choice((1, 1, 2, 4))):
        chance, data = rng.random(), files[name]
        if chance < 0.1:
            links = Link("gone"), Link(Path(name).name)
            files[name] = rng.choice((None, *links, b"", b"\0", b"null", b"[]", b"3", *DEEP))
        elif chance < 0.2:
            files[name] = rng.choice(pickles())
        elif name == "results.csv" and chance < 0.7:
            table, out = list(csv.reader(io.StringIO(data.decode()))), io.StringIO()
            for text in texts:
                row = rng.choice(table)
                row[rng.randrange(len(row))] = text
            csv.writer(out, escapechar="\\").writerows(table)
            files[name] = encoded(out.getvalue(), rng)
        elif name.endswith((".json", ".yaml")) and chance < 0.7:
            files[name] = dumped(bend(yaml.safe_load(data), odds, rng))
        else:
            files[name] = damage(data, rng)
    if rng.random() < 0.25:  # in place of a file or folder of the run, a link that leads out of it
        name = rng.choice([*files, ".lock"])
        files = {other: data for other, data in files.items() if other != name and not other.startswith(f"{name}/")}
        up = "../" * (name.count("/") + 2)
        files[name] = rng.choice((None, *map(Link, (f"{up}victim.txt", up, f"{up}new", "/tmp", ".", name))))
    return Case({f"run/{name}": data for name, data in files.items()}, names=("run", *PROFILE))


def read_run(here: Path, case: Case) -> None:
    """Everything that a run folder is asked for; each part may refuse on its own."""
    refused: list[UserError] = []

    def attempt(part: Callable[[], Any]) -> Any:
        try:
            return part()
        except UserError as error:
            refused.append(error)

    run = attempt(lambda: Run(here / "run"))
    if run is None:
        run = Run(here / "run", config.load_profile("smoke"))
    table = attempt(run.results)
    attempt(lambda: run.done("distill", "x") or run.mark("distill", "x", 1.0, {}))
    attempt(lambda: run.record("probe", [dict(model="a", metric="m", value=1)]))
    attempt(lambda: run.lock().__enter__())
    if table is not None and len(table):
        attempt(lambda: tables.headline(table))
        for name in set(attempt(lambda: figures.drawers(table)) or ()) - set(figures.FIGURES):
            attempt(lambda: figures.save(Figure((1, 1)), run.folder("figures"), name))
    with patch.object(Source, "content", "as it was"):
        study = attempt(lambda: Study(here / "run", "smoke"))
        for name, stage in (stages_of(study) if study else {}).items():
            if not stage.intact():
                continue
            if name == "ablations":
                assert isinstance(attempt(lambda stage=stage: stage.load(stage.folder)) or (), tuple)
            else:
                curve, facts = attempt(lambda stage=stage: read_training(stage.folder)) or ({"loss": []}, {})
                assert "loss" in curve and isinstance(facts, dict)
    if refused:
        raise refused[0]


# -- names


def build_names(texts: list[str], rng: Random) -> Case:
    names = {part: rng.choice(texts) for part in ("profile", "name", "language")}
    return Case({}, names | {"file": f"{rng.choice(('', '.', '..', '...', ' ', texts[0]))}.yaml"})


def read_names(here: Path, case: Case) -> None:
    """Names that become part of a path; each may be refused on its own."""
    about, name = case.about, case.about["name"]
    folder = run_folder(None, about["file"])
    assert Path(os.path.normpath(folder)).parent == here / "runs", f"the default run folder is {folder}"
    smoke = config.load_profile("smoke")
    table = pd.DataFrame([dict.fromkeys(COLUMNS) | {"stage": "ablations", "method": clean(name), "value": 0.5}])
    parts: list[Callable[[], Any]] = [
        lambda: find_run(None, about["profile"]),
        lambda: Run(here / "one" / name.replace("/", " ").strip("."), smoke),
        lambda: [
            figures.save(Figure((1, 1)), here / "figures", key)
            for key in set(figures.drawers(table)) - set(figures.FIGURES)
        ],
        lambda: Run(here / "run", config.changed(smoke, {"language": about["language"]}, "x")),
        lambda: Run(here / "run", config.changed(smoke, {"name": name}, "x")),
        lambda: arms.arms(config.changed(smoke, {"ablations.arms": {name: {about["profile"]: {}}}}, "x")),
        lambda: selection.word_list(about["language"], 5),
        lambda: tasks.load_task(config.Task(name=name), corpus.Corpus([], [], [])),
        lambda: loading.load_encoder(f"./{name}", name),
        lambda: loading.load_encoder(name, name),
        lambda: sources.read_rows(config.Source(source=f"./{name}")),
    ]
    refused = None
    for part in parts:
        try:
            part()
        except UserError as error:
            refused = error
    inside = {path.name for path in (here / "figures").iterdir()} if (here / "figures").is_dir() else set()
    assert all(name.endswith((".png", ".pdf")) for name in inside), f"figures/ holds {inside}"
    if refused:
        raise refused


def prepare() -> None:
    """Make what takes a while once, before processes are forked."""
    logging.disable_progress_bar()
    for make in (valid_embedded, gzip_bomb, zip_bomb, parquet_bomb, pickles, model_files, small_model, run_files):
        make()


PARTS = st.tuples(TEXTS, ODDS)
READERS = [
    Reader("embedded", st.fixed_dictionaries({}, optional=FIELDS), build_embedded, read_embedded),
    *(Reader(kind, TABLE, build_table(kind), read_table) for kind in KINDS),
    Reader("corpus", PARTS, build_corpus, read_corpus),
    Reader("task", PARTS, build_task, read_task),
    Reader("profile", st.tuples(TEXTS, ODDS, st.lists(st.sampled_from(KEYS), max_size=4)), build_profile, read_profile),
    Reader("weights", ODDS, build_model("model.safetensors"), read_weights),
    Reader("head", ODDS, build_model(HEAD_FILE), read_head),
    Reader("model", ODDS, build_model("config.json", "model.safetensors", HEAD_FILE), read_model),
    Reader("tokenizer", ODDS, build_model("tokenizer.json", "tokenizer_config.json"), read_model),
    Reader("run", PARTS, build_run, read_run, 2),
    Reader("names", TEXTS, build_names, read_names, 2),
]
