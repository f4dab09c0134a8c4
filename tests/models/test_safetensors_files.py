"""Model files without a model: what they hold, and copies of some of their rows."""

import itertools
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kdlib.errors import UserError
from kdlib.models.safetensors_files import (
    CHUNK,
    copy_tensors,
    read_header,
    runs,
    stored_tensors,
    weights_fingerprint,
    weights_folder,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


def mixed():
    """Tensors of many types whose sizes are odd, so that none would lie straight by luck."""
    torch.manual_seed(0)
    tensors = {f"t{i}": (torch.randn(7, 3) * 9).to(dtype) for i, dtype in enumerate(DTYPES)}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "line": torch.arange(11).half()}


@given(st.sets(st.integers(0, 60), min_size=1))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_runs_are_the_ids_in_the_fewest_ranges(ids):
    ids = sorted(ids)
    ranges = runs(ids)
    assert [i for first, end in ranges for i in range(first, end)] == ids
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("kept", [[0], [6], [0, 1, 2], [1, 3, 4, 6], list(range(7))])
def test_copy_holds_the_rows_bit_for_bit_whatever_their_type(kept, tmp_path):
    tensors = mixed()
    save_file(tensors, tmp_path / "full.safetensors", {"format": "pt", "note": "ñ"})
    stored, metadata = read_header(tmp_path / "full.safetensors")
    cut = {name: runs(kept) for name in stored if name.startswith("t")}
    copy_tensors(tmp_path / "few.safetensors", stored, cut, metadata)
    found = load_file(tmp_path / "few.safetensors")
    assert found.keys() == tensors.keys() and metadata == {"format": "pt", "note": "ñ"}
    for name, value in tensors.items():
        expected = value[kept] if name in cut else value
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)
    again, noted = read_header(tmp_path / "few.safetensors")
    assert noted == metadata and all(tensor.start % max(1, tensor.width) == 0 for tensor in again.values())


def test_whole_copy_is_what_the_library_reads_from_the_original(tmp_path):
    save_file(mixed(), tmp_path / "a.safetensors")
    copy_tensors(tmp_path / "b.safetensors", read_header(tmp_path / "a.safetensors")[0], {}, {})
    a, b = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


def test_tensors_longer_than_the_buffer_are_copied_whole(tmp_path):
    values = torch.arange(CHUNK // 4 * 3 + 5, dtype=torch.int32).reshape(-1, 1)
    save_file({"x": values}, tmp_path / "a.safetensors")
    copy_tensors(tmp_path / "b.safetensors", read_header(tmp_path / "a.safetensors")[0], {}, {})
    assert torch.equal(load_file(tmp_path / "b.safetensors")["x"], values)


def test_memory_is_a_buffer_however_large_the_file(tmp_path):
    save_file({"x": torch.ones(1 << 13, 1 << 11)}, tmp_path / "a.safetensors")  # 64 MB
    stored = read_header(tmp_path / "a.safetensors")[0]
    tracemalloc.start()
    copy_tensors(tmp_path / "b.safetensors", stored, {"x": runs(np.arange(0, 1 << 13, 2))}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "b.safetensors").stat().st_size > 3e7 and peak < 4 * CHUNK


def shards(folder):
    tensors = mixed()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tensors


def test_shards_are_read_as_one(tmp_path):
    tensors = shards(tmp_path)
    stored = stored_tensors(tmp_path)
    assert stored.keys() == tensors.keys()
    assert {name: tuple(t.shape) for name, t in stored.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    copy_tensors(tmp_path / "one.safetensors", stored, {}, {})
    found = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"x": 5}}'])
def test_broken_index_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="not an index"):
        stored_tensors(tmp_path)


def test_missing_shard_and_missing_file_are_named(tmp_path):
    with pytest.raises(UserError, match="model.safetensors: not a whole"):
        stored_tensors(tmp_path)
    shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_file_that_is_cut_off_is_refused(keep, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(mixed(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        stored_tensors(tmp_path)


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(mixed(), file)
    stored = stored_tensors(tmp_path)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match="ends before its last tensor"):
        copy_tensors(tmp_path / "b.safetensors", stored, {}, {})


# where the files lie


def test_folder_of_weights(tmp_path):
    assert weights_folder(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert weights_folder(tmp_path) is None
    shards(tmp_path)
    assert weights_folder(tmp_path) == weights_folder(str(tmp_path)) == tmp_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache that holds two versions of one model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--maker--model"
    for version in ("1" * 40, "2" * 40):
        folder = root / "snapshots" / version
        folder.mkdir(parents=True)
        save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("2" * 40)
    return root / "snapshots"


def test_id_that_was_loaded_before_lies_in_the_cache(hub):
    assert weights_folder("maker/model") == hub / ("2" * 40)
    assert weights_folder("maker/model", "1" * 40) == hub / ("1" * 40)


@pytest.mark.parametrize("source", ["maker/other", "no id at all", "a/b/c", "/nowhere/model"])
def test_what_lies_nowhere_has_no_folder(source, hub):
    assert weights_folder(source) is None


def test_a_fingerprint_of_weights_moves_with_the_weights_and_not_with_the_folder(tmp_path):
    model = tiny.encoder(layers=2).model
    model.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = weights_fingerprint(tmp_path / "one")
    assert weights_fingerprint(tmp_path / "two") == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    model.save_pretrained(tmp_path / "two")
    assert weights_fingerprint(tmp_path / "two") != before
    model.config.num_attention_heads = 2
    model.config.save_pretrained(tmp_path / "one")
    assert weights_fingerprint(tmp_path / "one") != before
