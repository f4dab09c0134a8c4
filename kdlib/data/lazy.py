"""Documents, and sequences that are not in memory: documents in a file, and what is computed from them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar, overload

import pyarrow as pa

T = TypeVar("T")
AT_ONCE = 1024  # documents that are written and read together
TEXTS_AT_ONCE = 2048  # texts tokenised in one call: a tokenizer's records need a hundred times the memory of the ids
SCHEMA = pa.schema({"id": pa.string(), "sentences": pa.list_(pa.string())})


@dataclass
class Document:
    """A text as sentences in order; `meta` holds other facts (topic, register)."""

    id: str
    sentences: list[str]
    meta: dict = field(default_factory=dict)


class Lazy(Sequence[T]):
    """A sequence whose items are computed again at each iteration.

    An iteration needs little memory. The length costs an iteration unless `length` gives it. Item i costs i steps.
    """

    def __init__(self, make: Callable[[], Iterator[T]], length: int | None = None):
        self.make, self.length = make, length

    def __iter__(self) -> Iterator[T]:
        return self.make()

    def __len__(self) -> int:
        if self.length is None:
            self.length = sum(1 for _ in self)
        return self.length

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place):
        if isinstance(place, slice):
            first = place.start is None and place.step is None and place.stop is not None and place.stop >= 0
            return list(islice(self, place.stop) if first else islice(self, *place.indices(len(self))))
        place = range(len(self))[place]
        return next(islice(self, place, None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))


def parts(items: Iterable[T], size: int = TEXTS_AT_ONCE) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter. One list at a time is in memory."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def write(file: Path, documents: Iterable[Document]) -> int:
    """Write the documents, without `meta`, as an Arrow file, in one iteration. Returns their number."""
    count = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for some in parts(documents, AT_ONCE):
            writer.write_batch(pa.record_batch([[d.id for d in some], [d.sentences for d in some]], SCHEMA))
            count += len(some)
    return count


def read(file: Path) -> Lazy[Document]:
    """The documents of a file of `write`, read from a memory map. Raises ValueError for a damaged file."""

    def documents() -> Iterator[Document]:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                for name, sentences in zip(batch["id"].to_pylist(), batch["sentences"].to_pylist()):
                    yield Document(name, sentences)

    with pa.memory_map(str(file)) as source:
        reader = pa.ipc.open_file(source)
        return Lazy(documents, sum(reader.get_batch(n).num_rows for n in range(reader.num_record_batches)))


def picked(file: Path, order: Iterable[int]) -> Iterator[Document]:
    """Documents of a file by their numbers, in any order."""
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
        names, sentences = table["id"], table["sentences"]
        for place in order:
            yield Document(names[int(place)].as_py(), sentences[int(place)].as_py())
