"""Tasks: the embedded five hold what they promise; one's own are read from files or refused in a line."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import tiny
from seqeval.metrics.sequence_labeling import get_entities

from kdlib import config
from kdlib.config import load_profile
from kdlib.data import sources
from kdlib.data.corpus import Corpus, Document, sentences, windows
from kdlib.data.tasks import (
    EMBEDDED,
    TWINS,
    Split,
    Task,
    check,
    english_twins,
    load_task,
    load_tasks,
    origins,
    parse_entities,
    read_unlabelled,
    unlabelled_texts,
)
from kdlib.errors import UserError

PLAIN = [{"text": f"Pangungusap {i}.", "label": "ab"[i % 2]} for i in range(40)]
PAIRS = [{"text": f"Una {i}.", "then": f"Ikalawa {i}.", "label": i % 2} for i in range(40)]
FLAGS = [{"text": f"Pangungusap {i}.", "x": i % 2, "y": i // 2 % 2} for i in range(40)]
WORDS = [{"text": f"si Ana{i} Cruz .", "label": "O B-PER I-PER O"} for i in range(40)]
KINDS = {
    "classify": (PLAIN, {}),
    "pair": (PAIRS, {"kind": "pair", "second": "then"}),
    "multilabel": (FLAGS, {"kind": "multilabel", "label": ["x", "y"]}),
    "tokens": (WORDS, {"kind": "tokens"}),
}
NOTHING = Corpus([], [], [])


@pytest.fixture(scope="module")
def corpus():
    return tiny.corpus_of(load_profile("workshop"))


@pytest.fixture(scope="module")
def tasks(corpus):
    return {task.name: task for task in load_tasks(load_profile("workshop").tasks, corpus)}


@pytest.fixture
def put(tmp_path):
    def write(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
        return str(tmp_path / name)

    return write


def own(source, **more):
    task = load_task(config.Task(name="mine", source=source, **more), NOTHING)
    check(task, set())
    return task


def refusal(source, **more):
    with pytest.raises(UserError, match="mine") as caught:
        own(source, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flat(texts):
    return [text if isinstance(text, str) else " ".join(text) for text in texts]


# -- the embedded five


def test_embedded_sizes_and_labels(tasks):
    sizes = {name: (task.kind, len(task.train), len(task.test)) for name, task in tasks.items()}
    assert sizes == {
        "topic": ("classify", 756, 504),
        "sentiment": ("classify", 700, 300),
        "dengue": ("multilabel", 555, 245),
        "entailment": ("pair", 1134, 504),
        "entities": ("tokens", 630, 270),
    }
    assert len(tasks["topic"].labels) == 7 and tasks["sentiment"].labels == ["negative", "positive"]
    assert tasks["dengue"].labels == ["absent", "dengue", "health", "mosquito", "sick"]
    assert tasks["entities"].labels == ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_text_has_a_target_of_its_kind(tasks, name):
    task = tasks[name]
    for split in (task.train, task.test):
        assert len(split.texts) == len(split.targets) == len(split)
        for text, target in zip(split.texts, split.targets):
            if task.kind == "tokens":
                assert len(text) == len(target) and all(text) and set(target) <= set(range(7))
            elif task.kind == "multilabel":
                assert len(target) == 5 and set(target) <= {0, 1}
            else:
                assert target in range(len(task.labels))
            assert isinstance(text, {"pair": tuple, "tokens": list}.get(task.kind, str))


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_test_text_is_in_train_or_distilled_on(tasks, corpus, name):
    task = tasks[name]
    assert not set(flat(task.test.texts)) & set(flat(task.train.texts))
    distilled = set(sentences(corpus.train))
    for text in task.test.texts:
        assert not distilled & set(text if task.kind == "pair" else [*flat([text])])


def test_topic_texts_are_three_sentences_of_a_document_of_that_topic(tasks, corpus):
    task = tasks["topic"]
    for split, documents in ((task.train, corpus.train), (task.test, corpus.test)):
        topic = {text: d.meta["topic"] for d in documents for text in windows([d], [3])}
        assert all(topic[text] == task.labels[target] for text, target in zip(split.texts, split.targets))


@pytest.mark.parametrize("name", ["topic", "sentiment", "entailment"])
def test_classes_are_balanced(tasks, name):
    for split in (tasks[name].train, tasks[name].test):
        assert len(set(Counter(split.targets).values())) == 1 and len(Counter(split.targets)) == len(tasks[name].labels)


def test_every_dengue_label_has_both_answers(tasks):
    for split in (tasks["dengue"].train, tasks["dengue"].test):
        for column in zip(*split.targets):
            assert 0.1 < sum(column) / len(column) < 0.9


def test_entailment_positives_follow_and_negatives_come_from_elsewhere(tasks, corpus):
    place = {s: (d.id, i) for d in corpus.train + corpus.test for i, s in enumerate(d.sentences)}
    topic = {d.id: d.meta["topic"] for d in corpus.train + corpus.test}
    for split in (tasks["entailment"].train, tasks["entailment"].test):
        for (first, second), target in zip(split.texts, split.targets):
            (a, i), (b, j) = place[first], place[second]
            assert (a == b and j == i + 1) if target else (a != b and topic[a] == topic[b])


def test_entailment_of_a_small_corpus_has_no_false_negatives(corpus):
    small = Corpus(random.Random(0).sample(corpus.train, 10), [], corpus.test)
    place = {s: d.id for d in small.train for s in d.sentences}
    train = EMBEDDED["entailment"](small).train
    assert all(place[a] != place[b] for (a, b), target in zip(train.texts, train.targets) if not target)


def spans(task, split):
    for words, target in zip(split.texts, split.targets):
        tags = [task.labels[i] for i in target]
        for k, tag in enumerate(tags):  # an I- tag continues a name of its kind
            assert not tag.startswith("I-") or (k and tags[k - 1][1:] == tag[1:])
        for kind, start, end in get_entities(tags):
            yield kind, " ".join(words[start : end + 1])


def test_entity_tags_are_valid_and_test_names_are_new(tasks):
    train, test = (list(spans(tasks["entities"], split)) for split in (tasks["entities"].train, tasks["entities"].test))
    assert {kind for kind, _ in test} == {"PER", "LOC", "ORG"}
    assert not {name for _, name in train} & {name for _, name in test}
    assert Counter(kind for kind, _ in train + test) == {"PER": 633, "LOC": 520, "ORG": 374}


@pytest.mark.parametrize(
    "text, words, tags, names",
    [
        ("si [PER Ana Cruz] , oo", "si Ana Cruz , oo", "O B-PER I-PER O O", ["Ana Cruz"]),
        ("[LOC Lipa] [ORG A B C]", "Lipa A B C", "B-LOC B-ORG I-ORG I-ORG", ["Lipa", "A B C"]),
        ("wala rito .", "wala rito .", "O O O", []),
        ("[hindi pangalan]", "[hindi pangalan]", "O O", []),
    ],
)
def test_inline_entities(text, words, tags, names):
    assert parse_entities(text) == (words.split(), tags.split(), names)


def test_embedded_split_does_not_depend_on_row_order(tasks, corpus, monkeypatch):
    rows = sources.embedded_rows("sentiment").sample(frac=1, random_state=1).reset_index(drop=True)
    monkeypatch.setattr(sources, "embedded_rows", lambda _: rows)
    assert set(EMBEDDED["sentiment"](corpus).test.texts) == set(tasks["sentiment"].test.texts)


@pytest.mark.parametrize("name, kept", [("topic", "documents"), ("sentiment", "sentiment")])
def test_english_twins_are_of_training_rows_and_have_their_labels(name, kept, tasks):
    rows, twins = sources.embedded_rows(kept).set_index("id"), sources.embedded_rows(TWINS[name])
    assert twins["id"].is_unique and twins["text"].is_unique and len(twins) >= 150
    trained = dict(zip(tasks[name].train.texts, tasks[name].train.targets))
    for row in twins.itertuples():
        original = rows.loc[row.id]
        text = original["text"] if name == "sentiment" else " ".join(original["sentences"][:3])
        assert tasks[name].labels[trained[text]] == row.label, row.id
        assert row.text != text and 0.5 < len(row.text) / len(text) < 1.6, row.id
    split = english_twins(tasks[name])
    assert split.texts == list(twins["text"]) and set(split.targets) == set(range(len(tasks[name].labels)))
    assert max(Counter(split.targets).values()) == min(Counter(split.targets).values())


def test_other_tasks_have_no_english_twins(tasks, put):
    assert english_twins(tasks["dengue"]) is None
    assert english_twins(load_task(config.Task(name="topic", source=put(PLAIN)), NOTHING)) is None


def test_unknown_embedded_task():
    with pytest.raises(UserError, match="'mood'.*topic, sentiment, dengue, entailment, entities"):
        load_task(config.Task(name="mood"), NOTHING)


@pytest.mark.parametrize("name", ["topic", "entailment"])
def test_tasks_made_of_the_embedded_corpus_need_it(name):
    with pytest.raises(UserError, match="embedded corpus"):
        load_task(config.Task(name=name), NOTHING)


# -- other places, overlap, and what was read


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_test_rows_in_train_are_taken_from_train(put, kind):
    rows, more = KINDS[kind]
    train, test = rows[:20], rows[20:]
    repeated = [test[3], *train, test[3]]
    task = own(put(repeated), test=put(test, "test.jsonl"), **more)
    assert (len(task.train), len(task.test)) == (20, 20)  # 1 of 20 is no more than a twentieth
    assert task.origin.removed == 2 and task.origin.rows == {"train": 20, "test": 20}
    assert task == own(put(train, "clean.jsonl"), test=put(test, "test.jsonl"), **more)
    text = refusal(put([*repeated, test[5]]), test=put(test, "test.jsonl"), **more)
    assert "2 test rows are also in train, 10% of them" in text


def test_overlap_counts_test_rows_however_often_they_repeat(put):
    test = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(18)] + [{"text": "t0", "label": "a"}] * 2
    assert "3 test rows" in refusal(put([*PLAIN, test[0]]), test=put(test, "test.jsonl"))


def test_other_places_are_tried_in_order(put, tmp_path):
    places = [
        {"source": put(PLAIN[:1], "few.jsonl")},
        {"source": put(PLAIN, "b.jsonl")},
        {"source": put(FLAGS, "c.jsonl")},
    ]
    task = own("nowhere.csv", fallbacks=places)
    assert task == own(places[1]["source"]) and task.origin.source == places[1]["source"]
    assert task.origin.sha256 == own(places[1]["source"]).origin.sha256
    first, second = task.origin.passed_over
    assert "nowhere.csv: no such file" in first and "one class" in second
    assert own(places[1]["source"], fallbacks=places).origin.passed_over == ()


def test_other_place_has_its_own_rows_and_the_columns_it_does_not_name(put, tmp_path):
    rows = [{"tekst": row["text"], "label": row["label"]} for row in PLAIN]
    (tmp_path / "f").mkdir()
    put(rows[:24], "f/train.jsonl")
    put(rows[24:], "f/test.jsonl")
    places = [{"source": str(tmp_path / "f"), "test": "test", "text": "tekst"}]
    task = own("nowhere.csv", split="dev", test="dev-test", fallbacks=places)
    assert (len(task.train), len(task.test)) == (24, 16)


def test_no_place_left_is_one_line(put):
    text = refusal("nowhere.csv", fallbacks=[{"source": put(PLAIN), "text": "body"}, {"source": "also/nowhere.zip"}])
    for word in ("3 sources", "(1) nowhere.csv: no such file", "(2)", "no column 'body'", "(3) also/nowhere.zip"):
        assert word in text


def test_every_place_is_told_of_however_many_there_are():
    names = [f"place-{i}/{'long' * 20}.csv" for i in range(4)]
    text = refusal(names[0], fallbacks=[{"source": name} for name in names[1:]])
    assert all(f"({i + 1}) place-{i}/" in text for i in range(4)) and text.endswith("a local file or folder")


def test_other_places_are_checked_with_the_profile():
    def load(place):
        return load_profile("smoke", {"tasks": [{"name": "a", "source": "o/n", "fallbacks": [place]}]})

    good = load({"source": "b.csv", "test": "c.csv", "label": ["x", "y"]})
    assert config.Profile.model_validate(good.model_dump()) == good
    with pytest.raises(UserError, match="tasks.0.fallbacks.0.source: is missing"):
        load({"test": "a.csv"})
    with pytest.raises(UserError, match="unknown parameter 'tasks.0.fallbacks.0.tekst'"):
        load({"source": "b.csv", "tekst": "a"})
    with pytest.raises(UserError, match="tasks.0.fallbacks.0: embedded data"):
        load({"source": "embedded"})


def test_embedded_tasks_say_what_was_read(tasks, corpus):
    listed = json.loads(json.dumps(origins(corpus, list(tasks.values()))))
    assert set(listed["tasks"]) == set(tasks) and len({found["sha256"] for found in listed["tasks"].values()}) == 5
    assert listed["corpus"]["source"] == "embedded"
    assert listed["corpus"]["rows"] == {"train": 2268, "heldout": 70, "test": 252}
    for name, found in listed["tasks"].items():
        assert found["rows"] == {"train": len(tasks[name].train), "test": len(tasks[name].test)}
        assert found["removed"] == 0 and found["revision"] is None


def test_embedded_tasks_may_not_share_a_single_row(tasks):
    task = tasks["sentiment"]
    train = Split([*task.train.texts, task.test.texts[0]], [*task.train.targets, 0])
    with pytest.raises(UserError, match="1 test rows are also in train"):
        check(replace(task, train=train), set())


# -- one's own


WRITTEN = {  # words and tags
    "Thai": (["คุณ", "สมชาย", "ใจดี", "ไป", "กรุงเทพฯ"], ["O", "B-PER", "I-PER", "O", "B-LOC"]),
    "Han": (["王", "小", "明", "去", "北", "京", "。"], ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"]),
    "Arabic": (["محمد", "می\u200cرود", "القاهرة", "؟"], ["B-PER", "O", "B-LOC", "O"]),
    "Devanagari": (["राम", "क्\u200dष", "दिल्ली", "।"], ["B-PER", "O", "B-LOC", "O"]),
    "Amharic": (["አበበ", "አዲስ", "አበባ", "።"], ["B-PER", "B-LOC", "I-LOC", "O"]),
    "no-break space": (["New\u00a0York", "\u3000", "aso"], ["B-LOC", "O", "O"]),
}


@pytest.mark.parametrize("script", WRITTEN)
def test_words_of_every_script_keep_their_tags(put, script):
    words, tags = WRITTEN[script]
    rows = [{"text": [*words, str(i)], "label": [*tags, "O"]} for i in range(20)]
    as_lists = own(put(rows), kind="tokens")
    for split in (as_lists.train, as_lists.test):
        for text, target in zip(split.texts, split.targets):
            assert text[:-1] == words and [as_lists.labels[i] for i in target][:-1] == tags
    flat = [{column: " ".join(values) for column, values in row.items()} for row in rows]
    assert own(put(flat, "flat.jsonl"), kind="tokens") == as_lists


@pytest.mark.parametrize("kind", KINDS)
def test_own_task_of_every_kind(put, kind):
    rows, more = KINDS[kind]
    task = own(put(rows), **more)
    assert task.kind == kind and len(task.train) + len(task.test) == 40 and len(task.test) == 12
    expected = {"classify": ["a", "b"], "pair": ["0", "1"], "multilabel": ["x", "y"], "tokens": ["O", "B-PER", "I-PER"]}
    assert task.labels == expected[kind]
    by_text = {" ".join(row[key] for key in ("text", "then") if key in row): row for row in rows}
    for split in (task.train, task.test):
        for text, target in zip(flat(split.texts), split.targets):
            row = by_text[text]
            right = [row["x"], row["y"]] if kind == "multilabel" else row["label"]
            assert right == (
                target
                if kind == "multilabel"
                else " ".join(task.labels[t] for t in target)
                if kind == "tokens"
                else type(right)(task.labels[target])
            )


@pytest.mark.parametrize("kind", KINDS)
def test_own_task_with_a_test_file(put, kind):
    rows, more = KINDS[kind]
    task = own(put(rows[:24]), test=put(rows[24:], "test.jsonl"), **more)
    assert (len(task.train), len(task.test)) == (24, 16)


def test_own_task_in_a_folder_with_splits(put, tmp_path):
    (tmp_path / "f").mkdir()
    put(PLAIN[:24], "f/train.jsonl")
    put(PLAIN[24:], "f/test.jsonl")
    task = own(str(tmp_path / "f"), test="test")
    assert (len(task.train), len(task.test)) == (24, 16)


def test_own_split_is_stratified_and_the_same_in_any_order(put):
    rows = [{"text": f"t{i}", "label": "few" if i < 10 else "many"} for i in range(100)]
    first = own(put(rows))
    second = own(put(random.Random(0).sample(rows, 100), "other.jsonl"))
    assert Counter(first.test.targets) == {0: 3, 1: 27}
    assert set(first.test.texts) == set(second.test.texts)


def test_repeated_rows_do_not_end_up_on_both_sides(put):
    rows = [{"text": f"t{i % 30}", "label": "ab"[i % 2 if i < 30 else (i // 30) % 2]} for i in range(90)]
    task = own(put(rows))
    assert len(task.test) and not set(task.train.texts) & set(task.test.texts)


def test_csv_labels_and_flags_are_read_as_they_stand(tmp_path):
    (tmp_path / "a.csv").write_text(
        "text,label,x,y\n" + "".join(f"{i},0{i % 2},{i % 2},{i // 2 % 2}\n" for i in range(40))
    )
    task = own(str(tmp_path / "a.csv"))
    assert task.labels == ["00", "01"] and all(text.isdigit() for text in task.test.texts)
    assert own(str(tmp_path / "a.csv"), kind="multilabel", label=["x", "y"]).train.targets[1] in (
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
    )


def test_words_and_tags_as_lists(put):
    rows = [{"text": row["text"].split(), "label": row["label"].split()} for row in WORDS]
    assert own(put(rows), kind="tokens") == own(put(WORDS, "other.jsonl"), kind="tokens")


def test_tag_of_nothing_comes_first_even_if_training_has_none(put):
    rows = [{"text": f"Ana{i}", "label": "B-PER"} for i in range(20)]
    assert own(put(rows), kind="tokens").labels == ["O", "B-PER"]


@pytest.mark.parametrize("value", [True, False, 0, 1, 0.0, 1.0, "0", "1"])
def test_flags_in_many_spellings(put, value):
    rows = [*FLAGS, {"text": "isa pa", "x": value, "y": 1}]
    task = own(put(rows), kind="multilabel", label=["x", "y"])
    targets = dict(zip(task.train.texts + task.test.texts, task.train.targets + task.test.targets))
    assert targets["isa pa"] == [int(float(value)), 1]


@pytest.mark.parametrize("kind", ["classify", "pair", "tokens"])
def test_one_class_only(put, kind):
    rows, more = KINDS[kind]
    rows = [row | {"label": "O O O O" if kind == "tokens" else 1} for row in rows]
    assert "one class" in refusal(put(rows), **more)


def test_one_flag_only(put):
    assert "at least two" in refusal(put(FLAGS), kind="multilabel", label=["x"])


def test_one_class_among_the_test_rows(put):
    assert "test rows hold one class" in refusal(put(PLAIN), test=put([{"text": "bago", "label": "a"}], "t.jsonl"))


@pytest.mark.parametrize("kind", ["classify", "pair", "tokens"])
def test_label_that_training_never_saw(put, kind):
    rows, more = KINDS[kind]
    odd = {"text": "a b", "then": "c", "label": "B-XYZ O" if kind == "tokens" else "xyz"}
    text = refusal(put(rows), test=put([odd], "test.jsonl"), **more)
    assert "row 1" in text and "does not occur in the training rows" in text


@pytest.mark.parametrize("value", [2, -1, 0.5, "yes", None, ""])
def test_flag_that_is_neither_0_nor_1(put, value):
    text = refusal(put([*FLAGS, {"text": "isa pa", "x": value, "y": 1}]), kind="multilabel", label=["x", "y"])
    assert "row 41" in text and "'x'" in text


@pytest.mark.parametrize("value", [None, "", "  ", 12, ["a"]])
@pytest.mark.parametrize(
    "kind, column", [("classify", "text"), ("pair", "text"), ("pair", "then"), ("multilabel", "text")]
)
def test_text_that_is_none(put, kind, column, value):
    rows, more = KINDS[kind]
    text = refusal(put([*rows, rows[0] | {column: value}]), **more)
    assert "row 41" in text and repr(column) in text


@pytest.mark.parametrize("value", [None, "", " ", 12, []])
@pytest.mark.parametrize("column", ["text", "label"])
def test_words_or_tags_that_are_none(put, column, value):
    assert repr(column) in refusal(put([*WORDS, WORDS[0] | {column: value}]), kind="tokens")


@pytest.mark.parametrize("value", [None, "", float("nan")])
@pytest.mark.parametrize("kind", ["classify", "pair"])
def test_label_that_is_none(put, kind, value):
    rows, more = KINDS[kind]
    text = refusal(put([*rows, rows[0] | {"label": value}]), **more)
    assert "row 41" in text and "no label" in text


def test_words_and_tags_of_different_number(put):
    text = refusal(put([*WORDS, {"text": "a b c", "label": "O O"}]), kind="tokens")
    assert "row 41" in text and "3 words but 2 tags" in text


@pytest.mark.parametrize("tags", ["NOUN VERB", "0 1", "o b-PER", "B- O", "BPER O"])
def test_tags_that_are_not_bio(put, tags):
    assert "B-kind" in refusal(put([*WORDS, {"text": "a b", "label": tags}]), kind="tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_test_rows_that_also_stand_in_train(put, kind):
    rows, more = KINDS[kind]
    text = refusal(put(rows), test=put(rows[:3], "test.jsonl"), **more)
    assert "3 test rows are also in train" in text


def test_test_sentence_that_is_distilled_on(corpus, put):
    test = [{"text": "Bago ito.", "label": "a"}, {"text": corpus.train[0].sentences[1], "label": "b"}]
    tasks = [{"name": "mine", "source": put(PLAIN), "test": put(test, "t.jsonl")}]
    with pytest.raises(UserError, match="mine: a test sentence is in the distillation corpus"):
        load_tasks(load_profile("workshop", {"tasks": tasks}).tasks, corpus)


@pytest.mark.parametrize("kind, part", [("pair", 0), ("pair", 1), ("tokens", None)])
def test_distilled_sentence_is_found_in_pairs_and_words(kind, part):
    text = ("una", "dalawa") if kind == "pair" else ["una", "dalawa"]
    split = Split([text, ("x", "y") if kind == "pair" else ["x"]], [0, 1] if kind == "pair" else [[0, 1], [0]])
    task = Task("mine", kind, ["a", "b"], Split([("t", "u"), ("v", "w")], [0, 1]), split)
    with pytest.raises(UserError, match="distillation corpus"):
        check(task, {"una dalawa" if part is None else text[part]})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_rows(put, count):
    refusal(put(PLAIN[:count]))


@pytest.mark.parametrize(
    "more, word",
    [
        ({"label": "lab"}, "lab"),
        ({"text": "txt"}, "txt"),
        ({"kind": "pair"}, "second"),
        ({"kind": "pair", "second": "then"}, "then"),
        ({"kind": "multilabel"}, "list of 0/1"),
        ({"label": ["label"]}, "list of 0/1"),
        ({"test": "nowhere.csv"}, "nowhere.csv"),
    ],
)
def test_spec_that_does_not_fit_the_file(put, more, word):
    with pytest.raises(UserError, match=word):
        own(put(PLAIN), **more)


def test_two_tasks_of_the_same_name(put, corpus):
    path = put(PLAIN)
    profile = load_profile("smoke", {"tasks": [{"name": "mine", "source": path}, {"name": "mine", "source": path}]})
    with pytest.raises(UserError, match="same name"):
        load_tasks(profile.tasks, corpus)


def test_take_draws_by_seed_and_keeps_texts_with_targets():
    split = Split([f"t{i}" for i in range(50)], list(range(50)))
    assert split.take(None) is split and split.take(50) is split and split.take(99) is split
    drawn = split.take(10, 3)
    assert len(set(drawn.texts)) == 10 and drawn == split.take(10, 3) and drawn != split.take(10, 4)
    assert all(text == f"t{target}" for text, target in zip(drawn.texts, drawn.targets))


def test_small_task_draws_the_same_test_rows_for_every_seed():
    split = Split([f"t{i}" for i in range(50)], list(range(50)))
    first, second = (Task("mine", "classify", ["a"], split, split).small(10, 20, seed) for seed in (1, 2))
    assert first.test == second.test and first.train != second.train
    assert (len(first.train), len(first.test)) == (10, 20)


# -- texts without labels

DOCUMENTS = [Document(str(i), [f"Una {i}, oo.", f"Ikalawa {i}.", f"Ikatlo {i}."], {}) for i in range(20)]


def test_texts_of_the_corpus_have_the_form_of_the_task():
    assert set(unlabelled_texts("classify", DOCUMENTS, [1], 5)) < {s for d in DOCUMENTS for s in d.sentences}
    assert ["Una", "0", ",", "oo", "."] in unlabelled_texts("tokens", DOCUMENTS, [1], 100)
    assert unlabelled_texts("tokens", [Document("x", ["mag-aral ka't bukas"], {})], [1], 9) == [
        ["mag-aral", "ka't", "bukas"]
    ]
    assert unlabelled_texts("multilabel", DOCUMENTS, [3], 0) == []


def test_half_of_the_unlabelled_pairs_are_neighbours():
    pairs = unlabelled_texts("pair", DOCUMENTS, [1], 30)
    follows = [d.sentences.index(a) + 1 for a, _ in pairs for d in DOCUMENTS if a in d.sentences]
    near = [b == d.sentences[at] for (a, b), at in zip(pairs, follows) for d in DOCUMENTS if a in d.sentences]
    assert len(pairs) == 30 and sum(near) >= 15 and not all(near)
    assert unlabelled_texts("pair", DOCUMENTS, [1], 30) == pairs != unlabelled_texts("pair", DOCUMENTS, [1], 30, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_own_texts_without_labels_are_read_without_those_of_the_test(put, kind):
    rows, more = KINDS[kind]
    task = own(put(rows), **more)
    tested = {" ".join(text) if kind == "tokens" else text for text in task.test.texts}
    spec = config.Task(name="mine", source=put(rows), unlabelled=put(rows, "more.jsonl"), **more)
    found = read_unlabelled(spec, task)
    kept = {" ".join(text) if kind == "tokens" else text for text in found}
    assert len(found) == 28 and not kept & tested
    assert type(found[0]) is type(task.train.texts[0])
    assert read_unlabelled(config.Task(name="mine", source=put(rows), **more), task) == []


def test_an_unlabelled_row_without_text_is_named(put):
    spec = config.Task(name="mine", source=put(PLAIN), unlabelled=put([{"text": "Isa."}, {"text": " "}], "more.jsonl"))
    with pytest.raises(UserError, match="task mine, unlabelled row 2: column 'text' holds no text"):
        read_unlabelled(spec, own(put(PLAIN)))
