"""The distillation corpus: documents of sentences, split by document so that nothing leaks into a test."""

import hashlib
import random
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kdlib import config, sources
from kdlib.errors import UserError

ENDS = ".!?…؟۔።፧।॥။។៕༎།։᱾"  # followed by space; Arabic, Ethiopic, Indic, Burmese, Khmer, Tibetan, Armenian, Ol Chiki
WIDE = "。！？｡።။"  # also without
CLOSERS, WIDE_CLOSERS = "\"'”’»)", "”’」』）"
SENTENCE_END = re.compile(
    rf"(?:(?<=[{ENDS}])|(?<=[{ENDS}][{CLOSERS}])|(?<=[{ENDS}][{CLOSERS}]{{2}}))\s+"
    rf"|(?:(?<=[{WIDE}])|(?<=[{WIDE}][{WIDE_CLOSERS}]))(?![{WIDE}{WIDE_CLOSERS}…])\s*"
)
LONGEST = 300  # characters of a sentence; a teacher reads hardly more at once
TEST_REGISTERS = ("everyday", "story")
TEST_PER_CELL = 18  # documents of each topic and test register that the tasks are tested on
HELDOUT_PER_CELL = 2  # documents of each topic and register that watch the distillation


@dataclass
class Document:
    """A text as sentences, in order; `meta` holds what else is known of it (topic, register)."""

    id: str
    sentences: list[str]
    meta: dict = field(default_factory=dict)


@dataclass
class Corpus:
    """train: what students are distilled on; heldout: what watches them; test: what embedded tasks test on; origin:
    what was read."""

    train: list[Document]
    heldout: list[Document]
    test: list[Document]
    origin: sources.Origin | None = field(default=None, compare=False)


def load_corpus(profile: config.Profile) -> Corpus:
    """The profile's corpus, split by document. The split depends on the text alone, not on order or seed.

    It is read from the first of the corpus's source and its fallbacks that can be. With corpus.streaming it is the
    first max_documents documents, in the source's order; without, max_documents drawn with the profile's seed.
    Raises UserError for sources that cannot be read, an empty text, or too few documents to hold any out.
    """
    spec = profile.corpus
    place, commit, passed_over = spec.source, None, ()
    if spec.source == "embedded":
        if profile.language != "tgl":
            raise UserError(
                f"the embedded corpus is Tagalog (tgl); for language {profile.language!r} set corpus.source to a file"
            )
        documents = _embedded()
        corpus = _split_embedded(documents)
    else:
        (documents, place, commit), passed_over = sources.first_of(spec, _read, "corpus")
        corpus = _split(documents, spec.heldout)
    if spec.max_documents and len(corpus.train) > spec.max_documents:
        corpus.train = random.Random(profile.seed).sample(corpus.train, spec.max_documents)
    check_leaks(corpus)
    sizes = {"train": len(corpus.train), "heldout": len(corpus.heldout), "test": len(corpus.test)}
    content = sources.digest(document.sentences for document in documents)
    corpus.origin = sources.Origin(place, commit, content, sizes, passed_over=passed_over)
    return corpus


def _embedded() -> list[Document]:
    rows = sources.embedded_rows("documents")
    return [Document(r.id, list(r.sentences), {"topic": r.topic, "register": r.register}) for r in rows.itertuples()]


def _read(spec: config.Corpus) -> tuple[list[Document], str, str | None]:
    """The documents of one place, its name, and the commit where a hub gives one."""
    columns = [spec.text, *([spec.document] if spec.document else [])]
    if spec.streaming:
        rows, commit = sources.stream_rows(spec, columns)
        grouped = _take(rows, spec)
    else:
        table, commit = sources.read_table(spec, columns)
        table = table[table[spec.text].map(_has_text)]
        groups = None
        if spec.document or "document" in table:
            groups = table[spec.document or "document"].astype(object).map(str)  # an empty column keeps its type in map
        grouped = (
            table.groupby(groups, sort=False)[spec.text]
            if groups is not None and (spec.document or groups.nunique() > 1)
            else ((i, [t]) for i, t in zip(table.index, table[spec.text]))
        )
    documents = []
    for name, texts in grouped:
        sentences = [s for text in texts for s in split_sentences(text)]
        if sentences:
            documents.append(Document(str(name), sentences))
    if len(documents) < 10:
        raise UserError(
            f"{spec.source}: {len(documents)} documents with text; at least 10 are needed, some are held out"
        )
    return documents, spec.source, commit


def _take(rows: Iterator[dict[str, Any]], spec: config.Corpus) -> Iterable[tuple[str, list[str]]]:
    """The texts of the first max_documents documents; of the rows behind them the first at most is asked for."""
    column = spec.document or "document"
    texts: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        if not _has_text(row[spec.text]):
            continue
        name = str(row.get(column, number))
        if name not in texts and len(texts) == spec.max_documents:
            break
        texts.setdefault(name, []).append(row[spec.text])
        if column not in row and len(texts) == spec.max_documents:
            break
    return texts.items()


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def split_sentences(text: str) -> list[str]:
    """Cut at sentence ends followed by space (behind 。！？ also without), and at line ends; white space collapsed.

    What is longer than LONGEST is cut at spaces: Thai and Lao have no mark for the end of a sentence, and what does not
    fit into a teacher would be lost.
    """
    lines = (" ".join(line.split()) for line in text.splitlines())
    whole = [s for line in lines for s in SENTENCE_END.split(line) if s]
    fits = textwrap.TextWrapper(LONGEST, break_long_words=False, break_on_hyphens=False)
    return [piece for s in whole for piece in ([s] if len(s) <= LONGEST else fits.wrap(s))]


def _rank(document: Document) -> str:
    return hashlib.sha256("\n".join(document.sentences).encode("utf-8", "replace")).hexdigest()


def _split_embedded(documents: list[Document]) -> Corpus:
    cells: dict[tuple, list[Document]] = {}
    for document in sorted(documents, key=_rank):
        cells.setdefault((document.meta["topic"], document.meta["register"]), []).append(document)
    corpus = Corpus([], [], [])
    for (_, register), cell in sorted(cells.items()):
        tests = TEST_PER_CELL if register in TEST_REGISTERS else 0
        corpus.test += cell[:tests]
        corpus.heldout += cell[tests : tests + HELDOUT_PER_CELL]
        corpus.train += cell[tests + HELDOUT_PER_CELL :]
    return corpus


def _split(documents: list[Document], heldout: float) -> Corpus:
    """Hold out a share of the documents; sentences that stand on both sides are taken from the training side."""
    ranked = sorted(documents, key=_rank)
    count = max(1, round(len(ranked) * heldout))
    held = {sentence for document in ranked[:count] for sentence in document.sentences}
    train = [Document(d.id, [s for s in d.sentences if s not in held], d.meta) for d in ranked[count:]]
    train = [d for d in train if d.sentences]
    if not train:
        raise UserError("corpus: every document repeats the same sentences; nothing is left to train on")
    return Corpus(train, ranked[:count], [])


def check_leaks(corpus: Corpus) -> None:
    """Raises UserError if a held-out or test sentence stands in the training documents."""
    train = {sentence for document in corpus.train for sentence in document.sentences}
    for name in ("heldout", "test"):
        leaked = [s for document in getattr(corpus, name) for s in document.sentences if s in train]
        if leaked:
            raise UserError(
                f"corpus: {len(leaked)} {name} sentences also stand in the training documents, such as {leaked[0]!r}"
            )


def sentences(documents: list[Document]) -> list[str]:
    """All sentences, in order."""
    return [sentence for document in documents for sentence in document.sentences]


def windows(documents: list[Document], lengths: list[int]) -> list[str]:
    """Texts to distil on: for each length n every document cut into runs of n sentences, joined by a space."""
    return [
        " ".join(document.sentences[i : i + n])
        for n in lengths
        for document in documents
        for i in range(0, len(document.sentences), n)
    ]


def without(documents: list[Document], texts: set[str]) -> list[Document]:
    """The documents without the sentences that stand in `texts` (the test rows of somebody's own task)."""
    kept = [Document(d.id, [s for s in d.sentences if s not in texts], d.meta) for d in documents]
    return [document for document in kept if document.sentences]
