"""Sequences that are not in memory: what comes out is what went in, as often as it is asked for."""

import itertools

import pytest

from kdlib.data import lazy as documents
from kdlib.data.lazy import Document, Lazy, parts, picked, read, write

MADE = [Document(str(i), [f"Una {i}.", "Ikalawa 😀"][: 1 + i % 2]) for i in range(20)]


def test_documents_come_back_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "AT_ONCE", 7)
    assert write(tmp_path / "d", iter(MADE)) == 20
    found = read(tmp_path / "d")
    assert len(found) == 20 and list(found) == list(found) == MADE
    assert list(picked(tmp_path / "d", [19, 3, 3])) == [MADE[19], MADE[3], MADE[3]]


def test_damaged_file_is_refused(tmp_path):
    write(tmp_path / "d", MADE)
    (tmp_path / "d").write_bytes((tmp_path / "d").read_bytes()[:-50])
    with pytest.raises((ValueError, OSError)):
        read(tmp_path / "d")


def test_lazy_is_a_sequence():
    lazy = Lazy(lambda: iter(range(10)))
    assert len(lazy) == 10 and lazy[3] == 3 and lazy[-1] == 9 and 7 in lazy
    assert lazy[:3] == [0, 1, 2] and lazy[2:8:3] == [2, 5] and lazy[-2:] == [8, 9] and lazy[:-8] == [0, 1]
    assert lazy == list(range(10)) and lazy != list(range(9))
    with pytest.raises(IndexError):
        lazy[10]


def test_the_first_items_cost_no_more_than_themselves():
    seen = []
    lazy = Lazy(lambda: (seen.append(i) or i for i in itertools.count()))
    assert lazy[:3] == [0, 1, 2] and seen == [0, 1, 2]


def test_parts_hold_every_item_once():
    assert list(parts(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]] and list(parts([], 3)) == []
