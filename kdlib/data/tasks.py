"""Labelled tasks: the five of the kit, and others from a file or a hub."""

import hashlib
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import DisjointSet

from kdlib import config
from kdlib.data.corpus import Corpus, Document, draw, windows, without
from kdlib.data.sources import Origin, digest, embedded_rows, first_of, read_rows, read_table, repaired
from kdlib.errors import UserError

TEST_SHARE = 0.3
OVERLAP = 0.05  # share of test rows that may also be in train, since real data has such accidents
DENGUE_LABELS = ["absent", "dengue", "health", "mosquito", "sick"]
ENTITY = re.compile(r"\[(PER|LOC|ORG) ([^\]]+)\]|(\S+)")
TAG = re.compile(r"O|[BIES]-.+")
LIKE_TAG = re.compile(
    r"O|[BIESLU]-.*", re.IGNORECASE
)  # entities were meant; other tags, such as parts of speech, are free
WORD = re.compile(r"[^ \t\r\n]+")  # between words; a no-break space is part of a word
WORD_OR_MARK = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
TASK_WINDOW = 3  # a single sentence often does not tell its document's topic


@dataclass
class Split:
    """The rows of a split.

    Attributes:
        texts: str, (str, str) for kind pair, or a list of words for kind tokens.
        targets: int, a list of 0/1 (multilabel), or a list of int (tokens).
    """

    texts: list
    targets: list

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, count: int | None, seed: int = 0) -> "Split":
        """At most `count` rows, drawn with `seed`."""
        if count is None or count >= len(self):
            return self
        return self.pick(random.Random(seed).sample(range(len(self)), count))

    def pick(self, rows: Iterable[int]) -> "Split":
        """The rows with these numbers, in this order."""
        rows = list(rows)
        return Split([self.texts[i] for i in rows], [self.targets[i] for i in rows])


@dataclass
class Task:
    """A task with fixed train and test rows.

    Attributes:
        kind: classify, multilabel, pair or tokens (BIO tags, or a class for every word).
        origin: what was read.
    """

    name: str
    kind: str
    labels: list[str]
    train: Split
    test: Split
    origin: Origin | None = field(default=None, compare=False)

    def small(self, train_rows: int | None, test_rows: int | None, train_seed: int = 0) -> "Task":
        """The task with at most so many rows, drawn. Test rows stay the same; `train_seed` draws training rows."""
        return replace(self, train=self.train.take(train_rows, train_seed), test=self.test.take(test_rows))

    def few(self, count: int, test_rows: int | None, train_seed: int = 0) -> "Task":
        """The task with `count` training rows of every class, or all rows of a smaller class.

        A larger count adds rows to those of a smaller one.

        Args:
            count: rows a class.
            test_rows: test rows at most.
            train_seed: draws the order.
        """
        order = random.Random(train_seed).sample(range(len(self.train)), len(self.train))
        taken, chosen = Counter(), []
        for i in order:
            classes = self.classes(self.train.targets[i])
            if any(taken[name] < count for name in classes):
                chosen.append(i)
            taken.update(classes)
        return replace(self, train=self.train.pick(chosen), test=self.test.take(test_rows))

    def classes(self, target: int | list[int]) -> set[str]:
        """The classes that a row with this target belongs to.

        Every label it has (kind multilabel), or every kind of entity in it (kind tokens); "none" for a row without any.
        """
        if self.kind == "multilabel":
            found = {label for label, on in zip(self.labels, target) if on}
        elif self.kind == "tokens":
            found = {
                self.labels[i][2:] if "O" in self.labels else self.labels[i] for i in target if self.labels[i] != "O"
            }
        else:
            found = {self.labels[target]}
        return found or {"none"}


def load_tasks(specs: list[config.Task], corpus: Corpus) -> list[Task]:
    """Load the profile's tasks and check that no test row is in train, or in an embedded corpus.

    `training_documents` removes test sentences from a corpus of the user's own.
    """
    own = corpus.target.train if corpus.origin.source == "embedded" else []
    distilled = {sentence for document in own for sentence in document.sentences}
    loaded = [load_task(spec, corpus) for spec in specs]
    names = [task.name for task in loaded]
    if len(set(names)) < len(names):
        raise UserError(f"two tasks have the same name: {', '.join(names)}")
    for task in loaded:
        check(task, distilled)
    return loaded


def origins(corpus: Corpus, tasks: list[Task]) -> dict[str, Any]:
    """The records of corpus and tasks by name, as JSON-like values (the fields of `sources.Origin`)."""
    parts = {code: asdict(part.origin) for code, part in corpus.parts.items()}
    found = {"corpus": asdict(corpus.origin), "tasks": {task.name: asdict(task.origin) for task in tasks}}
    return found | ({"corpora": parts} if parts else {})


def load_task(spec: config.Task, corpus: Corpus) -> Task:
    """Load a task from the first of its source and fallbacks that holds it.

    A place is skipped when it cannot be read, lacks a column, has labels of one class only, or has more than OVERLAP of
    the test rows in train too, as mirrors whose test split is a copy of train.

    Raises:
        UserError: where no place is left.
    """
    if spec.source != "embedded":
        task, passed_over = first_of(spec, _own, f"task {spec.name}")
        return replace(task, origin=replace(task.origin, passed_over=passed_over))
    if spec.name not in EMBEDDED:
        raise UserError(f"no embedded task {spec.name!r}; there are {', '.join(EMBEDDED)}")
    if spec.name in ("topic", "entailment") and not corpus.test:
        raise UserError(
            f"the embedded task {spec.name!r} is made of the embedded corpus; with corpus.source set, name other tasks"
        )
    task = EMBEDDED[spec.name](corpus.target)
    return replace(task, origin=_origin(task, [task.train, task.test], "embedded"))


def _origin(task: Task, read: list[Split], place: str, commit: str | None = None) -> Origin:
    """The record of a task read as `read`: two splits, or one to be split."""

    def names(target: int | list[int]) -> Any:
        if task.kind == "tokens":
            return [task.labels[i] for i in target]
        return target if task.kind == "multilabel" else task.labels[target]

    rows = (
        [number, text, names(t)] for number, split in enumerate(read) for text, t in zip(split.texts, split.targets)
    )
    content = digest([[task.kind, sorted(task.labels)], *rows])
    removed = len(read[0]) - len(task.train) if len(read) == 2 else 0
    sizes = {"train": len(task.train), "test": len(task.test)}
    return Origin(place, commit, content, sizes, removed)


def _windows(document: Document, count: int) -> list[str]:
    starts = range(0, len(document.sentences) - TASK_WINDOW + 1, TASK_WINDOW)
    return [" ".join(document.sentences[i : i + TASK_WINDOW]) for i in starts][:count]


def _topic(corpus: Corpus) -> Task:
    labels = sorted({d.meta["topic"] for d in corpus.test})
    seen = [d for d in corpus.train if d.meta["register"] in ("news", "guide", "encyclopedic")]

    def split(documents: list[Document], count: int) -> Split:
        rows = [(text, labels.index(d.meta["topic"])) for d in documents for text in _windows(d, count)]
        return Split([text for text, _ in rows], [target for _, target in rows])

    return Task("topic", "classify", labels, split(seen[::2] or seen, 1), split(corpus.test, 2))


def _entailment(corpus: Corpus) -> Task:
    """Does the second sentence follow the first? Neighbours against sentences of another document of the topic."""

    def split(documents: list[Document], count: int) -> Split:
        rng = random.Random(7)
        by_topic: dict[str, list[Document]] = {}
        for document in documents:
            by_topic.setdefault(document.meta["topic"], []).append(document)
        texts, targets = [], []
        for number, document in enumerate(documents):
            for k in range(count):
                at = rng.randrange(len(document.sentences) - 1)
                positive = (number + k) % 2
                others = [d for d in by_topic[document.meta["topic"]] if d is not document]
                other = rng.choice(others or [d for d in documents if d is not document])
                second = document.sentences[at + 1] if positive else rng.choice(other.sentences)
                texts.append((document.sentences[at], second))
                targets.append(positive)
        return Split(texts, targets)

    return Task("entailment", "pair", ["elsewhere", "follows"], split(corpus.train[::2], 1), split(corpus.test, 2))


def _sentiment(corpus: Corpus) -> Task:
    rows = embedded_rows("sentiment")
    labels = ["negative", "positive"]
    return _split_rows("sentiment", "classify", labels, list(rows["text"]), [labels.index(x) for x in rows["label"]])


def _dengue(corpus: Corpus) -> Task:
    rows = embedded_rows("dengue")
    targets = rows[DENGUE_LABELS].to_numpy().tolist()
    return _split_rows("dengue", "multilabel", DENGUE_LABELS, list(rows["text"]), targets)


TWINS = {"topic": "topic_eng", "sentiment": "sentiment_eng"}  # embedded tasks, and files of translated training rows


def english_twins(task: Task) -> Split | None:
    """English translations of training rows of an embedded task, with the same labels; None for other tasks."""
    if task.name not in TWINS or task.origin is None or task.origin.source != "embedded":
        return None
    rows = embedded_rows(TWINS[task.name])
    return Split(list(rows["text"]), [task.labels.index(label) for label in rows["label"]])


def _split_rows(
    name: str, kind: str, labels: list[str], texts: list, targets: list, documents: list | None = None
) -> Task:
    """Hold out a share of each class (of each label combination), equal on every machine.

    Rows with a held-out text are removed from the training side. With `documents`, the rows of a document stay
    together; then classes are not balanced.
    """
    groups: dict[str, list[int]] = {}
    ranks = [hashlib.sha256(repr(text).encode("utf-8", "replace")).hexdigest() for text in texts]
    first: dict[Any, str] = {}  # of a document: the lowest rank of its rows
    for rank, document in zip(ranks, documents or ()):
        first[document] = min(rank, first.get(document, rank))
    for i in sorted(range(len(texts)), key=lambda i: (first[documents[i]], ranks[i]) if documents else ranks[i]):
        groups.setdefault(str(targets[i]) if kind != "tokens" and not documents else "", []).append(i)
    test = {i for group in groups.values() for i in group[: round(len(group) * TEST_SHARE)]}
    if documents:
        cut = {documents[i] for i in test}
        test = {i for i in range(len(texts)) if documents[i] in cut}
    held = {repr(texts[i]) for i in test}
    train = [i for i in range(len(texts)) if repr(texts[i]) not in held]
    if not test or not train:
        raise UserError(f"task {name}: {len(texts)} rows are too few to hold any out for testing")

    def pick(rows: list[int]) -> Split:
        return Split([texts[i] for i in rows], [targets[i] for i in rows])

    return Task(name, kind, labels, pick(train), pick(sorted(test)))


def parse_entities(text: str) -> tuple[list[str], list[str], list[str]]:
    """Split inline entities into words, BIO tags and names.

    "si [PER Ana Cruz] ," -> si Ana Cruz , / O B-PER I-PER O / Ana Cruz.
    """
    words, tags, names = [], [], []
    for kind, name, word in ENTITY.findall(text):
        parts = name.split() if kind else [word]
        words += parts
        tags += [f"B-{kind}", *[f"I-{kind}"] * (len(parts) - 1)] if kind else ["O"]
        names += [name] if kind else []
    return words, tags, names


def _entities(corpus: Corpus) -> Task:
    """Named entities. Sentences that share a name are on the same side, so every test name is new."""
    parsed = [parse_entities(text) for text in embedded_rows("entities")["text"]]
    labels = ["O"] + [f"{part}-{kind}" for kind in ("PER", "LOC", "ORG") for part in "BI"]
    sharing, first = DisjointSet(range(len(parsed))), {}
    for i, (_, _, names) in enumerate(parsed):
        for name in names:
            sharing.merge(i, first.setdefault(name, i))
    test: set[int] = set()
    for group in sorted(
        map(sorted, sharing.subsets()), key=lambda g: hashlib.sha256(repr(parsed[g[0]][0]).encode()).hexdigest()
    ):
        if len(group) <= 3 and len(test) < TEST_SHARE * len(parsed):
            test.update(group)

    def side(held: bool) -> Split:
        rows = [i for i in range(len(parsed)) if (i in test) == held]
        return Split([parsed[i][0] for i in rows], [[labels.index(tag) for tag in parsed[i][1]] for i in rows])

    return Task("entities", "tokens", labels, side(False), side(True))


EMBEDDED = {
    "topic": _topic,
    "sentiment": _sentiment,
    "dengue": _dengue,
    "entailment": _entailment,
    "entities": _entities,
}


def _own(spec: config.Task) -> Task:
    """A task of the user. Words and tags of kind tokens are lists, or strings with spaces."""
    changes: Counter[str] = Counter()
    label_columns = spec.label if isinstance(spec.label, list) else [spec.label]
    if spec.kind == "pair" and not spec.second:
        raise UserError(f"task {spec.name}: kind pair needs the column of the second text: second")
    if (spec.kind == "multilabel") != isinstance(spec.label, list):
        raise UserError(
            f"task {spec.name}: label is a list of 0/1 columns for kind multilabel, and one column otherwise"
        )
    columns = [spec.text, *([spec.second] if spec.second else []), *label_columns]
    rows, commit = read_table(spec, columns)
    frames = [rows, read_rows(spec, columns, split=spec.test)] if spec.test else [rows]
    read = sum(map(len, frames))
    frames = [_filled(spec, frame, columns) for frame in frames]
    if spec.repair:
        texts = [column for column in (spec.text, spec.second) if column]
        frames = [frame.assign(**{c: frame[c].map(_repaired) for c in texts}) for frame in frames]
    labels: list[str] = label_columns
    if spec.kind in ("classify", "pair"):
        frames = [frame.assign(**{columns[-1]: _trimmed(frame[columns[-1]], changes)}) for frame in frames]
        labels = sorted(set(frames[0][spec.label]))
    elif spec.kind == "tokens":
        frames = [frame.assign(**{columns[-1]: _tags(spec, frame, changes)}) for frame in frames]
        tags = {tag for row in frames[0][spec.label] for tag in row}
        outside = {"O"} if any(map(LIKE_TAG.fullmatch, tags)) else set()
        labels = sorted(outside | tags, key=lambda tag: (tag != "O", tag[2:] if outside else tag, tag))
    if len(labels) < 2:
        raise UserError(
            f"task {spec.name}: column {spec.label!r} holds one class only ({', '.join(labels)}); "
            "at least two are needed"
        )
    splits = [_own_split(spec, frame, labels) for frame in frames]
    if len(splits) == 1:
        documents = list(frames[0]["document"]) if spec.kind == "tokens" and "document" in frames[0] else []
        documents = documents if len(set(documents)) > 1 else None
        task = _split_rows(spec.name, spec.kind, labels, splits[0].texts, splits[0].targets, documents)
    else:
        task = _apart(Task(spec.name, spec.kind, labels, *splits))
    notes = tuple(f"{count:,} {what}" for what, count in changes.items())
    if notes:
        warnings.warn(f"task {spec.name}: {'; '.join(notes)}", stacklevel=2)
    origin = _origin(task, splits, spec.source, commit)
    return replace(task, origin=replace(origin, skipped=read - sum(map(len, frames)), notes=notes))


def _filled(spec: config.Task, frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The rows with text and label in all columns. Raises UserError for others, unless the task skips them."""
    empty = frame[columns].map(_is_empty)
    lacking = empty.any(axis=1).to_numpy()
    if lacking.any() and not spec.skip_empty:
        first = int(lacking.argmax())
        column = columns[int(empty.iloc[first].to_numpy().argmax())]
        raise UserError(
            f"task {spec.name}: {lacking.sum():,} of {len(frame):,} rows have no text or no label, such as row "
            f"{first + 1} (column {column!r} holds {frame[column].iloc[first]!r}); skip_empty: true leaves them out"
        )
    if lacking.all():
        raise UserError(f"task {spec.name}: none of the {len(frame):,} rows has both text and label")
    return frame[~lacking]


def _repaired(value: Any) -> Any:
    if isinstance(value, str):
        return repaired(value)
    return [_repaired(item) for item in value] if isinstance(value, (list, np.ndarray)) else value


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return (
        len(value) == 0
        if isinstance(value, (list, np.ndarray))
        else bool(pd.api.types.is_scalar(value) and pd.isna(value))
    )


def _trimmed(labels: Iterable[Any], changes: Counter[str]) -> list[str]:
    """Labels as text without spaces around them; their number is added to `changes`."""
    found = [str(label) for label in labels]
    changes["labels had spaces around them, which are removed"] += sum(label != label.strip() for label in found)
    changes += Counter()  # without what is 0
    return [label.strip() for label in found]


def _tags(spec: config.Task, frame: pd.DataFrame, changes: Counter[str]) -> list[list[str]]:
    """The tags of each row. Entities that start with I (the form IOB1) start with B; they are counted in `changes`."""
    found = []
    for value in frame[spec.label]:
        tags = _words(value, f"task {spec.name}", spec.label)
        kinds = ["O", *(tag[2:] if TAG.fullmatch(tag) and tag != "O" else "O" for tag in tags)]
        starts = [tag.startswith("I-") and kind != before for tag, kind, before in zip(tags, kinds[1:], kinds)]
        if any(starts):
            changes["entities started with I-, now with B-"] += sum(starts)
        found.append([f"B-{tag[2:]}" if start else tag for tag, start in zip(tags, starts)])
    return found


def _apart(task: Task) -> Task:
    """The task without the training rows whose text is in test.

    Raises UserError when more than OVERLAP of the test rows are in train: that is no accident.
    """
    shared = _shared(task)
    if not shared:
        return task
    count = sum(_key(text) in shared for text in task.test.texts)
    if count > OVERLAP * len(task.test):
        raise UserError(
            f"task {task.name}: {count} test rows are also in train, {count / len(task.test):.0%} of them, "
            f"such as {next(iter(shared))!r}"
        )
    kept = [i for i, text in enumerate(task.train.texts) if _key(text) not in shared]
    return replace(task, train=task.train.pick(kept))


def _key(text: str | list[str] | tuple[str, str]) -> str | tuple[str, ...]:
    return text if isinstance(text, str) else tuple(text)


def _shared(task: Task) -> set[str | tuple[str, ...]]:
    """The texts in both train and test."""
    return {_key(text) for text in task.train.texts} & {_key(text) for text in task.test.texts}


def _words(value: Any, where: str, column: str) -> list[str]:
    if isinstance(value, str):
        words = WORD.findall(value)
    else:
        words = [str(item) for item in value] if np.iterable(value) else []
    if not words:
        raise UserError(f"{where}: column {column!r} holds no words but {value!r}")
    return words


def _own_split(spec: config.Task, frame: pd.DataFrame, labels: list[str]) -> Split:
    texts, targets = [], []
    for number, row in zip(frame.index + 1, frame.to_dict("records")):
        where = f"task {spec.name}, row {number}"
        if spec.kind == "tokens":
            text, tags = _words(row[spec.text], where, spec.text), row[spec.label]
            if len(text) != len(tags):
                raise UserError(f"{where}: {len(text)} words but {len(tags)} tags")
            if "O" in labels and (wrong := [tag for tag in tags if not TAG.fullmatch(tag)]):
                raise UserError(f"{where}: column {spec.label!r} holds {wrong[0]!r}; a tag is O, B-kind or I-kind")
            target = [_index(labels, tag, where) for tag in tags]
        else:
            text = _text(row[spec.text], where, spec.text)
            if spec.kind == "pair":
                text = (text, _text(row[spec.second], where, spec.second))
            if spec.kind == "multilabel":
                target = [_binary(row[column], where, column) for column in labels]
            else:
                target = _index(labels, row[spec.label], where)
        texts.append(text)
        targets.append(target)
    return Split(texts, targets)


def _text(value, where: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: column {column!r} holds no text but {value!r}")
    return value


def _index(labels: list[str], value: str, where: str) -> int:
    if value not in labels:
        raise UserError(f"{where}: label {value!r} does not occur in the training rows ({', '.join(labels[:10])})")
    return labels.index(value)


def _binary(value, where: str, column: str) -> int:
    if str(value) not in ("0", "1", "0.0", "1.0", "True", "False"):
        raise UserError(f"{where}: column {column!r} holds {value!r}; a label column of kind multilabel holds 0 or 1")
    return int(str(value) in ("1", "1.0", "True"))


def check(task: Task, distilled: set[str]) -> None:
    """Check that no test row is trained on.

    Raises:
        UserError: for a test row in the task's train rows, a test sentence in `distilled`, or a split of one class.
    """
    shared = _shared(task)
    if shared:
        raise UserError(f"task {task.name}: {len(shared)} test rows are also in train, such as {next(iter(shared))!r}")
    for text in task.test.texts:
        parts = _parts(text, task.kind)
        if any(part in distilled for part in parts):
            raise UserError(f"task {task.name}: a test sentence is in the distillation corpus: {parts[0]!r}")
    for name, split in (("train", task.train), ("test", task.test)):
        seen = Counter(
            tuple(t) if isinstance(t, list) and task.kind == "multilabel" else t
            for t in split.targets
            if not isinstance(t, list) or task.kind == "multilabel"
        )
        if task.kind != "tokens" and len(seen) < 2:
            raise UserError(f"task {task.name}: the {name} rows hold one class only; at least two are needed")


def unlabelled_texts(
    kind: str, documents: Sequence[Document], lengths: list[int], count: int, seed: int = 0
) -> list[Any]:
    """Texts of a corpus in the form that a kind of task reads.

    Windows of `lengths` sentences; for kind tokens their words; for kind pair two sentences, half of them neighbours
    and half of them not.

    Args:
        kind: of the task.
        documents: of the corpus.
        lengths: sentences of a window, in turn.
        count: texts at most, drawn.
        seed: draws them.
    """
    if kind != "pair":
        texts = list(draw(windows(documents, lengths), count, 1.0, seed)) if count else []
        return [WORD_OR_MARK.findall(text) for text in texts] if kind == "tokens" else texts
    neighbours = [pair for document in documents for pair in zip(document.sentences, document.sentences[1:])]
    rng = random.Random(seed)
    drawn = rng.sample(neighbours, min(count, len(neighbours)))
    return [(first, second if i % 2 else rng.choice(neighbours)[1]) for i, (first, second) in enumerate(drawn)]


def read_unlabelled(spec: config.Task, task: Task) -> list[Any]:
    """The texts without labels that a profile names for a task, without the texts of its test rows.

    Raises:
        UserError: where they cannot be read, or a row holds no text.
    """
    if spec.unlabelled is None:
        return []
    columns = [spec.text, *([spec.second] if spec.second else [])]
    rows = read_rows(config.Source(source=spec.unlabelled), columns)
    tested, found = {_key(text) for text in task.test.texts}, []
    for number, row in enumerate(rows.to_dict("records"), start=1):
        where = f"task {spec.name}, unlabelled row {number}"
        if spec.kind == "tokens":
            text: Any = _words(row[spec.text], where, spec.text)
        else:
            text = _text(row[spec.text], where, spec.text)
            text = (text, _text(row[spec.second], where, spec.second)) if spec.kind == "pair" else text
        if _key(text) not in tested:
            found.append(text)
    return found


def training_documents(corpus: Corpus, tasks: list[Task]) -> Sequence[Document]:
    """The training documents without the test sentences of the tasks."""
    return without(corpus.train, tested_texts(tasks))


def tested_texts(tasks: list[Task]) -> set[str]:
    """The texts, and the sentences of pairs, that the tasks are tested on."""
    return {part for task in tasks for text in task.test.texts for part in _parts(text, task.kind)}


def _parts(text: Any, kind: str) -> tuple[str, ...]:
    """The sentences of a task's text."""
    return (" ".join(text),) if kind == "tokens" else (text,) if isinstance(text, str) else tuple(text)
