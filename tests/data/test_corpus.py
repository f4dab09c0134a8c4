"""The corpus: split by document, no matter the order, without leaks; sentences and windows lose no text."""

import json
import random

import pytest
import tiny

from kdlib import config
from kdlib.config import load_profile
from kdlib.data import corpus as module
from kdlib.data.corpus import (
    Corpus,
    Document,
    check_leaks,
    draw,
    load_parallel,
    sentences,
    split_sentences,
    translation_pairs,
    windows,
    without,
)
from kdlib.data.lazy import Lazy
from kdlib.data.lazy import read as documents_of
from kdlib.errors import UserError


@pytest.fixture(scope="module")
def embedded():
    return tiny.corpus_of(load_profile("workshop"))


def parts(corpus):
    return {"train": corpus.train, "heldout": corpus.heldout, "test": corpus.test}


def names(corpus):
    return {part: [d.id for d in documents] for part, documents in parts(corpus).items()}


def own(source, **more):
    return tiny.corpus_of(load_profile("workshop", {"corpus.source": str(source), "language": "xx"} | more))


def text_of(count, start=0):
    return "\n\n".join(
        f"Dokumento {i} una. Dokumento {i} ikalawa.\nDokumento {i} ikatlo!" for i in range(start, start + count)
    )


@pytest.fixture
def txt(tmp_path):
    def write(text, name="mine.txt"):
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return write


# -- the embedded corpus


def test_embedded_split_sizes(embedded, documents):
    sizes = {part: len(found) for part, found in parts(embedded).items()}
    assert sizes == {"train": 2268, "heldout": 70, "test": 252}
    assert sum(sizes.values()) == len(documents)


def test_every_document_is_whole_and_in_one_part(embedded, documents):
    whole = {d["id"]: d["sentences"] for d in documents}
    found = [d for part in parts(embedded).values() for d in part]
    assert sorted(d.id for d in found) == sorted(whole)
    assert all(d.sentences == whole[d.id] for d in found)


def test_no_sentence_is_in_two_parts(embedded):
    train, heldout, test = (set(sentences(part)) for part in parts(embedded).values())
    assert not train & heldout and not train & test and not heldout & test


def test_test_documents_are_balanced_over_topics_and_test_registers(embedded):
    cells = [(d.meta["topic"], d.meta["register"]) for d in embedded.test]
    assert {cells.count(cell) for cell in cells} == {18} and len(set(cells)) == 7 * 2
    assert {register for _, register in cells} == {"everyday", "story"}


def test_every_topic_and_register_watches_and_trains(embedded):
    for part in (embedded.heldout, embedded.train):
        assert len({(d.meta["topic"], d.meta["register"]) for d in part}) == 35


def test_embedded_split_does_not_depend_on_row_order_or_seed(embedded, monkeypatch):
    shuffled = module.embedded_documents()
    random.Random(5).shuffle(shuffled)
    monkeypatch.setattr(module, "embedded_documents", lambda: shuffled)
    assert names(tiny.corpus_of(load_profile("workshop", "seed=9"))) == names(embedded)


def test_max_documents_draws_by_seed_and_leaves_the_rest_alone(embedded):
    first, again, other = (
        tiny.corpus_of(load_profile("workshop", f"corpus.max_documents=40 seed={s}")) for s in (0, 0, 1)
    )
    assert len(first.train) == 40 and names(first) == names(again)
    assert {d.id for d in first.train} < {d.id for d in embedded.train} and names(first)["train"] != names(other)[
        "train"
    ]
    assert names(first)["test"] == names(embedded)["test"] and names(first)["heldout"] == names(embedded)["heldout"]


@pytest.mark.parametrize("language", ["ceb", "tl", "eng"])
def test_embedded_corpus_is_for_its_language_only(language):
    with pytest.raises(UserError, match=f"Tagalog.*'{language}'.*corpus.source"):
        tiny.corpus_of(load_profile("workshop", f"language={language}"))


@pytest.mark.parametrize("part", ["heldout", "test"])
def test_planted_leak_is_caught(embedded, part):
    leaking = Document("leak", ["Bago ito.", parts(embedded)[part][3].sentences[1]])
    with pytest.raises(UserError, match=f"1 {part} sentences"):
        check_leaks(Corpus([*embedded.train, leaking], embedded.heldout, embedded.test))


# -- one's own


def test_own_txt_keeps_every_document_whole(txt):
    corpus = own(txt(text_of(40)))
    assert (len(corpus.train), len(corpus.heldout), corpus.test) == (39, 1, [])
    assert all(
        len(d.sentences) == 3 and len({s.split()[1] for s in d.sentences}) == 1 for d in corpus.train + corpus.heldout
    )
    assert len({s for d in corpus.train + corpus.heldout for s in d.sentences}) == 120


def test_own_txt_without_empty_lines_has_a_document_a_line(txt):
    corpus = own(txt("\n".join(f"Linya {i}. At {i}." for i in range(20))))
    assert len(corpus.train) == 19 and len(corpus.heldout) == 1


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.1, 4), (0.3, 12)])
def test_share_of_documents_held_out(txt, share, count):
    corpus = own(txt(text_of(40)), **{"corpus.heldout": share})
    assert len(corpus.heldout) == count and len(corpus.train) == 40 - count


def test_own_split_does_not_depend_on_order(txt):
    blocks = text_of(40).split("\n\n")
    first = own(txt("\n\n".join(blocks)))
    second = own(txt("\n\n".join(reversed(blocks))))
    for part in ("train", "heldout"):
        assert [d.sentences for d in parts(first)[part]] == [d.sentences for d in parts(second)[part]]


def test_own_corpus_has_no_leaks(txt):
    corpus = own(txt(text_of(40)), **{"corpus.heldout": 0.2})
    check_leaks(corpus)
    assert not set(sentences(corpus.train)) & set(sentences(corpus.heldout))


def test_sentence_on_both_sides_is_taken_from_training(txt):
    shared = "Ito ay nasa lahat."
    corpus = own(txt("\n\n".join(f"{shared} Sarili {i}." for i in range(20))))
    assert shared in sentences(corpus.heldout) and shared not in sentences(corpus.train)
    assert len(corpus.train) == 19 and all(d.sentences for d in corpus.train)


def test_documents_by_column(tmp_path):
    rows = [{"body": f"Una {i}. Dalawa {i}.", "page": f"p{i // 2}"} for i in range(40)] + [{"body": None, "page": "p0"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = own(tmp_path / "a.jsonl", **{"corpus.text": "body", "corpus.document": "page"})
    assert len(corpus.train) + len(corpus.heldout) == 20
    assert all(len(d.sentences) == 4 for d in corpus.train + corpus.heldout)


def test_rows_without_a_document_are_kept(tmp_path):
    rows = [{"text": f"Una {i}.", "page": f"p{i}" if i else None} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = own(tmp_path / "a.jsonl", **{"corpus.document": "page"})
    assert "Una 0." in sentences(corpus.train + corpus.heldout)


def test_digits_are_text(txt):
    corpus = own(txt("text\n" + "\n".join(str(i) for i in range(20)), "a.csv"))
    assert sorted(sentences(corpus.train + corpus.heldout), key=int) == [str(i) for i in range(20)]


@pytest.mark.parametrize("text", [text_of(9), "Isa.", "Isa.\n\n" * 9])
def test_too_few_documents(txt, text):
    with pytest.raises(UserError, match="10 are needed"):
        own(txt(text))


def test_nothing_but_repetition(txt):
    with pytest.raises(UserError, match="nothing is left"):
        own(txt("Isa lang.\n\n" * 20))


@pytest.mark.parametrize("override", [{"corpus.text": "body"}, {"corpus.document": "page"}])
def test_missing_column(txt, override):
    with pytest.raises(UserError, match="no column"):
        own(txt(text_of(20)), **override)


# -- streams, other places, and what was read


def rows_in(folder, count, size=6, column="text", **more):
    for number in range(count):
        rows = [{column: f"Dokumento {number}-{i} una.", **more} for i in range(size)]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_stream_takes_the_first_documents_and_reads_no_further(tmp_path):
    rows_in(tmp_path / "f", 3)
    (tmp_path / "f" / "3.jsonl").write_text("broken")
    corpus = own(tmp_path / "f", **{"corpus.streaming": True, "corpus.max_documents": 18})
    found = sentences(corpus.train + corpus.heldout)
    assert sorted(found) == sorted(f"Dokumento {n}-{i} una." for n in range(3) for i in range(6))
    with pytest.raises(UserError, match="3.jsonl"):
        own(tmp_path / "f", **{"corpus.streaming": True, "corpus.max_documents": 19})


@pytest.mark.parametrize("column", ["corpus.document", None])
def test_streamed_documents_are_whole(tmp_path, column):
    name = "page" if column else "document"
    rows = [{"text": f"Una {i}.", name: f"p{i // 4}"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = {column: "page"} if column else {}
    corpus = own(tmp_path / "a.jsonl", **{"corpus.streaming": True, "corpus.max_documents": 12} | more)
    assert sorted(d.id for d in corpus.train + corpus.heldout) == sorted(f"p{i}" for i in range(12))
    assert all(len(d.sentences) == 4 for d in corpus.train + corpus.heldout)


def test_streaming_all_is_reading_all(txt, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        txt(text_of(20, 20 * "ab".index(name)), f"{name}/x.txt")
    (tmp_path / "b" / "x.txt").rename(tmp_path / "a" / "y.txt")
    streamed = own(tmp_path / "a", **{"corpus.streaming": True, "corpus.max_documents": 1000})
    assert streamed == own(tmp_path / "a") and streamed.origin == own(tmp_path / "a").origin


def test_streaming_needs_an_end():
    with pytest.raises(UserError, match="corpus: streaming needs max_documents"):
        load_profile("workshop", "corpus.streaming=true corpus.source=a.txt")


def test_other_places_are_tried_in_order(txt, tmp_path):
    rows_in(tmp_path / "f", 4, column="body")
    places = [{"source": str(txt("Isa.", "short.txt"))}, {"source": str(tmp_path / "f"), "text": "body"}]
    corpus = own(tmp_path / "nowhere.txt", **{"corpus.fallbacks": places})
    assert len(corpus.train) + len(corpus.heldout) == 24
    assert corpus.origin.source == str(tmp_path / "f") and corpus.origin.rows == {"train": 23, "heldout": 1, "test": 0}
    first, second = corpus.origin.passed_over
    assert "no such file" in first and "10 are needed" in second
    with pytest.raises(UserError, match=r"corpus: none of its 2 sources can be read: \(1\) .*no such file; \(2\) .*10"):
        own(tmp_path / "nowhere.txt", **{"corpus.fallbacks": places[:1]})


def test_same_text_in_another_file_has_the_same_hash(txt, tmp_path):
    texts = [f"Dokumento {i} una. Ikalawa, ng {i}!" for i in range(20)]
    places = [txt("\n".join(texts), "a.txt"), txt("\n".join(json.dumps({"text": t}) for t in texts), "a.jsonl")]
    places.append(txt("text\n" + "".join(f'"{t}"\n' for t in texts), "a.csv"))
    first, *others = [own(place).origin.sha256 for place in places]
    assert others == [first, first] and first != own(txt("\n".join(texts[:-1]), "b.txt")).origin.sha256


def test_documents_named_by_lists_are_documents(tmp_path):
    rows = [{"text": f"Una {i}.", "document": [i // 2]} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = own(tmp_path / "a.jsonl")
    assert len(corpus.train) + len(corpus.heldout) == 20


# -- larger than memory


def mixed(txt):
    """Documents of which some repeat each other's sentences, and some are all repetition."""
    rng = random.Random(3)
    blocks = ["\n".join(f"Pangungusap {rng.randrange(150)} ito." for _ in range(rng.randint(1, 5))) for _ in range(120)]
    return txt("\n\n".join(blocks))


@pytest.mark.parametrize("changes", [{}, {"corpus.max_documents": 30}, {"corpus.heldout": 0.3}], ids=str)
@pytest.mark.parametrize("cached", [True, False])
def test_a_corpus_in_files_is_the_one_in_memory(txt, tmp_path, monkeypatch, changes, cached):
    profile = load_profile("workshop", {"corpus.source": str(mixed(txt)), "language": "xx"} | changes)
    small = tiny.corpus_of(profile)
    monkeypatch.setattr(module, "IN_MEMORY", 500)
    large = tiny.corpus_of(profile, tmp_path / "cache" if cached else None)
    assert isinstance(large.train, Lazy) and isinstance(small.train, list) and len(small.train) > 20
    assert large == small and large.origin == small.origin
    check_leaks(large)
    assert windows(large.train, [1, 2]) == windows(small.train, [1, 2])
    taken = set(sentences(small.train)[::3])
    assert without(large.train, taken) == without(small.train, taken) != small.train
    assert sentences(large.heldout)[:3] == sentences(small.heldout)[:3]


def test_a_corpus_in_files_is_split_once(txt, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 500)
    file, made, split = mixed(txt), [], module.split_in_files
    monkeypatch.setattr(module, "split_in_files", lambda *a: made.append(1) or split(*a))

    def load(**changes):
        profile = load_profile("workshop", {"corpus.source": str(file), "language": "xx"} | changes)
        return tiny.corpus_of(profile, tmp_path / "cache")

    first = load()
    assert load() == first and load().origin == first.origin and len(made) == 1
    load(**{"corpus.heldout": 0.2})
    assert len(made) == 2
    file.write_text(text_of(60))
    assert load() != first and len(made) == 3
    (damaged,) = [path for path in tmp_path.rglob("train") if len(documents_of(path)) == 58]
    damaged.write_bytes(b"")
    assert len(load().train) == 58 and len(made) == 4


def test_documents_that_lie_scattered_are_refused_where_they_cannot_be_joined(tmp_path, monkeypatch):
    rows = [{"text": f"Una {i}.", "page": f"p{i % 20}"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert all(len(d.sentences) == 5 for d in own(tmp_path / "a.jsonl", **{"corpus.document": "page"}).train)
    monkeypatch.setattr(module, "IN_MEMORY", 50)
    with pytest.raises(UserError, match="must follow one another; sort it by page"):
        own(tmp_path / "a.jsonl", **{"corpus.document": "page"})


@pytest.mark.parametrize("memory", [20, 10**6])
def test_one_name_for_all_rows_makes_no_document_of_them(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(module, "IN_MEMORY", memory)
    rows = [{"text": f"Una {i}.", "document": "x"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = own(tmp_path / "a.jsonl")
    assert len(corpus.train) + len(corpus.heldout) == 40


# -- sentences and windows


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Isa. Dalawa! Tatlo? Apat… Lima", ["Isa.", "Dalawa!", "Tatlo?", "Apat…", "Lima"]),
        ("Isa... Dalawa?! Tatlo", ["Isa...", "Dalawa?!", "Tatlo"]),
        ("“Oo.” Sabi niya. (Tama.) ‘Sige!’ Tapos.", ["“Oo.”", "Sabi niya.", "(Tama.)", "‘Sige!’", "Tapos."]),
        ('("Oo.") Hindi.', ['("Oo.")', "Hindi."]),
        ("«Да.» Нет.", ["«Да.»", "Нет."]),
        ("यह है। वह है। क्या?", ["यह है।", "वह है।", "क्या?"]),
        ("هل هذا؟ نعم. لا", ["هل هذا؟", "نعم.", "لا"]),
        ("这是。那是！好吗？对", ["这是。", "那是！", "好吗？", "对"]),
        ("「はい。」と。 なに！？そう。", ["「はい。」", "と。", "なに！？", "そう。"]),
        ("ሰላም፡ለዓለም። እንዴት፧ ጥሩ።ነው።", ["ሰላም፡ለዓለም።", "እንዴት፧", "ጥሩ።", "ነው።"]),
        ("មួយ។ ពីរ។ បី៕ បួន", ["មួយ។", "ពីរ។", "បី៕", "បួន"]),
        ("တစ်။ နှစ်။သုံး", ["တစ်။", "နှစ်။", "သုံး"]),
        ("བོད། ཡིག། །", ["བོད།", "ཡིག།", "།"]),
        ("Մեկ։ Երկու։ Երեք", ["Մեկ։", "Երկու։", "Երեք"]),
        ("एकः। द्वौ॥ त्रयः", ["एकः।", "द्वौ॥", "त्रयः"]),
        ("یہ ہے۔ وہ۔ می\u200cشود؟", ["یہ ہے۔", "وہ۔", "می\u200cشود؟"]),
        ("ประโยคหนึ่ง ประโยคสอง\nบรรทัดใหม่", ["ประโยคหนึ่ง ประโยคสอง", "บรรทัดใหม่"]),
        ("半角｡全角。「引用。」𠮷野家！", ["半角｡", "全角。", "「引用。」", "𠮷野家！"]),
        ("Halagang 3.5 at a.b.c lang", ["Halagang 3.5 at a.b.c lang"]),
        ("isa\n\ndalawa\r\ntatlo\u2028apat", ["isa", "dalawa", "tatlo", "apat"]),
        ("  a   b.\t\tc\u00a0d.  ", ["a b.", "c d."]),
        ("", []),
        (" \n\t ", []),
        ("...", ["..."]),
    ],
)
def test_sentences_in_several_scripts(text, expected):
    assert split_sentences(text) == expected


def test_splitting_loses_and_adds_no_character():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices('ab .!?…。！？।؟"”’)」 \n', k=30))
        text = rng.choice([text, text * 20])
        pieces = split_sentences(text)
        assert "".join("".join(pieces).split()) == "".join(text.split())
        assert all(piece == piece.strip() and piece for piece in pieces)


@pytest.mark.parametrize("word", ["ประโยค", "salita", "ພາສາລາວ", "语"])
def test_long_text_without_ends_is_cut_at_spaces(word):
    text = " ".join(f"{word}{i}" for i in range(300))
    pieces = split_sentences(text)
    assert " ".join(pieces) == text and max(map(len, pieces)) <= module.LONGEST
    assert min(map(len, pieces[:-1])) > module.LONGEST - 20  # as long as they can be
    assert [split_sentences(piece) for piece in pieces] == [[piece] for piece in pieces]


def test_long_text_without_spaces_stays():
    assert split_sentences("ไทย" * 200) == ["ไทย" * 200]


def test_splitting_again_changes_nothing(documents):
    for document in documents[:200]:
        for sentence in document["sentences"]:
            for piece in split_sentences(sentence):
                assert split_sentences(piece) == [piece]


@pytest.mark.parametrize("lengths", [[1], [2], [1, 2], [3, 1, 5]])
def test_windows_hold_every_sentence_once(lengths):
    documents = [Document(str(i), [f"{i}-{k}" for k in range(i)]) for i in range(8)]
    texts = windows(documents, lengths)
    assert " ".join(texts).split() == sentences(documents)
    assert all(len({word.split("-")[0] for word in text.split()}) == 1 for text in texts)


def test_windows_of_all_lengths_take_turns():
    texts = windows([Document("a", list("abcdefg")), Document("b", list("hijk"))], [1, 3])
    assert texts == ["a", "b c d", "e", "f g", "h", "i j k"]


def test_windows_of_the_embedded_corpus(embedded):
    texts = windows(embedded.heldout, [2])
    assert " ".join(texts) == " ".join(sentences(embedded.heldout))
    assert windows([], [1, 2]) == []


def test_a_draw_is_part_of_a_larger_one_and_keeps_the_order():
    texts = [str(i) for i in range(200)]
    small, large = draw(texts, 20, 1.0, 3), draw(texts, 80, 1.0, 3)
    assert len(small) == 20 and set(small) < set(large) and list(small) == sorted(small, key=int)
    assert draw(texts, None, 1.0, 3) is texts and draw(texts, 500, 1.0, 3) is texts
    assert len(draw(texts, 80, 0.25, 3)) == 20 and set(draw(texts, 80, 0.25, 3)) == set(small)
    assert list(draw(Lazy(lambda: iter(texts)), 20, 1.0, 3)) == small


def test_parallel_sentences_are_those_that_all_languages_have(tmp_path):
    file = tmp_path / "lines.csv"
    file.write_text("tgl,eng\naraw,day\n,night\nbahay,house\n")
    spec = config.Parallel(source=str(file), languages=["tgl", "eng"])
    assert load_parallel(spec, "tgl", 9) == {"tgl": ["araw", "bahay"], "eng": ["day", "house"]}
    assert load_parallel(spec, "tgl", 1) == {"tgl": ["araw"], "eng": ["day"]}
    assert load_parallel(spec, "ceb", 9) == load_parallel(None, "tgl", 9) == {}
    with pytest.raises(UserError, match="no column .*spa"):
        load_parallel(config.Parallel(source=str(file), languages=["tgl", "spa"]), "tgl", 9)


def test_pairs_to_train_on_are_those_that_nothing_is_tested_on():
    lines = [f"salin {i}" for i in range(60)]
    parallel = {"ceb": [f"hubad {i}" for i in range(60)], "tgl": lines, "eng": [f"line {i}" for i in range(60)]}
    lines[30] = lines[2]  # a kept line that occurs again
    train, heldout = translation_pairs(parallel, "tgl", 20, {"salin 40", "hubad 41"}, seed=0)
    numbers = [int(text.split()[1]) for text in train.texts + heldout.texts]
    assert sorted(numbers) == [i for i in range(20, 60) if i not in (30, 40, 41)]
    assert [f"hubad {i}" for i in numbers] == train.translations + heldout.translations, "the first other language"
    assert len(heldout.texts) == 4 and numbers != sorted(numbers)
    again = translation_pairs(parallel, "tgl", 20, {"salin 40", "hubad 41"}, seed=0)
    assert (train, heldout) == again


@pytest.mark.parametrize(
    "parallel, rows", [({}, 20), ({"tgl": ["a"] * 25, "eng": ["b"] * 25}, 20), ({"tgl": ["a"]}, 0)]
)
def test_too_few_pairs_are_refused(parallel, rows):
    with pytest.raises(UserError, match="to train on; objectives of translations need at least 10"):
        translation_pairs(parallel, "tgl", rows, set(), 0)


# -- text as it comes


@pytest.mark.parametrize("memory", [module.IN_MEMORY, 300])
@pytest.mark.parametrize("exact", [module.EXACT, 3])
def test_repeated_sentences_are_counted_and_left_out_on_request(txt, monkeypatch, memory, exact):
    monkeypatch.setattr(module, "IN_MEMORY", memory)
    monkeypatch.setattr(module, "EXACT", exact)
    monkeypatch.setattr(module, "SAMPLE", 1)
    file = txt("\n\n".join(f"Pangungusap {i}.\nPahina {i // 2} ng aklat." for i in range(40)))
    kept, less = own(file), own(file, **{"corpus.drop_repeats": True})
    assert kept.origin.repeated == less.origin.repeated == 20 / 80
    count = [sum("aklat" in s for d in [*c.train, *c.heldout] for s in d.sentences) for c in (kept, less)]
    assert count[0] > 35 and count[1] == 20


def test_rows_without_text_are_counted(tmp_path):
    rows = [{"text": f"Isa {i}."} for i in range(20)] + [{"text": ""}, {"text": None}, {"other": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert own(tmp_path / "a.jsonl").origin.skipped == 3


def test_text_is_repaired_on_request(txt):
    bad = "El Niño — “sige”".encode().decode("cp1252", "replace")
    lines = [f"{bad} &amp; Nena, pagka\u00adin {i}." for i in range(20)]
    file = txt("\n".join(lines))
    assert "&amp;" in own(file).train[0].sentences[0]
    repaired = own(file, **{"corpus.repair": True}).train[0].sentences[0]
    assert repaired.startswith("El Niño — “sige") and "& Nena, pagkain" in repaired


# -- several languages


def bilingual(tmp_path, tagalog, english, **more):
    (tmp_path / "tgl.txt").write_text(tagalog)
    (tmp_path / "eng.txt").write_text(english)
    given = {
        "language": ["tgl", "eng"],
        "corpus.source": str(tmp_path / "tgl.txt"),
        "corpora": {"eng": {"source": str(tmp_path / "eng.txt")}},
    }
    profile = load_profile("smoke", given | {"corpus.max_documents": None} | more)
    return module.load_languages(profile, lambda texts: sum(len(t.split()) for t in texts))


def tokens(documents, word):
    sizes = [(sum(len(s.split()) for s in d.sentences), any(word in s for s in d.sentences)) for d in documents]
    return sum(n for n, mine in sizes if mine) / sum(n for n, _ in sizes)


@pytest.mark.parametrize("count", [30, 100, 400])
@pytest.mark.parametrize("memory", [module.IN_MEMORY, 500])
def test_another_language_is_drawn_or_repeated_to_its_share_of_the_tokens(tmp_path, monkeypatch, count, memory):
    monkeypatch.setattr(module, "IN_MEMORY", memory)
    english = "\n".join(f"Page {i} of a book that somebody wrote." for i in range(count))
    corpus = bilingual(tmp_path, "\n".join(f"Pahina {i} ng aklat." for i in range(200)), english)
    assert tokens(corpus.train, "Page") == pytest.approx(0.3, abs=0.02)
    mine = [d for d in corpus.train if "Pahina" in d.sentences[0]]
    assert [d.sentences for d in mine] == [d.sentences for d in corpus.parts["tgl"].train]
    assert list(corpus.train) == list(corpus.train)


def test_a_scarce_language_is_repeated_four_times_at_most(tmp_path):
    english = "\n".join(f"Page {i}." for i in range(12))
    corpus = bilingual(tmp_path, "\n".join(f"Pahina {i} ng aklat." for i in range(400)), english)
    pages = [d.sentences[0] for d in corpus.train if d.sentences[0].startswith("Page")]
    assert len(pages) == 4 * len(corpus.parts["eng"].train) == 4 * len(set(pages))


def test_each_language_holds_out_its_own_documents(tmp_path):
    english = "\n".join(f"Page {i} of a book." for i in range(100))
    corpus = bilingual(tmp_path, "\n".join(f"Pahina {i} ng aklat." for i in range(200)), english)
    held = {code: [d.sentences[0] for d in part.heldout] for code, part in corpus.parts.items()}
    assert len(held["tgl"]) == 6 and len(held["eng"]) == 3
    assert {s for d in corpus.train for s in d.sentences}.isdisjoint(held["tgl"] + held["eng"])
    assert [d.sentences[0] for d in corpus.heldout] == held["tgl"] + held["eng"]
