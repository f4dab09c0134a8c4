"""What an encoder has read it need not read again; and nothing but what it has read is remembered."""

import numpy as np
import pytest
import tiny

from kdlib.models import encoder as module
from kdlib.models import vector_cache
from kdlib.models.encoder import text_vectors, word_vectors
from kdlib.models.vector_cache import VectorCache, body_key
from kdlib.pruning.model import prune_model
from kdlib.pruning.tokenizer import prune_tokenizer

WORDS = [["maganda", "ang", "araw"], ["ulan", "sa", "gabi"], ["ang"], ["maganda", "ang", "araw"]]
TEXTS = ["maganda ang araw", "ulan sa gabi", "ang bata at ang aso", "maganda ang araw"]


@pytest.fixture
def reads(monkeypatch):
    """How many texts the model was given, a number a call."""
    seen, run = [], module.run_batches

    def counted(encoder, encodings, label):
        seen.append(len(encodings))
        return run(encoder, encodings, label)

    monkeypatch.setattr(module, "run_batches", counted)
    return seen


def remembering(folder, **changes):
    encoder = tiny.encoder(layers=2)
    encoder.vector_cache = VectorCache(folder, **changes)
    return encoder


@pytest.mark.parametrize("layers", [None, [0, 2], [1]])
def test_vectors_are_those_of_an_encoder_without_memory(tmp_path, layers):
    plain, encoder = tiny.encoder(layers=2), remembering(tmp_path / "v")
    wanted = text_vectors(plain, TEXTS, layers)
    for texts in (TEXTS[:2], TEXTS, TEXTS):
        np.testing.assert_allclose(text_vectors(encoder, texts, layers), wanted[: len(texts)], atol=1e-6)
    assert text_vectors(encoder, [], layers).shape == text_vectors(plain, [], layers).shape


def test_each_text_is_read_once_by_all_processes(tmp_path, reads):
    first, later = remembering(tmp_path / "v"), remembering(tmp_path / "v")
    text_vectors(first, TEXTS[:2])
    text_vectors(first, TEXTS, [0, 1, 2])
    text_vectors(later, TEXTS, [1])
    assert reads == [2, 1]


def test_a_pruned_encoder_remembers_what_the_whole_one_read(tmp_path, reads):
    whole = remembering(tmp_path / "v")
    ids = sorted({i for e in whole.tokenize(TEXTS) for i in e.ids} | set(whole.tokenizer.all_special_ids))
    pruned = tiny.encoder(layers=2)
    pruned.tokenizer = prune_tokenizer(pruned.tokenizer, ids)
    pruned.model = prune_model(pruned.model, whole.tokenizer, ids)
    assert body_key(pruned.model) == body_key(whole.model) != body_key(tiny.encoder(layers=1).model)
    pruned.vector_cache = VectorCache(tmp_path / "v", np.array(ids))
    wanted = text_vectors(whole, TEXTS)
    assert np.array_equal(text_vectors(pruned, TEXTS), wanted) and reads == [3]


def test_texts_without_room_are_read_every_time(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(vector_cache, "ROOM", 100)
    encoder = remembering(tmp_path / "v")
    assert np.array_equal(text_vectors(encoder, TEXTS), text_vectors(encoder, TEXTS))
    assert reads == [4, 4] and not (tmp_path / "v").exists()


def test_a_torn_file_is_named_and_read_again(tmp_path, reads, caplog):
    wanted = text_vectors(remembering(tmp_path / "v"), TEXTS)
    file = next((tmp_path / "v").glob("*.npz"))
    file.write_bytes(file.read_bytes()[:-40])
    assert np.array_equal(text_vectors(remembering(tmp_path / "v"), TEXTS), wanted)
    assert reads == [3, 3] and file.name in caplog.text


def test_words_are_read_once_at_the_last_layer(tmp_path, reads):
    plain, first, later = tiny.encoder(layers=2), remembering(tmp_path / "v"), remembering(tmp_path / "v")
    wanted, places = word_vectors(plain, WORDS, [0, 1, 2])
    reads.clear()
    np.testing.assert_allclose(word_vectors(first, WORDS[:2], [0, 1, 2])[0], wanted[:6], atol=1e-6)
    for encoder, layers, k in ((later, None, 2), (first, [2], 2), (later, [1], 1)):
        vectors, found = word_vectors(encoder, WORDS, layers)
        np.testing.assert_allclose(vectors[:, 0], wanted[:, k], atol=1e-6)
        assert np.array_equal(found, places)
    assert reads == [2, 1, 4]  # all layers; what was new; another layer than the last
    assert word_vectors(later, [])[0].shape == (0, 1, plain.hidden)


def test_words_are_not_taken_for_the_text_they_make_up(tmp_path):
    encoder, plain = remembering(tmp_path / "v"), tiny.encoder(layers=2)
    text_vectors(encoder, [" ".join(WORDS[0])])
    np.testing.assert_allclose(word_vectors(encoder, WORDS)[0], word_vectors(plain, WORDS)[0], atol=1e-6)
    joined = ["".join(WORDS[2] * 2)]  # the same letters, other words
    np.testing.assert_allclose(
        word_vectors(encoder, [WORDS[2] * 2, joined])[0], word_vectors(plain, [WORDS[2] * 2, joined])[0], atol=1e-6
    )


def test_words_without_room_are_read_every_time(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(vector_cache, "ROOM", 100)
    encoder = remembering(tmp_path / "v")
    assert np.array_equal(word_vectors(encoder, WORDS)[0], word_vectors(encoder, WORDS)[0])
    assert reads == [3, 3] and not (tmp_path / "v").exists()
