"""Tokenised texts: the same from memory and from files, made once, rebuilt where anything they depend on changes."""

import numpy as np
import pytest
import tiny

from kdlib.data.lazy import parts
from kdlib.models import token_store
from kdlib.models.masking import maskable_tokens, word_numbers
from kdlib.models.token_store import Ragged, tokenise

TEXTS = tiny.texts(100)


@pytest.fixture
def made(monkeypatch):
    """The fields of each call that went through the tokenizer."""
    calls, encoded = [], token_store.encoded

    def counted(encoder, texts, fields):
        calls.append(list(fields))
        return encoded(encoder, texts, fields)

    monkeypatch.setattr(token_store, "encoded", counted)
    return calls


def equal(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("cached", [True, False])
def test_ids_and_fields_are_the_tokenizers(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "parts", lambda texts: parts(texts, 7))
    encoder = tiny.encoder(prefix="ang ")
    for _ in range(2):  # the second time from the files
        found = tokenise(
            encoder, iter(TEXTS) if not cached else TEXTS, ["maskable", "words"], tmp_path if cached else None
        )
        own = encoder.tokenize(TEXTS)
        assert equal(found["ids"], [e.ids for e in own]) and found["ids"].values.dtype == np.int32
        assert equal(found["maskable"], maskable_tokens(encoder.tokenizer, own, encoder.prefix))
        assert equal(found["words"], word_numbers(own))
    assert any(tmp_path.rglob("*")) == cached


def test_tokenised_once(tmp_path, made):
    encoder = tiny.encoder()
    first, again = (tokenise(encoder, TEXTS, root=tmp_path)["ids"] for _ in range(2))
    encoder.tokenize(["ang " * 100])  # leaves its truncation on
    tokenise(tiny.encoder(seed=3), TEXTS, root=tmp_path)  # another model with the same tokenizer
    assert made == [["ids"]] and equal(first, again)
    assert type(again.values) is np.ndarray and again.values.flags.writeable  # or torch warns at every batch


def test_whatever_tokens_depend_on_names_them(tmp_path, made):
    base = dict(encoder=tiny.encoder(), texts=TEXTS)
    other = tiny.encoder()
    other.tokenizer.backend_tokenizer.normalizer = None
    short = tiny.encoder()
    short.max_length = 16
    changes = [
        {}, {"texts": TEXTS[:-1]}, {"texts": TEXTS[::-1]}, {"texts": [" ".join(TEXTS[:2]), *TEXTS[2:]]},
        {"encoder": other}, {"encoder": tiny.encoder(prefix="ang ")}, {"encoder": short}, {"fields": ["maskable"]},
    ]  # fmt: skip
    for change in changes:
        tokenise(**(base | change), root=tmp_path)
    assert len(made) == len(changes) == len(list((tmp_path / "tokens").iterdir()))


@pytest.mark.parametrize("how", ["torn", "corrupted"])
@pytest.mark.parametrize("name", ["ids", "lengths", "starts"])
def test_damaged_files_are_named_and_made_anew(name, how, tmp_path, made, caplog):
    encoder = tiny.encoder()
    whole = [row.copy() for row in tokenise(encoder, TEXTS, root=tmp_path)["ids"]]
    (file,) = tmp_path.rglob(name)
    content = file.read_bytes()
    file.write_bytes(content[:-4] if how == "torn" else bytes([content[0] ^ 1]) + content[1:])
    assert equal(tokenise(encoder, TEXTS, root=tmp_path)["ids"], whole)
    assert len(made) == 2 and f"{name} is {how}" in caplog.text


def test_stopped_on_the_way_leaves_nothing(tmp_path):
    def some():
        yield from TEXTS[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise(tiny.encoder(), some(), root=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_texts_give_no_rows(tmp_path):
    assert len(tokenise(tiny.encoder(), [])["ids"]) == len(tokenise(tiny.encoder(), [], root=tmp_path)["ids"]) == 0


def test_part_of_the_rows_shares_their_values():
    rows = Ragged(np.arange(10), np.array([0, 3, 3, 8]), np.array([3, 0, 5, 2]))
    assert [list(row) for row in rows] == [[0, 1, 2], [], [3, 4, 5, 6, 7], [8, 9]]
    some = rows.part([3, 0]).part([1])
    assert [list(row) for row in some] == [[0, 1, 2]] and some.values is rows.values
