"""The teacher cache: what is computed, what is reused, and that nothing broken is ever used."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import tiny
import torch

from kdlib.distillation import teacher_cache
from kdlib.distillation.teacher_cache import gigabytes, teacher_states
from kdlib.errors import UserError

TEACHER = tiny.encoder()
IDS = [np.asarray(e.ids, np.int32) for e in TEACHER.tokenize(tiny.texts(50))]
TOKENS = sum(map(len, IDS))


@pytest.fixture
def passes(monkeypatch):
    """How many passes over the texts were made, and for which layers."""
    made = []
    compute = teacher_cache.write_states

    def counted(files, *rest):
        made.append(sorted(files))
        compute(files, *rest)

    monkeypatch.setattr(teacher_cache, "write_states", counted)
    return made


def states(root, layers=(2, 4), teacher=TEACHER, ids=IDS, budget=1.0):
    return teacher_states(root, teacher, ids, list(layers), budget)


def layer_files(root):
    return {path.name: path for path in root.rglob("layer-*.f16")}


def touch(root):
    """Give the files a new time of change, so that they are checked again, as in another process."""
    for path in layer_files(root).values():
        os.utime(path, ns=(time.time_ns(), time.time_ns()))


def test_states_are_the_teachers_within_half_precision(tmp_path):
    cached = states(tmp_path, (0, 2, 4))
    for places in ([0], [17, 3, 49]):
        lengths = [len(IDS[i]) for i in places]
        for row, i in enumerate(places):
            own = TEACHER.model(torch.tensor([IDS[i].tolist()]), output_hidden_states=True).hidden_states
            for layer in (0, 2, 4):
                found = cached.batch(layer, places, lengths)
                assert found.dtype == torch.float16 and found.shape == (len(places), max(lengths), 32)
                assert torch.allclose(found[row, : lengths[row]].float(), own[layer][0], atol=5e-3)
                assert not found[row, lengths[row] :].any()


def test_part_has_the_states_of_its_texts(tmp_path):
    cached = states(tmp_path)
    some = cached.part([4, 40])
    assert torch.equal(some.batch(4, [1], [len(IDS[40])]), cached.batch(4, [40], [len(IDS[40])]))


def test_layers_that_are_there_are_used_and_others_added_in_one_pass(tmp_path, passes):
    states(tmp_path, (2, 4))
    stamps = {name: path.stat().st_mtime_ns for name, path in layer_files(tmp_path).items()}
    states(tmp_path, (4, 2))
    wider = states(tmp_path, (0, 1, 2, 3, 4))
    assert passes == [[2, 4], [0, 1, 3]]
    files = layer_files(tmp_path)
    assert sorted(files) == [f"layer-{n:02}.f16" for n in range(5)] and sorted(wider.layers) == [0, 1, 2, 3, 4]
    assert all(files[name].stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    assert all(path.stat().st_size == gigabytes(TOKENS, 1, 32) * 1e9 for path in files.values())


def test_what_the_states_depend_on_has_a_folder_of_its_own(tmp_path, passes):
    other_weights, other_settings, bf16 = tiny.encoder(), tiny.encoder(), tiny.encoder()
    with torch.no_grad():  # a sum over the weights would not notice
        weight = other_weights.model.encoder.layer[0].output.dense.weight
        weight[0, 0], weight[0, 1] = weight[0, 1].item(), weight[0, 0].item()
    other_settings.model.config.layer_norm_eps = 1e-3
    bf16.bf16 = True
    split = [IDS[0][:3], IDS[0][3:], *IDS[1:]]  # the same ids in a row
    states(tmp_path)
    for teacher in (other_weights, other_settings, bf16):
        states(tmp_path, teacher=teacher)
    states(tmp_path, ids=split)
    states(tmp_path, ids=IDS[::-1])
    assert len(list(tmp_path.iterdir())) == len(passes) == 6
    states(tmp_path, teacher=tiny.encoder())
    assert len(passes) == 6


@pytest.mark.parametrize("how", ["flipped", "short", "long", "no checksum", "torn checksum"])
def test_a_broken_file_is_named_and_made_again(how, tmp_path, passes, caplog, monkeypatch):
    good = {n: np.array(v) for n, v in states(tmp_path).layers.items()}
    path = layer_files(tmp_path)["layer-02.f16"]
    if how == "flipped":
        with open(path, "r+b") as file:
            file.seek(777)
            file.write(bytes([file.read(1)[0] ^ 1]))
    elif how == "short":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "long":
        with open(path, "ab") as file:
            file.write(b"\0\0")
    elif how == "no checksum":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"crc32": ')
    touch(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = states(tmp_path)
    assert passes == [[2, 4], [2]]
    assert [str(path) in line and "\n" not in line for line in caplog.messages] == [True]
    assert all(np.array_equal(again.layers[n], good[n]) for n in good)
    caplog.clear()
    touch(tmp_path)
    states(tmp_path)
    assert len(passes) == 2 and not caplog.messages


def test_files_are_read_through_once_a_process(tmp_path, monkeypatch):
    read = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data, value=0: read.append(value) or crc32(data, value))
    states(tmp_path)
    states(tmp_path)
    assert len(read) == 2  # the checksum of a file just written is computed once
    touch(tmp_path)
    states(tmp_path)
    states(tmp_path)
    assert len(read) == 4
    os.utime(layer_files(tmp_path)["layer-04.f16"], (1, 1))
    states(tmp_path)
    assert len(read) == 5


def test_beyond_its_budget_the_teacher_runs_live(tmp_path, caplog):
    size = gigabytes(TOKENS, 2, 32)
    assert states(tmp_path, budget=size * 0.99) is None and not list(tmp_path.iterdir())
    assert "distill.cache_gigabytes" in caplog.messages[0] and "live" in caplog.messages[0]
    assert states(tmp_path, budget=size * 1.01) is not None
    assert states(tmp_path, (1, 2), budget=size * 1.4) is None  # with what is there already
    assert states(tmp_path, (1, 2), budget=size * 1.6) is not None


def test_without_room_on_the_disk_the_teacher_runs_live(tmp_path, caplog, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert states(tmp_path) is None and not layer_files(tmp_path)
    assert "no room" in caplog.messages[0] and str(tmp_path) in caplog.messages[0]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(tmp_path, caplog, monkeypatch):
    states(tmp_path, (2,))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert states(tmp_path, (2, 4)) is None
    assert "no room" in caplog.messages[0]
    assert [path.name for path in tmp_path.rglob("*layer*.f16")] == ["layer-02.f16"]


def test_a_place_that_cannot_be_written_is_an_error_unless_all_is_there(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        states(tmp_path / "file" / "cache")
    root = tmp_path / "cache"
    states(root)
    touch(root)
    monkeypatch.setattr(teacher_cache, "new_file", None)  # nothing is written any more
    assert states(root) is not None


def test_states_beyond_half_precision_are_refused(tmp_path):
    large = tiny.encoder()
    with torch.no_grad():
        large.model.encoder.layer[3].output.LayerNorm.bias += 1e6
    with pytest.raises(UserError, match="half precision; set distill.cache=false"):
        states(tmp_path, teacher=large)
    assert not layer_files(tmp_path)


@pytest.mark.slow
def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    """A process killed while it writes: nothing of it is used, and the next one clears it away."""
    code = (
        "import os, sys\nfrom distillation import test_teacher_cache\n"
        "from kdlib.distillation import teacher_cache as c\n"
        "from pathlib import Path\n"
        "c.checksum = lambda path: os.kill(os.getpid(), 9)\n"
        "test_teacher_cache.states(Path(sys.argv[1]))\n"
    )
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([os.path.dirname(here), os.path.dirname(os.path.dirname(here))])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    left = list(tmp_path.rglob(".layer-*"))
    assert done.returncode == -9 and len(left) == 2 and not layer_files(tmp_path)
    mine = left[0].with_name(f".layer-09-{os.getpid()}.f16")  # of a process that lives
    mine.write_text("")
    assert states(tmp_path) is not None and len(layer_files(tmp_path)) == 2
    assert [path.name for path in tmp_path.rglob(".layer-*")] == [mine.name]


def test_checksums_are_kept_beside_the_layers(tmp_path):
    import zlib

    states(tmp_path)
    for path in layer_files(tmp_path).values():
        kept = json.loads(path.with_suffix(".json").read_text())
        assert kept == {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
