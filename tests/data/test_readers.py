"""Files in the shapes that people have: tables, packed text, tagged words, saved data sets, sheets and dumps."""

import bz2
import io
import json
import lzma
import warnings

import datasets
import openpyxl
import pandas as pd
import pyarrow as pa
import pytest

from kdlib.config import Source, Task
from kdlib.data import readers, wikipedia
from kdlib.data.corpus import Corpus
from kdlib.data.sources import read_rows
from kdlib.data.tasks import load_task
from kdlib.errors import UserError

ROWS = [{"text": f"Ang ikaĺabing-{i} piña; mabuti.", "label": "ab"[i % 2]} for i in range(40)]
PACK = {".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
TAGGED = [(["Si", f"Ana{i}", "Cruz", "at", "Ben", "."], ["O", "B-PER", "I-PER", "O", "B-PER", "O"]) for i in range(20)]


@pytest.fixture
def put(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return write


def rows_of(path, **more):
    return read_rows(Source(source=str(path), **more)).to_dict("records")


def own(path, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_task(Task(name="mine", source=str(path), **more), Corpus([], [], []))


def words(task):
    return sorted((text, [task.labels[i] for i in t]) for s in (task.train, task.test) for text, t in
                  zip(s.texts, s.targets))  # fmt: skip


# -- tables


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_the_one_its_header_has(put, separator):
    assert rows_of(put("a.csv", pd.DataFrame(ROWS).to_csv(index=False, sep=separator))) == ROWS


def test_a_separator_in_a_quoted_column_name_does_not_count(put):
    assert rows_of(put("a.csv", '"text; all; of; it",label\na;b,1\n')) == [{"text; all; of; it": "a;b", "label": "1"}]


@pytest.mark.parametrize("kind", ["csv", "txt", "jsonl"])
def test_another_encoding_is_read_when_it_is_named_and_never_guessed(put, kind):
    text = "text\nAng niño sa El Niño — “sige” na; piña naman daw ang sabi niya.\n"
    if kind == "jsonl":
        text = json.dumps({"text": text}, ensure_ascii=False)
    path = put(f"a.{kind}", text.encode("cp1252"))
    with pytest.raises(UserError, match="not UTF-8 text; it looks like cp1252: name it with encoding: cp1252"):
        rows_of(path)
    assert "El Niño — “sige”" in rows_of(path, encoding="cp1252")[-1]["text"]
    with pytest.raises(UserError, match="not ascii text"):
        rows_of(path, encoding="ascii")
    with pytest.raises(UserError, match="no encoding 'cp125x'"):
        rows_of(path, encoding="cp125x")


def test_utf16_is_read_when_it_is_named(put):
    path = put("a.csv", "text\nniño\n".encode("utf-16"))
    with pytest.raises(UserError, match="looks like utf_16"):
        rows_of(path)
    assert rows_of(path, encoding="utf-16") == [{"text": "niño"}]


def test_a_json_array_is_its_records(put):
    assert rows_of(put("a.json", json.dumps(ROWS, indent=1))) == ROWS
    assert rows_of(put("b.json", "\n".join(map(json.dumps, ROWS)))) == ROWS
    with pytest.raises(UserError, match="not an object"):
        rows_of(put("c.json", "[1, 2]"))
    with pytest.raises(UserError, match="surrogates"):
        rows_of(put("d.json", '[{"text": "a"}, {"text": "\\ud83d"}]'))


@pytest.mark.parametrize("end", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_every_packing_gives_the_same_rows(put, kind, end):
    frame = pd.DataFrame(ROWS)
    data = frame.to_csv(index=False) if kind == "csv" else frame.to_json(orient="records", lines=True)
    assert rows_of(put(f"a.{kind}{end}", PACK[end](data.encode()))) == ROWS


@pytest.mark.parametrize("end", PACK)
def test_every_packing_has_the_limit_and_tells_damage(put, end, monkeypatch):
    data = PACK[end](b"linya\n" * 50_000)
    with pytest.raises(UserError, match=f"a.txt{end}: not a readable .txt file"):
        rows_of(put(f"a.txt{end}", data[:-12]))
    monkeypatch.setattr(readers, "unpacked_limit", lambda packed: 100_000)
    with pytest.raises(UserError, match=f"b.txt{end}: has more than 100,000 bytes when unpacked"):
        rows_of(put(f"b.txt{end}", data))


def test_a_sheet_is_read_as_a_table_of_text(tmp_path):
    book = openpyxl.Workbook()
    for row in [["text", "label", None], ["isa", 1, None], [None, None, None], ["dalawa", None, None]]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert rows_of(tmp_path / "a.xlsx") == [{"text": "isa", "label": "1"}, {"text": "dalawa", "label": ""}]


def test_a_sheet_without_the_package_says_what_to_do(put, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"openpyxl: pip install 'kdlib\[files\]'; or save the sheet as CSV"):
        rows_of(put("a.xlsx", b"PK"))


def test_a_sheet_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    book = openpyxl.Workbook()
    book.active.append(["text"])
    book.save(tmp_path / "a.xlsx")
    monkeypatch.setattr(readers, "unpacked_limit", lambda packed: 100)
    with pytest.raises(UserError, match="when unpacked"):
        rows_of(tmp_path / "a.xlsx")


# -- what `datasets` saves


def test_a_saved_data_set_has_its_splits_and_classes(tmp_path):
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["hindi", "oo"])}
    )
    part = {n: {"text": [f"{n} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]} for n in (30, 10)}
    splits = {"train": part[30], "test": part[10]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict(v, features=features) for k, v in splits.items()})
    saved.save_to_disk(tmp_path / "saved")
    saved["train"].save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0123abc.arrow").write_bytes(b"not for reading")
    task = own(tmp_path / "saved", test="test")
    assert task.labels == ["hindi", "oo"] and len(task.train) == 30 and task.test.texts == part[10]["text"]
    assert len(rows_of(tmp_path / "saved", split="test")) == 10
    assert rows_of(tmp_path / "one")[1] == {"text": "30 1", "label": "oo"}


# -- tagged words


def lines(separator="\t", middle=(), tagged=TAGGED):
    return "\n\n".join("\n".join(separator.join([w, *middle, t]) for w, t in zip(*s)) for s in tagged)


@pytest.mark.parametrize("name", ["a.conll", "a.txt"])
@pytest.mark.parametrize("separator, middle", [("\t", ()), (" ", ()), (" ", ("-X-", "_"))])
@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n"])
def test_conll_gives_every_sentence_with_its_tags(put, name, separator, middle, end):
    text = lines(separator, middle) + end
    task = own(put(name, text.replace("\n", "\r\n") if end == "\r\n" else text), kind="tokens")
    assert words(task) == sorted(TAGGED) and task.labels == ["O", "B-PER", "I-PER"]


def test_conll_in_parts_is_the_file(put, monkeypatch):
    path = put("a.conll", "-DOCSTART- -X- O\n\n" + lines(" ", ("x",)))
    whole = rows_of(path)
    monkeypatch.setattr(readers, "CHUNK", 100)
    assert rows_of(path) == whole and len(whole) == 20 and {row["document"] for row in whole} == {1}


def test_documents_of_conll_stay_together(put):
    parts = [TAGGED[i : i + 4] for i in range(0, 20, 4)]
    text = "".join(f"-DOCSTART- -X- O O\n\n{lines(' ', ('-X-', '_'), part)}\n\n" for part in parts)
    task = own(put("a.txt", text), kind="tokens")
    tested = [sum(text in [w for w, _ in part] for text in task.test.texts) for part in parts]
    assert set(tested) == {0, 4} and len(task.train) + len(task.test) == 20


def test_iob1_becomes_bio_and_is_told(put):
    text = "Si O\nAna I-PER\nCruz I-PER\nBen B-PER\nPasig I-LOC\n\n"
    with pytest.warns(UserWarning, match="started with I-"):
        task = load_task(Task(name="m", kind="tokens", source=put("a.conll", text + lines(" "))), Corpus([], [], []))
    found = dict((tuple(w), t) for w, t in words(task))
    assert found["Si", "Ana", "Cruz", "Ben", "Pasig"] == ["O", "B-PER", "I-PER", "B-PER", "B-LOC"]
    assert task.origin.notes == ("2 entities started with I-, now with B-",)


@pytest.mark.parametrize("line", ["Ana", "Ana X O"])
def test_a_conll_line_with_another_number_of_columns_is_named(put, line):
    with pytest.raises(UserError, match="line 4: . columns instead of 2"):
        own(put("a.conll", f"a O\nb O\n\n{line}\n"), kind="tokens")


def test_comments_in_conll_are_left_out_but_a_hash_is_a_word(put):
    text = "# id 1 domain=en\n" + lines(" ") + "\n\n# id 2 domain=en\n# O\nAna B-PER\n"
    task = own(put("a.conll", text), kind="tokens")
    assert (["#", "Ana"], ["O", "B-PER"]) in words(task)


UNIVERSAL = """# newdoc
# text = Nag-ikot si Ana.
1\tNag-ikot\tikot\tVERB\tV\tAspect=Perf|Mood=Ind\t0\troot\t_\t_
2-3\tsiAna\t_\t_\t_\t_\t_\t_\t_\t_
2\tsi\tsi\tDET\tD\t_\t1\tcase\t_\t_
3\tAna{}\tAna\tPROPN\tN\t_\t1\tnsubj\t_\t_
3.1\twala\t_\t_\t_\t_\t_\t_\t_\t_
4\t.\t.\tPUNCT\tP\t_\t1\tpunct\t_\t_

"""


@pytest.mark.parametrize(
    "label, tags",
    [
        ("label", ["VERB", "DET", "PROPN", "PUNCT"]),
        ("upos", ["VERB", "DET", "PROPN", "PUNCT"]),
        ("xpos", ["V", "D", "N", "P"]),
        ("Aspect", ["Perf", "_", "_", "_"]),
    ],
)
def test_conllu_gives_words_and_any_of_their_tags(put, label, tags):
    task = own(put("a.conllu", "".join(UNIVERSAL.format(i) for i in range(20))), kind="tokens", label=label)
    assert words(task)[0] == (["Nag-ikot", "si", "Ana0", "."], tags) and "O" not in task.labels


# -- rows that lack something


def test_labels_are_trimmed_and_told(put):
    rows = [*ROWS, {"text": "isa pa", "label": "a "}, {"text": "dalawa pa", "label": "\tb"}]
    with pytest.warns(UserWarning, match="2 labels had spaces"):
        task = load_task(Task(name="m", source=put("a.json", json.dumps(rows))), Corpus([], [], []))
    assert task.labels == ["a", "b"] and task.origin.notes == ("2 labels had spaces around them, which are removed",)


@pytest.mark.parametrize("kind, empty", [("json", None), ("json", "  "), ("csv", "")])
def test_rows_without_text_or_label_are_refused_or_left_out_and_counted(put, kind, empty):
    rows = [*ROWS, {"text": empty, "label": "a"}, {"text": "isa pa", "label": empty}]
    path = put(f"a.{kind}", json.dumps(rows) if kind == "json" else pd.DataFrame(rows).to_csv(index=False))
    with pytest.raises(UserError, match="2 of 42 rows have no text or no label, such as row 41 .*skip_empty: true"):
        own(path)
    task = own(path, skip_empty=True)
    assert task.origin.skipped == 2 and len(task.train) + len(task.test) == 40


def test_other_errors_keep_the_row_numbers_of_the_file(put):
    rows = [{"text": "", "x": 1, "y": 0}, *[{"text": f"a{i}", "x": i % 2, "y": 1} for i in range(30)]]
    rows[5] = {"text": "b", "x": 7, "y": 1}
    with pytest.raises(UserError, match="row 6: column 'x' holds 7"):
        own(put("a.json", json.dumps(rows)), kind="multilabel", label=["x", "y"], skip_empty=True)


# -- a Wikipedia


def dump(pages):
    body = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns>{more}<revision><text>{text}</text></revision></page>"
        for title, ns, more, text in pages
    )
    names = "".join(f'<namespace key="{k}">{v}</namespace>' for k, v in {6: "Talaksan", 14: "Kategorya", 0: ""}.items())
    head = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">'
    return f"{head}<siteinfo><namespaces>{names}</namespaces></siteinfo>{body}</mediawiki>"


def test_a_wikipedia_dump_is_its_articles_without_markup(put):
    text = (
        "{{Infobox|a=b}}'''Ang Pasig''' ay [[lungsod]] sa [[Kalakhang Maynila|Maynila]]."
        "&lt;ref&gt;Aklat&lt;/ref&gt;\n\n"
        "== Kasaysayan ==\n* Itinatag noong 1573.\n{| class=x\n|a\n|}\n[[Talaksan:a.jpg|thumb|Larawan]]"
        "[[Kategorya:Mga lungsod]]"
    )
    pages = [
        ("Pasig", 0, "", text),
        ("Usapan:Pasig", 1, "", "usapan"),
        ("Pasig City", 0, '<redirect title="Pasig"/>', "#REDIRECT"),
        *[(f"Bayan {i}", 0, "", f"Ang bayan {i}.") for i in range(250)],
    ]
    rows = rows_of(put("tlwiki-pages-articles.xml.bz2", bz2.compress(dump(pages).encode())))
    assert rows[0] == {"text": "Ang Pasig ay lungsod sa Maynila.\nItinatag noong 1573.", "document": "Pasig"}
    assert [row["document"] for row in rows[1:]] == [f"Bayan {i}" for i in range(250)]


def test_a_wikipedia_dump_is_streamed():
    class Endless(io.RawIOBase):
        """A dump that never ends."""

        def __init__(self):
            self.page = dump([("A", 0, "", "Isa.")]).removesuffix("</mediawiki>").encode()

        def readable(self):
            return True

        def readinto(self, buffer):
            part = self.page or b"<page><title>A</title><ns>0</ns><revision><text>Isa.</text></revision></page>"
            self.page = b""
            buffer[: len(part)] = part
            return len(part)

    assert len(next(wikipedia.articles(io.BufferedReader(Endless())))) == wikipedia.AT_ONCE


@pytest.mark.parametrize("text", ["<rss></rss>", "<mediawiki><page>", "hindi ito xml"])
def test_xml_that_is_no_dump_is_refused(put, text):
    with pytest.raises(UserError, match="a.xml: not a readable .xml file"):
        rows_of(put("a.xml", text))


def test_a_zip_holds_files_of_any_kind(put):
    import zipfile

    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("saved/train.json.xz", lzma.compress(json.dumps(ROWS).encode()))
        archive.writestr("saved/dataset_info.json", "{}")
    assert rows_of(put("a.zip", data.getvalue())) == ROWS
