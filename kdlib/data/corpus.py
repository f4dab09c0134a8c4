"""The distillation corpus: documents of sentences, split by document so that no test sentence is trained on."""

import hashlib
import itertools
import random
import re
import tempfile
import textwrap
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdlib import config
from kdlib.data.lazy import Document, Lazy, picked, read, write
from kdlib.data.sources import (
    Origin,
    digest,
    embedded_rows,
    first_of,
    local_state,
    read_rows,
    repaired,
    row_bytes,
    stream_rows,
)
from kdlib.errors import UserError
from kdlib.files import fingerprint, new_folder, read_json, write_json

ENDS = ".!?…؟۔።፧।॥။។៕༎།։᱾"  # followed by space; Arabic, Ethiopic, Indic, Burmese, Khmer, Tibetan, Armenian, Ol Chiki
WIDE = "。！？｡።။"  # also without
CLOSERS, WIDE_CLOSERS = "\"'”’»)", "”’」』）"
SENTENCE_END = re.compile(
    rf"(?:(?<=[{ENDS}])|(?<=[{ENDS}][{CLOSERS}])|(?<=[{ENDS}][{CLOSERS}]{{2}}))\s+"
    rf"|(?:(?<=[{WIDE}])|(?<=[{WIDE}][{WIDE_CLOSERS}]))(?![{WIDE}{WIDE_CLOSERS}…])\s*"
)
MOST_REPEATS = 4  # of a document of another language; more passes over the same text teach little
PER_CHARACTER = 2000  # sentences that tell the tokens a character of a language
LONGEST = 300  # characters of a sentence; a teacher reads hardly more at once
TEST_REGISTERS = ("everyday", "story")
TEST_PER_CELL = 18  # test documents for each topic and test register
HELDOUT_PER_CELL = 2  # held-out documents for each topic and register
HELDOUT_PAIRS = 0.1  # share of the pairs of translations that the held-out loss is measured on
EXACT, SAMPLE = 2**20, 16  # see _Seen
IN_MEMORY = 2**24  # characters of a corpus that are held in memory; a larger corpus is kept in files


@dataclass
class Corpus:
    """A corpus, split by document.

    Attributes:
        train: what students are distilled on.
        heldout: what the held-out loss is measured on.
        test: what embedded tasks are tested on.
        origin: what was read.
    """

    train: Sequence[Document]
    heldout: Sequence[Document]
    test: Sequence[Document]
    origin: Origin | None = field(default=None, compare=False)
    parts: "dict[str, Corpus]" = field(default_factory=dict, compare=False)  # of several languages: each by its code
    temporary: tempfile.TemporaryDirectory | None = field(default=None, compare=False, repr=False)  # goes with it

    @property
    def target(self) -> "Corpus":
        """The corpus of the target language, without other languages."""
        return next(iter(self.parts.values()), self)


def load_corpus(spec: config.Corpus, language: str, seed: int, cache_root: Path | None = None) -> Corpus:
    """Load the profile's corpus, split by document. The split depends on the text alone, not on order or seed.

    The first place of the source and its fallbacks that can be read is used. A corpus of more than IN_MEMORY characters
    is written to files, and its parts are `Lazy`.

    Args:
        spec: the source. With streaming, the first max_documents documents are read; without, max_documents are drawn.
        language: code of the language, which an embedded corpus must have.
        seed: of the draw.
        cache_root: folder for the files of a large corpus, reused while the source is unchanged; None: a temporary one.

    Raises:
        UserError: for sources that cannot be read, an empty text, or too few documents to hold any out.
    """
    if spec.source == "embedded":
        if language != "tgl":
            raise UserError(
                f"the embedded corpus is Tagalog (tgl); for language {language!r} set corpus.source to a file"
            )
        documents = embedded_documents()
        corpus = _split_embedded(documents)
        if spec.max_documents and len(corpus.train) > spec.max_documents:
            corpus.train = random.Random(seed).sample(corpus.train, spec.max_documents)
        corpus.origin = _origin(corpus, spec.source, None, digest(d.sentences for d in documents))
        check_leaks(corpus)
    else:
        corpus, passed_over = first_of(spec, lambda place: _load(place, seed, cache_root), "corpus")
        corpus.origin = replace(corpus.origin, passed_over=passed_over)
    return corpus


def load_languages(
    profile: config.Profile, count_tokens: Callable[[list[str]], int], cache_root: Path | None = None
) -> Corpus:
    """Load the corpora of all languages of a profile, mixed by `profile.shares`.

    All text of the target is used once. Documents of another language are drawn evenly or repeated, up to MOST_REPEATS
    times, until it has its share of the tokens. `test` and `origin` are the target's; `parts` holds each corpus.

    Args:
        profile: with several languages.
        count_tokens: the tokens of some texts.
        cache_root: see `load_corpus`.

    Raises:
        UserError: see `load_corpus`.
    """
    specs, shares = {profile.target: profile.corpus} | profile.corpora, profile.shares
    parts = {code: load_corpus(specs[code], code, profile.seed, cache_root) for code in profile.languages}
    tokens = {}  # of a language: tokens of its training documents, estimated from the first sentences
    for code, part in parts.items():
        some = sentences(part.train)[:PER_CHARACTER]
        rate = count_tokens(some) / sum(map(len, some))
        tokens[code] = rate * sum(len(s) for document in part.train for s in document.sentences)
    whole = tokens[profile.target] / shares[profile.target]
    times = {code: min(MOST_REPEATS, whole * shares[code] / tokens[code]) for code in parts}

    def mixed() -> Iterator[Document]:
        for code, part in parts.items():
            due = 0.0
            for document in part.train:
                size = sum(map(len, document.sentences))
                due += times[code] * size
                while due >= size / 2 and size:
                    due -= size
                    yield document

    lazy = any(isinstance(part.train, Lazy) for part in parts.values())
    held = [document for part in parts.values() for document in part.heldout]
    target = parts[profile.target]
    return Corpus(Lazy(mixed) if lazy else list(mixed()), held, target.test, target.origin, parts)


def _origin(corpus: Corpus, place: str, commit: str | None, content: str, facts: Any = None) -> Origin:
    sizes = {"train": len(corpus.train), "heldout": len(corpus.heldout), "test": len(corpus.test)}
    return Origin(place, commit, content, sizes, **facts or {})


def embedded_documents() -> list[Document]:
    """The documents of the embedded Tagalog corpus."""
    rows = embedded_rows("documents")
    return [Document(r.id, list(r.sentences), {"topic": r.topic, "register": r.register}) for r in rows.itertuples()]


def _load(spec: config.Corpus, seed: int, cache_root: Path | None) -> Corpus:
    """The corpus of one place."""
    columns = [spec.text, *([spec.document] if spec.document else [])]
    rows, commit = stream_rows(spec, columns, whole=not spec.streaming)
    state = commit or local_state(spec)
    temporary = None if cache_root else tempfile.TemporaryDirectory(prefix="kdlib-")
    folder = Path(cache_root or temporary.name) / "corpus" / fingerprint(spec.model_dump(), seed, state)
    if state and (kept := _kept(folder, spec.source, commit)):
        return kept
    seen = _Seen(spec)
    documents = itertools.islice(seen.through(rows), spec.max_documents if spec.streaming else None)
    small, size = [], 0
    for document in documents:
        small.append(document)
        size += sum(map(len, document.sentences))
        if size > IN_MEMORY:
            split_in_files(itertools.chain(small, documents), spec, seed, folder, seen.facts)
            corpus = _kept(folder, spec.source, commit)
            corpus.temporary = temporary
            return corpus
    small = _joined(small)
    if len(small) < 10:
        raise UserError(f"{spec.source}: {len(small)} documents with text; at least 10 are needed, some are held out")
    corpus = _split(small, spec.heldout)
    if spec.max_documents and len(corpus.train) > spec.max_documents:
        corpus.train = random.Random(seed).sample(corpus.train, spec.max_documents)
    corpus.origin = _origin(corpus, spec.source, commit, digest(d.sentences for d in small), seen.facts())
    check_leaks(corpus)
    return corpus


class _Seen:
    """What was seen of a corpus on the way: rows without text, and how many sentences repeat earlier ones.

    After EXACT sentences, repetition is counted on one in SAMPLE, chosen by its hash; with `drop_repeats` on all, at
    about 60 bytes a sentence.
    """

    def __init__(self, spec: config.Corpus):
        self.spec, self.skipped = spec, 0
        self.marks: set[int] = set()
        self.exact, self.sample = [0, 0], [0, 0]  # sentences, and how many of them are repeats

    def through(self, rows: Iterable[dict[str, Any]]) -> Iterator[Document]:
        """The documents of the rows, without what the profile leaves out."""
        for document in _documents(map(self._row, rows), self.spec):
            kept = [s for s in document.sentences if not (self._repeats(s) and self.spec.drop_repeats)]
            if kept:
                yield replace(document, sentences=kept)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        text = row.get(self.spec.text)
        self.skipped += not _has_text(text)
        return row | {self.spec.text: repaired(text)} if self.spec.repair and isinstance(text, str) else row

    def _repeats(self, sentence: str) -> bool:
        mark = _mark(sentence)
        tallies = [self.sample] if mark % SAMPLE == 0 else []
        tallies += [self.exact] if self.spec.drop_repeats or self.exact[0] <= EXACT else []
        found = mark in self.marks
        for tally in tallies:
            tally[0] += 1
            tally[1] += found
            self.marks.add(mark)
        return found

    def facts(self) -> dict[str, Any]:
        """Fields of the origin."""
        count, repeats = self.exact if self.spec.drop_repeats or self.exact[0] <= EXACT else self.sample
        return {"skipped": self.skipped, "repeated": round(repeats / max(1, count), 4)}


def _documents(rows: Iterable[dict[str, Any]], spec: config.Corpus) -> Iterator[Document]:
    """Group rows into documents: neighbouring rows with the same name.

    A column `document` that the profile does not name and that has only one value is ignored. Then, as without the
    column, every row is a document.
    """
    column, several = spec.document or "document", bool(spec.document)
    name, waiting, size = None, [], 0  # of the current document: its name, and number and text of its rows
    for number, row in enumerate(rows):
        text = row.get(spec.text)
        if not _has_text(text):
            continue
        own = str(row[column]) if column in row else None
        if own is None or own != name or (not several and size > IN_MEMORY):
            several = several or (None not in (own, name) and own != name)
            yield from _together(name, waiting, several)
            name, waiting, size = own, [], 0
        waiting.append((number, text))
        size += len(text)
        if own is None:
            yield from _together(name, waiting, several)
            waiting = []
    yield from _together(name, waiting, several)


def _together(name: str | None, rows: list[tuple[int, str]], several: bool) -> Iterator[Document]:
    """The document of some rows; one for each row where they have no name, or where all rows would be one document."""
    grouped = several and name is not None
    for own, texts in [(name, [t for _, t in rows])] if grouped else [(f"row {n}", [t]) for n, t in rows]:
        sentences = [s for text in texts for s in split_sentences(text)]
        if sentences:
            yield Document(own, sentences)


def _joined(documents: list[Document]) -> list[Document]:
    """The documents, with those of the same name joined."""
    found: dict[str, Document] = {}
    for document in documents:
        if document.id in found:
            found[document.id].sentences += document.sentences
        else:
            found[document.id] = document
    return list(found.values())


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def split_sentences(text: str) -> list[str]:
    """Split at sentence ends before a space (after 。！？ also without), and at line ends. White space is collapsed.

    Longer text than LONGEST is split at spaces: Thai and Lao have no mark for the end of a sentence, and a teacher
    would truncate it.
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
    train, heldout, test = [], [], []
    for (_, register), cell in sorted(cells.items()):
        tests = TEST_PER_CELL if register in TEST_REGISTERS else 0
        test += cell[:tests]
        heldout += cell[tests : tests + HELDOUT_PER_CELL]
        train += cell[tests + HELDOUT_PER_CELL :]
    return Corpus(train, heldout, test)


def _split(documents: list[Document], heldout: float) -> Corpus:
    """Hold out a share of the documents. Sentences on both sides are removed from the training side."""
    ranked = sorted(documents, key=_rank)
    count = max(1, round(len(ranked) * heldout))
    held = {sentence for document in ranked[:count] for sentence in document.sentences}
    train = [Document(d.id, [s for s in d.sentences if s not in held], d.meta) for d in ranked[count:]]
    train = [d for d in train if d.sentences]
    if not train:
        raise UserError("corpus: all documents have the same sentences; nothing is left to train on")
    return Corpus(train, ranked[:count], [])


def split_in_files(
    documents: Iterable[Document], spec: config.Corpus, seed: int, folder: Path, facts: Callable[[], Any] = dict
) -> None:
    """`_split`, and the draw of max_documents, for more documents than fit in memory.

    Writes `train` and `heldout` in `folder`, and `facts` of the origin, asked for after all documents are read. Memory
    holds 17 bytes a document and 8 a held-out sentence.
    """
    ranks, names, content = array("Q"), array("Q"), hashlib.sha256()

    def noted() -> Iterator[Document]:
        for document in documents:
            ranks.append(int(_rank(document)[:16], 16))
            names.append(_mark(document.id))
            content.update(row_bytes(document.sentences))
            yield document

    with new_folder(folder) as work:
        everything = work / "everything"
        write(everything, noted())
        if len(np.unique(np.frombuffer(names, np.uint64))) < len(names):
            raise UserError(
                f"{spec.source}: in a corpus of this size the rows of a document must follow one another; "
                f"sort it by {spec.document or 'document'}"
            )
        order = np.argsort(np.frombuffer(ranks, np.uint64), kind="stable")
        count = max(1, round(len(order) * spec.heldout))
        order, heldout = order[count:], order[:count]
        held = _marks(s for document in picked(everything, heldout) for s in document.sentences)

        def left(document: Document) -> Document:
            known = _among(document.sentences, held)
            return Document(document.id, [s for s, k in zip(document.sentences, known) if not k])

        alive = np.fromiter((bool(left(d).sentences) for d in read(everything)), bool)
        order = order[alive[order]]
        if not len(order):
            raise UserError("corpus: all documents have the same sentences; nothing is left to train on")
        if spec.max_documents and len(order) > spec.max_documents:
            order = order[random.Random(seed).sample(range(len(order)), spec.max_documents)]
        write(work / "train", map(left, picked(everything, order)))
        write(work / "heldout", picked(everything, heldout))
        everything.unlink()
        write_json(work / "corpus.json", {"sha256": content.hexdigest(), "facts": facts()})


def _kept(folder: Path, place: str, commit: str | None) -> Corpus | None:
    """The corpus that `split_in_files` wrote, or None."""
    try:
        about = read_json(folder / "corpus.json")
        content, facts = about["sha256"], about["facts"]
        corpus = Corpus(read(folder / "train"), read(folder / "heldout"), [])
    except (UserError, KeyError, OSError, ValueError):
        return None
    corpus.origin = _origin(corpus, place, commit, content, facts)
    return corpus


def _mark(text: str) -> int:
    """A text's hash in 8 bytes; two of a thousand million texts are unlikely to share one."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _marks(texts: Iterable[str]) -> np.ndarray:
    """The hashes of texts, each once, sorted: uint64."""
    return np.unique(np.frombuffer(array("Q", map(_mark, texts)), np.uint64))


def _among(texts: Sequence[str], marks: np.ndarray) -> np.ndarray:
    """Which of the texts have a hash in `marks`: bool [texts]."""
    mine = np.fromiter(map(_mark, texts), np.uint64, len(texts))
    return marks[np.searchsorted(marks, mine).clip(max=len(marks) - 1)] == mine


def check_leaks(corpus: Corpus) -> None:
    """Raise UserError if a held-out or test sentence is in the training documents."""
    train = {sentence for document in corpus.train for sentence in document.sentences}
    for name in ("heldout", "test"):
        leaked = [s for document in getattr(corpus, name) for s in document.sentences if s in train]
        if leaked:
            raise UserError(
                f"corpus: {len(leaked)} {name} sentences are also in the training documents, such as {leaked[0]!r}"
            )


def sentences(documents: Sequence[Document]) -> Sequence[str]:
    """All sentences, in order; `Lazy` where the documents are."""
    return windows(documents, [1])


def windows(documents: Sequence[Document], lengths: list[int]) -> Sequence[str]:
    """Texts to distil on: runs of neighbouring sentences, joined by a space. `Lazy` where the documents are.

    Args:
        documents: each sentence of them is in one text.
        lengths: sentences a text, in turn.
    """

    def cut() -> Iterator[str]:
        turns = itertools.cycle(lengths)
        for document in documents:
            at = 0
            while at < len(document.sentences):
                end = at + next(turns)
                yield " ".join(document.sentences[at:end])
                at = end

    return Lazy(cut) if isinstance(documents, Lazy) else list(cut())


def without(documents: Sequence[Document], texts: set[str]) -> Sequence[Document]:
    """The documents without the sentences in `texts`, such as test rows of a task. `Lazy` where the documents are."""

    def left() -> Iterator[Document]:
        for document in documents:
            kept = [s for s in document.sentences if s not in texts]
            if kept:
                yield Document(document.id, kept, document.meta)

    return Lazy(left) if isinstance(documents, Lazy) else list(left())


def draw(texts: Sequence[str], count: int | None, share: float, seed: int) -> Sequence[str]:
    """Draw at most `count` of the texts, and a share of those, in their order. `Lazy` where the texts are.

    A smaller draw is part of a larger one.
    """
    if share == 1 and (count is None or count >= len(texts)):
        return texts
    chosen = np.random.default_rng(seed).permutation(len(texts))[:count]
    chosen = chosen[: max(1, round(len(chosen) * share))]
    wanted = np.zeros(len(texts), bool)
    wanted[chosen] = True
    some = Lazy(lambda: itertools.compress(texts, wanted), len(chosen))
    return some if isinstance(texts, Lazy) else list(some)


def load_parallel(spec: config.Parallel | None, language: str, rows: int | None = None) -> dict[str, list[str]]:
    """The first `rows` (None: all) sentences that exist in all languages, by language.

    Returns:
        Nothing without parallel sentences, or where `language` is not among their languages.

    Raises:
        UserError: for a missing column.
    """
    if spec is None or language not in spec.languages:
        return {}
    table = embedded_rows("parallel") if spec.source == "embedded" else read_rows(spec, spec.languages)
    missing = [code for code in spec.languages if code not in table]
    if missing:
        raise UserError(f"parallel.languages: no column {', '.join(missing)}; there are {', '.join(table.columns)}")
    whole = table[spec.languages].map(_has_text).all(axis=1)
    return {code: list(table[whole][code])[:rows] for code in spec.languages}


@dataclass
class TranslationPairs:
    """Sentences with their translations.

    Attributes:
        texts: in the language of the study.
        translations: in the language that the teacher reads.
        language: that of the translations.
    """

    texts: list[str]
    translations: list[str]
    language: str


def first_pairs(parallel: dict[str, list[str]], language: str) -> TranslationPairs:
    """The sentences of `language` with those of the first other language; none where one is missing."""
    other = next(iter(code for code in parallel if code != language), "")
    return TranslationPairs(parallel.get(language, []) if other else [], parallel.get(other, []), other)


def translation_pairs(
    parallel: dict[str, list[str]], language: str, rows: int, tested: set[str], seed: int
) -> tuple[TranslationPairs, TranslationPairs]:
    """Pairs to train on and held-out pairs, of the language and the first other one.

    Args:
        parallel: sentences by language.
        language: that of the student.
        rows: so many pairs at the start are for the tests of retrieval, and left out.
        tested: texts that no pair may have.
        seed: of the order.

    Raises:
        UserError: where fewer than 10 pairs are left.
    """
    whole = first_pairs(parallel, language)
    both = list(zip(whole.texts, whole.translations))
    tested = tested.union(*both[:rows])
    left = [pair for pair in both[rows:] if not tested.intersection(pair)]
    if len(left) < 10:
        raise UserError(
            f"parallel: {len(both)} pairs, {len(left)} to train on; objectives of translations need at least 10, "
            f"and the first {rows} (probe.languages_rows) are for tests"
        )
    random.Random(seed).shuffle(left)
    held = max(1, round(len(left) * HELDOUT_PAIRS))
    train, heldout = (
        TranslationPairs([text for text, _ in part], [translation for _, translation in part], whole.language)
        for part in (left[held:], left[:held])
    )
    return train, heldout
