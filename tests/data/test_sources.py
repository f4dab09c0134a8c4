"""Rows from files of every kind, and one line for whatever is wrong with them."""

import gzip
import io
import json
import random
import stat
import warnings
import zipfile

import datasets
import pandas as pd
import pytest

from kdlib.config import Source
from kdlib.data import hub, readers
from kdlib.data.readers import chunks, read_file, suffix
from kdlib.data.sources import digest, embedded_rows, looks_local, read_rows, stream_rows
from kdlib.errors import UserError

ROWS = [
    {"text": "Unang pangungusap.", "label": "a"},
    {"text": 'May "sipi", kuwit,\tat tab.', "label": "b"},
    {"text": "NA", "label": "12"},
    {"text": "12", "label": "NA"},
    {"text": "ñ — 日本 🙂", "label": "01"},
]
SCRIPTS = {  # with joiners, marks and digits of their own, and a rare character beyond the first plane
    "Thai": "ภาษาไทย ไม่มีจุดจบประโยค ๑๒๓",
    "Han": "这是，“引用”。𠮷野家　好吗？",
    "Arabic": "این می\u200cشود؛ «نعم» ١٢٣ 500",
    "Devanagari": "क्\u200dष यह है। श्र १२३",
    "Amharic": "ሰላም፡ለዓለም። እንዴት፧ ፩",
    "Burmese": "မြန်မာ ဘာသာ။ ၁၂၃",
}
FORMATS = ["jsonl", "csv", "tsv", "parquet"]


def content(kind, rows=ROWS):
    table = pd.DataFrame(rows)
    if kind == "txt":
        return "\n".join(row["text"] for row in rows).encode()
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "parquet":
        data = io.BytesIO()
        table.to_parquet(data)
        return data.getvalue()
    return table.to_csv(index=False, sep="," if kind == "csv" else "\t").encode()


@pytest.fixture
def put(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return write


def rows_of(path, columns=(), split=None, **source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_rows(Source(source=str(path), **source), list(columns), split)


def texts(path, **more):
    return list(rows_of(path, ["text"], **more)["text"])


def refusal(path, *columns, **more):
    with pytest.raises(UserError) as caught:
        rows_of(path, columns, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is there is read


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows(put, kind, packed):
    data = content(kind)
    path = put(f"rows.{kind}{packed}", gzip.compress(data) if packed else data)
    rows = rows_of(path, ["text", "label"])
    assert rows.to_dict("records") == ROWS
    assert all(isinstance(value, str) for row in rows.to_dict("records") for value in row.values())


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("kind", ["txt", *FORMATS])
def test_every_script_comes_back_as_it_is(put, kind, text):
    column = "text" if kind == "txt" else text.split()[0]
    rows = rows_of(put(f"{column}.{kind}", content(kind, [{"text": text, column: text}] * 2)), [column])
    assert rows[column].tolist() == [text, text]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_txt_gives_a_row_a_line(put, packed):
    data = content("txt")
    path = put(f"rows.TXT{packed}", gzip.compress(data) if packed else data)
    assert texts(path) == [row["text"] for row in ROWS]


def test_txt_documents_are_blocks_between_empty_lines(put):
    rows = rows_of(put("a.txt", "\n\na\nb\n\n\n  \nc\n\nd\n"))
    assert rows["text"].tolist() == list("abcd")
    first, second, third, fourth = rows["document"]
    assert first == second and len({first, third, fourth}) == 3


def test_txt_without_empty_lines_has_a_document_a_line(put):
    assert rows_of(put("a.txt", "a\nb\nc\n"))["document"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize(
    "values", [["1", "2"], ["01", "2.50"], ["True", "False"], ["NA", "nan"], ["1e5", "null"], ["", "x"]]
)
def test_tables_do_not_guess_what_text_means(put, kind, values):
    rows = [{"id": "7", "text": value} for value in values]
    assert texts(put(f"a.{kind}", content(kind, rows))) == values


def test_jsonl_keeps_whole_numbers_beside_missing_ones(put):
    path = put("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n{"text": "2020-01-01", "created_at": 3}\n')
    rows = rows_of(path)
    assert rows["label"][0] == 1 and isinstance(rows["label"][0], int)
    assert rows["text"][2] == "2020-01-01" and rows["created_at"][2] == 3


def test_jsonl_keeps_lists_and_odd_line_ends_inside_text(put):
    row = {"text": "a\u2028b\x85c\n", "tags": ["O", "B-PER"]}
    assert rows_of(put("a.jsonl", json.dumps(row, ensure_ascii=False) + "\r\n\r\n")).to_dict("records") == [row]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv"])
def test_windows_line_ends_and_byte_order_mark(put, kind):
    rows = [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]
    data = b"\xef\xbb\xbf" + content(kind, rows).replace(b"\n", b"\r\n")
    assert texts(put(f"a.{kind}", data)) == ["a", "c"]


def test_quoted_line_breaks_in_csv(put):
    assert texts(put("a.csv", 'text,label\r\n"a\nb",1\r\n')) == ["a\nb"]


def test_empty_lines_in_csv_are_no_rows(put):
    assert texts(put("a.csv", "text,label\n\na,1\n\n\nb,2\n\n")) == ["a", "b"]


def test_short_csv_rows_are_filled_with_nothing(put):
    assert rows_of(put("a.csv", "text,label\na\n")).to_dict("records") == [{"text": "a", "label": ""}]


# -- folders


def test_folder_holds_all_files_below_it(put, tmp_path):
    put("f/a.txt", "a\n")
    put("f/deep/b.jsonl.gz", gzip.compress(b'{"text": "b"}\n'))
    put("f/c.csv", "text\nc\n")
    put("f/ignored.md", "no")
    put("f/.ipynb_checkpoints/a.txt", "copy")
    put("f/folder.txt/d.tsv", "text\nd\n")
    assert sorted(texts(tmp_path / "f")) == list("abcd")


def test_documents_of_several_txt_files_stay_apart(put, tmp_path):
    for name in "xyz":
        put(f"f/{name}.txt", f"{name}1\n{name}2\n\n{name}3\n")
    documents = rows_of(tmp_path / "f").groupby("document")["text"].apply(list).tolist()
    assert documents == [[f"{name}1", f"{name}2"] if k == 0 else [f"{name}3"] for name in "xyz" for k in range(2)]


def test_folder_with_splits(put, tmp_path):
    put("f/train-0.csv", "text\na\n")
    put("f/data_train1.csv", "text\nb\n")
    put("f/test.csv", "text\nt\n")
    put("f/latest.csv", "text\nn\n")
    put("f/validation/0.csv", "text\nv\n")
    assert sorted(texts(tmp_path / "f")) == ["a", "b"]
    assert texts(tmp_path / "f", split="test") == ["t"]
    assert texts(tmp_path / "f", split="validation") == ["v"]
    assert texts(str(tmp_path / "f"), split=str(tmp_path / "f" / "latest.csv")) == ["n"]
    assert "'dev'" in refusal(tmp_path / "f", split="dev")


def test_folder_without_files(tmp_path):
    assert "no .txt" in refusal(tmp_path)


def test_home_folder_is_understood(put, tmp_path, monkeypatch):
    put("f/a.txt", "a\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/f") == texts("~/f/a.txt") == ["a"]


# -- what is wrong is told


def test_missing_column_lists_those_there_are(put):
    text = refusal(put("a.csv", "tekst,label\na,1\n"), "text", "label")
    assert "no column 'text'" in text and "'tekst', 'label'" in text


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "a.csv",
        "./a",
        "~/nothing",
        "~nobody-here/a.txt",
        "a.doc",
        "a",
        "a\0/b",
        "x" * 5000,
        "x" * 5000 + ".txt",
    ],
)
def test_missing_file(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(name)


def test_file_of_an_unknown_kind(put):
    assert ".jsonl" in refusal(put("a.doc", "{}"))


@pytest.mark.parametrize("kind", ["txt", *FORMATS])
@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n\r\n"])
def test_empty_file(put, kind, data):
    refusal(put(f"a.{kind}", data), "text")
    refusal(put(f"a.{kind}.gz", gzip.compress(data)), "text")


@pytest.mark.parametrize(
    "name, data",
    [("a.csv", "text,label\n"), ("a.jsonl", "{}\n{}\n"), ("a.parquet", content("parquet", [])), ("a.txt", " \n\t\n")],
)
def test_no_rows(put, name, data):
    assert "no rows" in refusal(put(name, data), "text")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv"])
@pytest.mark.parametrize("coding", ["latin-1", "utf-16", "cp1252"])
def test_wrong_encoding(put, kind, coding):
    text = content(kind, [{"text": "Niño", "label": "a"}] * 2).decode().encode(coding)
    assert "UTF-8" in refusal(put(f"a.{kind}", text))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv"])
def test_nul_bytes(put, kind):
    assert "NUL" in refusal(put(f"a.{kind}", content(kind).replace(b"U", b"\0")))


@pytest.mark.parametrize(
    "data",
    [
        "[1, 2]",
        "1",
        '"a"',
        "null",
        '[{"text": "a"}]',
        '{"text": "a"',
        '{"text": "\\ud83d"}',
        "[" * 100_000,
        '{"a": ' * 5000,
    ],
)
def test_broken_line_of_jsonl_is_named(put, data):
    assert "line 3" in refusal(put("a.jsonl", '{"text": "a"}\n\n' + data + "\n"))


def test_whole_emoji_in_escapes_is_text(put):
    assert texts(put("a.jsonl", '{"text": "\\ud83d\\ude42"}')) == ["🙂"]


@pytest.mark.parametrize(
    "data", ["text,label\na,1,\nb,2,\n", "text,label\na,b,c,d\n", "text,label\na,1\nb,2,3\n", 'text\n"a\n']
)
def test_csv_rows_that_do_not_fit_the_header(put, data):
    refusal(put("a.csv", data))


@pytest.mark.parametrize("kind", ["txt", *FORMATS])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_rubbish_is_rows_or_a_user_error(put, kind, packed):
    rng = random.Random(f"{kind}{packed}")
    good = content(kind)
    for number in range(60):
        data = bytearray(good)
        if number % 3 == 0:
            data = bytearray(rng.randbytes(rng.randrange(1, 300)))
        elif number % 3 == 1:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randrange(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        if packed and number % 2:
            data = bytearray(gzip.compress(bytes(data)))
        elif packed:
            data = bytearray(gzip.compress(good))
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path = put(f"a.{kind}{packed}", bytes(data))
        try:
            assert len(rows_of(path))
        except UserError as error:
            assert path in str(error) and "\n" not in str(error)


# -- zips


def packed(members, **options):
    """The bytes of a zip: members are name -> content, or ZipInfo -> content."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return data.getvalue()


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """A current folder in which nothing may appear, and nothing beside it."""
    (tmp_path / "inner" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inner" / "here")
    yield
    assert sorted(path.name for path in (tmp_path / "inner").rglob("*")) == ["here"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_zip_is_read_as_the_folder_it_holds(put, untouched, kind, gz):
    pack = gzip.compress if gz else bytes
    names = {f"deep/{split}.{kind}{gz}": pack(content(kind, ROWS[:n])) for split, n in (("train", 3), ("test", 2))}
    path = put("a.ZIP", packed(names | {"readme.md": "no", "__MACOSX/deep/._train.csv": "no", ".train.csv": "no"}))
    assert rows_of(path, ["text", "label"]).to_dict("records") == ROWS[:3]
    assert rows_of(path, split="test").to_dict("records") == ROWS[:2]
    assert rows_of(path, split=f"deep/test.{kind}{gz}").to_dict("records") == ROWS[:2]
    assert "'dev'" in refusal(path, split="dev")


def test_all_files_of_a_zip_without_splits(put, untouched):
    path = put("a.zip", packed({"b.txt": "b1\nb2\n\nb3\n", "a.txt": "a1\n"}))
    rows = rows_of(path)
    assert rows["text"].tolist() == ["a1", "b1", "b2", "b3"] and rows["document"].tolist() == [0, 1, 1, 2]


def test_file_named_in_full_comes_before_files_named_alike(put, tmp_path):
    files = {"train.csv": "text\na\n", "train-old.csv": "text\nb\n"}
    zipped = put("a.zip", packed(files))
    for name, text in files.items():
        put(f"f/{name}", text)
    for place in (zipped, tmp_path / "f"):
        assert sorted(texts(place)) == ["a", "b"]
        assert texts(place, split="train.csv") == ["a"]
        assert list(read_rows(Source(source=str(place), split="train.csv"))["text"]) == ["a"]


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name", ["../train.csv", "a/../../train.csv", "/tmp/train.csv", "..\\train.csv", "\\train.csv", link("train.csv")]
)
def test_zip_with_a_way_out_is_refused(put, untouched, name):
    path = put("a.zip", packed({"train.csv" if isinstance(name, str) else "other.csv": "text\na\n", name: "text\nb\n"}))
    assert "elsewhere" in refusal(path)


def test_zip_that_unpacks_to_too_much_is_refused(put, untouched, monkeypatch):
    monkeypatch.setattr(hub, "LARGEST", 10_000)
    zeros = "text\n" + "0" * 20_000
    assert len(packed({"train.csv": zeros})) < 1000
    assert "more than" in refusal(put("a.zip", packed({"train.csv": zeros})))
    assert "more than" in refusal(put("b.zip", packed({f"{i}.csv": zeros[:3000] for i in range(5)})))
    assert "when unpacked" in refusal(put("c.zip", packed({"train.csv.gz": gzip.compress(zeros.encode())})))


def test_member_larger_than_it_states_is_refused(put, untouched):
    data = bytearray(packed({"train.csv": "text\n" + "0" * 20_000}))
    size = (20_005).to_bytes(4, "little")
    assert data.count(size) == 2
    path = put("a.zip", bytes(data.replace(size, (100).to_bytes(4, "little"))))
    assert "train.csv: cannot be unpacked" in refusal(path)


def test_zip_that_is_none_or_locked(put, untouched):
    good = packed({"train.csv": "text\na\n"})
    flag = good.index(b"PK\x01\x02") + 8
    locked = bytearray(good)
    locked[6] |= 1
    locked[flag] |= 1
    assert "unpacked" in refusal(put("locked.zip", bytes(locked)))
    assert "not a readable zip" in refusal(put("text.zip", "text\na\n"))
    assert "not a readable zip" in refusal(put("cut.zip", good[:-10]))
    assert "no .txt" in refusal(put("empty.zip", packed({})))
    assert "no such file" in refusal("nowhere.zip")


def test_rubbish_zips_are_rows_or_a_user_error(put, untouched):
    rng = random.Random(0)
    good = packed({"train.jsonl": content("jsonl"), "b/test.csv.gz": gzip.compress(content("csv"))})
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path = put("a.zip", bytes(data))
        try:
            assert len(rows_of(path))
        except UserError as error:
            assert path in str(error) and "\n" not in str(error)


# -- classes, streams, and what was read


def test_classes_in_a_local_parquet_file_have_their_names(tmp_path):
    names = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "tags": datasets.List(names)})
    rows = {"text": ["a", "b", "c"], "label": [1, -1, None], "tags": [[0, 1], [], None]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", ["text"])
    assert rows["label"][0] == "B-PER" and pd.isna(rows["label"][1]) and pd.isna(rows["label"][2])
    assert list(rows["tags"][0]) == ["O", "B-PER"] and list(rows["tags"][1]) == [] and rows["tags"][2] is None


def test_stream_reads_a_file_when_its_rows_are_asked_for(put, tmp_path):
    for number in range(3):
        put(f"f/{number}.jsonl", "".join(json.dumps({"text": f"{number}-{k}"}) + "\n" for k in range(4)))
    put("f/3.jsonl", "broken")
    source = Source(source=str(tmp_path / "f"))
    rows, commit = stream_rows(source, ["text"])
    assert [next(rows)["text"] for _ in range(12)] == [f"{n}-{k}" for n in range(3) for k in range(4)]
    assert commit is None
    with pytest.raises(UserError, match="3.jsonl: not a readable"):
        next(rows)
    with pytest.raises(UserError, match="no column 'body'"):
        next(stream_rows(source, ["body"])[0])


def test_stream_of_a_zip_is_its_rows(put):
    path = put("a.zip", packed({"b.txt": "b1\n\nb2\n", "a.txt": "a1\n"}))
    rows, _ = stream_rows(Source(source=path))
    assert list(rows) == rows_of(path).to_dict("records")


def test_a_single_file_has_no_splits(put):
    assert "no split 'test'" in refusal(put("a.csv", "text\na\n"), split="test")


def test_digest_tells_content_and_order():
    rows = [["a", 1], ["ñ", 0], ["\ud83d", 1]]
    assert digest(rows) == digest(iter(rows)) != digest(rows[::-1])
    assert digest([["a"], ["b"]]) != digest([["a", "b"]]) and len(digest([])) == 64


# -- names, and what comes with the kit


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.csv", ".csv"),
        ("A.TXT.GZ", ".txt"),
        ("a.parquet.gz", ".parquet"),
        ("a.JSON.xz", ".json"),
        ("a.doc", None),
        ("gz", None),
    ],
)
def test_kind_by_name(tmp_path, name, kind):
    assert suffix(tmp_path / name) == kind


@pytest.mark.parametrize(
    "name, local",
    [
        ("a.csv", True),
        ("a.ZIP", True),
        ("./a", True),
        ("/a", True),
        ("~/a", True),
        ("owner/name", False),
        ("train", False),
    ],
)
def test_local_names(name, local):
    assert looks_local(name) == local


@pytest.mark.parametrize(
    "name, count", [("documents", 2590), ("sentiment", 1000), ("dengue", 800), ("entities", 900), ("parallel", 500)]
)
def test_embedded_files(name, count):
    rows = embedded_rows(name)
    assert len(rows) == count and rows["id"].is_unique and not rows.isna().any(axis=None)


def test_file_that_vanished_is_told(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "a.txt")


# -- files of any size


LINES = [f"Linya {i} ng teksto 😀" for i in range(200)]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", "\n".join(LINES)),
        ("b.txt", "\n\n".join("\n".join(LINES[i : i + 1 + i % 3]) for i in range(0, 198, 3))),
        ("c.txt", "\r\n\r\n".join(LINES)),
        ("a.jsonl", "\n".join(json.dumps({"text": line, "n": i}) for i, line in enumerate(LINES))),
        ("a.csv", "text,label\n" + "".join(f'"{line}\n""oo"", sige",{len(line)}\n' for line in LINES)),
        ("a.tsv", "text\tlabel\n" + "".join(f"{line}\t\n" for line in LINES)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_of_a_file_are_the_file(name, text, packed, tmp_path, monkeypatch):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(("\ufeff" + text).encode()) if packed else ("\ufeff" + text).encode())
    whole = read_file(path)
    monkeypatch.setattr(readers, "CHUNK", 600)
    found = list(chunks(path))
    assert pd.concat(found, ignore_index=True).equals(whole)
    assert len(found) > 2 or name.endswith("sv")
    assert read_rows(Source(source=str(path))).equals(whole)


def test_pieces_of_a_parquet_file_are_the_file(tmp_path, monkeypatch):
    table = pd.DataFrame({"text": LINES, "n": range(200)})
    table.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(readers, "CHUNK", 100)
    assert pd.concat(chunks(tmp_path / "a.parquet"), ignore_index=True).equals(table)


@pytest.mark.parametrize(
    "name, data, told",
    [
        ("a.jsonl", b'{"text": "a"}\n' * 200 + b"{broken\n", "not a readable .jsonl file .line 201: "),
        ("a.txt", b"linya\n" * 200 + b"\0", "holds NUL bytes"),
        ("a.csv", b"text\n" + b"linya\n" * 200 + b"\0\n", "holds NUL bytes"),
        ("a.csv", b"text\n" + b"linya\n" * 200 + b"\xff\n", "not UTF-8 text"),
        ("a.txt", b"linya\n" * 200 + b"\xff\n", "not UTF-8 text"),
        ("a.csv", b"text\n" + b"linya\n" * 200 + b"a,b,c\n", "not a readable .csv file"),
        ("a.parquet", b"PAR1" * 300, "not a readable .parquet file"),
        ("a.txt.gz", gzip.compress(b"linya\n" * 200, mtime=0)[:-5], "not a readable .txt file"),
    ],
)
def test_what_is_wrong_in_a_later_piece_is_told(name, data, told, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(readers, "CHUNK", 64)
    with pytest.raises(UserError, match=rf"{name}.*{told}"):
        list(chunks(tmp_path / name))


def test_gz_file_that_unpacks_to_far_more_is_refused_on_the_way(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"linya\n" * 10_000))
    monkeypatch.setattr(readers, "CHUNK", 64)
    monkeypatch.setattr(readers, "unpacked_limit", lambda packed: 10 * packed)
    with pytest.raises(UserError, match="when unpacked; not read"):
        list(chunks(tmp_path / "a.txt.gz"))
