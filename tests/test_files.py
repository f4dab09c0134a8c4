"""Files are whole or absent; a run's folder gives back what was put into it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from kdlib import files
from kdlib.config import load_profile
from kdlib.errors import UserError
from kdlib.files import fingerprint, new_file, new_folder, write_json
from kdlib.study.run import COLUMNS, Run, find_run, project_folder, read_results, run_folder


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", load_profile("smoke"))


# -- seals


def test_a_sealed_folder_is_whole_until_something_in_it_changes(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1000))
    (folder / "sub" / "config").write_text("{}")
    assert "unfinished" in files.flaw(folder)
    files.seal(folder, key="k")
    assert files.flaw(folder) == "" and json.loads((folder / files.SEAL).read_text())["key"] == "k"
    (folder / "card").write_text("came later")
    assert files.flaw(folder) == ""
    (folder / "weights").write_bytes(bytes(500) + b"1" + bytes(499))
    assert files.flaw(folder) == "weights is corrupted (its checksum is wrong)"
    (folder / "weights").write_bytes(bytes(10))
    assert files.flaw(folder) == "weights is torn (10 of 1,000 bytes)"
    (folder / "weights").unlink()
    assert files.flaw(folder) == "weights cannot be read"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": [1]}', b'{"files": {"a": 3}}', b'{"files": {"a": {}}}'])
def test_a_damaged_seal(tmp_path, content):
    (tmp_path / files.SEAL).write_bytes(content)
    assert "seal is damaged" in files.flaw(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a\u0000b", "x" * 300])
def test_a_seal_that_names_files_that_cannot_be(tmp_path, name):
    (tmp_path / files.SEAL).write_text(json.dumps({"files": {name: {"bytes": 1, "crc32": 1}}}))
    assert "cannot be read" in files.flaw(tmp_path)


def test_what_a_killed_process_had_begun_is_cleared_away(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    ours = [f".a-{gone.pid}", f".a-{gone.pid}.txt", f"..a-{gone.pid}-{gone.pid}"]  # the last: begun within the first
    others = [f".b-{gone.pid}", ".a-b", f".a-{os.getppid()}", f"..a-{os.getppid()}-{os.getppid()}", f".a-1-{gone.pid}",
              f"..a-{gone.pid}", f".a-{2**64}"]  # fmt: skip
    for name in ours + others:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "a"):
        pass
    with new_file(tmp_path / "a.txt") as path:
        path.write_text("")
    assert listing(tmp_path) == sorted([*others, "a", "a.txt"])


# -- atomic writes


def test_new_folder_appears_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / "a" / "b") as work:
        (work / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert listing(tmp_path) == ["a", "a/b", "a/b/x"]


def test_new_folder_replaces_the_older_one_whole(tmp_path):
    for name in "xy":
        with new_folder(tmp_path / "a") as work:
            (work / name).write_text(name)
    assert listing(tmp_path) == ["a", "a/y"]


def test_new_file_appears_when_the_block_ends(tmp_path):
    with new_file(tmp_path / "a" / "b.txt") as work:
        work.write_text("1")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert listing(tmp_path) == ["a", "a/b.txt"]


def test_new_file_keeps_the_suffix_while_working(tmp_path):
    with new_file(tmp_path / "table.csv") as work:
        assert work.suffix == ".csv"
        work.write_text("")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
@pytest.mark.parametrize("older", [True, False])
def test_exception_leaves_only_the_older_version(tmp_path, error, older):
    if older:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "x").write_text("old")
        (tmp_path / "file").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error):
        with new_folder(tmp_path / "folder") as work:
            (work / "x").write_text("new")
            raise error("stop")
    with pytest.raises(error):
        with new_file(tmp_path / "file") as work:
            work.write_text("new")
            raise error("stop")
    assert listing(tmp_path) == before
    assert not older or (tmp_path / "folder" / "x").read_text() == (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("writer", [new_folder, new_file])
@pytest.mark.parametrize("below", ["file/x", "file/x/y"])
def test_place_that_cannot_be_written(tmp_path, writer, below):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="file"):
        with writer(tmp_path / below) as work:
            work.write_text("never")
    assert listing(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_file_where_a_folder_should_go_and_the_reverse(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(UserError), new_file(tmp_path / "folder") as work:
        work.write_text("x")
    assert listing(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("writer", [new_folder, new_file])
def test_full_disk_is_told_and_leaves_nothing(tmp_path, writer):
    with pytest.raises(UserError, match="No space left"):
        with writer(tmp_path / "a"):
            full_disk()
    assert listing(tmp_path) == []


def test_full_disk_while_writing_json(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert listing(tmp_path) == ["a.json"] and json.loads((tmp_path / "a.json").read_bytes()) == {"x": 1}


def test_full_disk_when_the_work_is_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_json(tmp_path / "a.json", {})
    assert listing(tmp_path) == []


def test_weights_that_cannot_be_written_are_told_alike(tmp_path):
    with pytest.raises(UserError, match="model"):
        with new_folder(tmp_path / "model") as work:
            (work / "weights.safetensors").mkdir()
            save_file({"a": torch.zeros(3)}, work / "weights.safetensors")
    assert listing(tmp_path) == []


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "ñ": "Tagálog"}
    write_json(tmp_path / "v.json", value)
    assert json.loads((tmp_path / "v.json").read_text("utf-8")) == value
    assert "ñ" in (tmp_path / "v.json").read_text("utf-8")


# -- fingerprints and places


def test_fingerprint_is_the_same_everywhere():
    assert fingerprint("tgl", 1, 2.5, None, {"b": 1, "a": [True]}) == "9c0f8dc9e442"


def test_fingerprint_tells_values_apart_but_not_key_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    values = [fingerprint(v) for v in (1, "1", 1.5, [1], [[1]], None, "", {}, "ñ", "\ud800")]
    assert len(set(values)) == len(values)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "here"))
    assert files.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("KDLIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "kdlib"


def test_run_folder_from_the_project_and_from_its_notebooks(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "fil").mkdir(parents=True)
    (tmp_path / "notebooks" / "00_start_here.ipynb").touch()
    for place in (tmp_path, tmp_path / "notebooks", tmp_path / "notebooks" / "fil"):
        monkeypatch.chdir(place)
        assert run_folder(None, "smoke") == tmp_path / "runs" / "smoke"
        assert run_folder(None, "my/own.yaml") == tmp_path / "runs" / "own"
        assert run_folder("runs/x", "smoke") == tmp_path / "runs" / "x"
        assert run_folder(tmp_path / "y", "smoke") == tmp_path / "y"


def test_a_project_in_a_folder_named_notebooks_is_no_translation(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "kdlib" / "notebooks").mkdir(parents=True)
    for place in (tmp_path / "notebooks" / "kdlib", tmp_path / "notebooks" / "kdlib" / "notebooks"):
        monkeypatch.chdir(place)
        assert project_folder() == tmp_path / "notebooks" / "kdlib"


# -- runs


def test_run_keeps_its_profile(run):
    assert Run(run.path).profile == run.profile
    changed = load_profile("smoke", "language=no student.init=[1,2]")
    Run(run.path, changed)
    assert Run(run.path).profile == changed


def test_run_does_not_touch_an_unchanged_profile(run):
    before = (run.path / "profile.yaml").stat().st_mtime_ns
    Run(run.path, run.profile)
    assert (run.path / "profile.yaml").stat().st_mtime_ns == before


def test_find_run_makes_the_run(tmp_path):
    run = find_run(tmp_path / "r", "smoke", "seed=3")
    assert run.profile.seed == 3 and Run(tmp_path / "r").profile.seed == 3


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_no_run_there(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(UserError, match="run"):
        Run(tmp_path / "run")


@pytest.mark.parametrize("content", [b"[", b"- 1", b"\xff", b"wrong: 1", b"seed: x"])
def test_run_with_a_broken_profile(tmp_path, content):
    (tmp_path / "profile.yaml").write_bytes(content)
    with pytest.raises(UserError):
        Run(tmp_path)
    assert Run(tmp_path, load_profile("smoke")).profile.name == "smoke"


def test_run_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError):
            Run(path, load_profile("smoke"))


def test_folder_where_a_file_is(run):
    assert run.folder("a/b").is_dir() and run.folder("a/b").is_dir()
    (run.path / "stages").write_text("x")
    with pytest.raises(UserError, match="stages"):
        run.mark("probe", "k", 1.0, {})


def test_results_before_the_first_stage(run):
    assert list(run.results().columns) == COLUMNS and run.results().empty


def test_record_gives_back_what_it_was_given(run):
    rows = [
        dict(
            model="a",
            metric="m",
            value=0.1 + 0.2,
            seed=0,
            layer=3,
            low=0.0,
            high=1.0,
            n=5,
            x=0.25,
            task="t",
            arm="None",
        ),
        dict(model="NA", metric="m", value=1),
    ]
    table = run.record("probe", rows)
    assert table["value"].tolist() == [0.1 + 0.2, 1.0]
    assert table["model"].tolist() == ["a", "NA"] and table["arm"].tolist()[0] == "None"
    assert table["seed"].tolist() == [0, pd.NA] and table["language"].tolist() == ["tgl", "tgl"]
    pd.testing.assert_frame_equal(table, run.results())


def test_record_replaces_only_its_stage(run):
    run.record("probe", [dict(model="a", metric="m", value=1.0)])
    run.record("distill", [dict(model="b", metric="m", value=2.0)] * 2)
    kept = run.record("distill", [dict(model="c", metric="m", value=3.0)])
    assert kept["model"].tolist() == ["c"]
    assert run.results()[["stage", "model"]].values.tolist() == [["probe", "a"], ["distill", "c"]]
    assert run.record("distill", []).empty
    assert run.results()["stage"].tolist() == ["probe"]


def test_record_does_not_change_the_table_it_was_given(run):
    table = pd.DataFrame([dict(model="a", metric="m", value=1.0)])
    run.record("probe", table)
    assert list(table.columns) == ["model", "metric", "value"]


def test_kinds_of_columns_do_not_depend_on_the_rows(run):
    first = run.record("a", [dict(model="a", metric="m", value=1)]).dtypes
    second = run.record("b", [dict(model="a", metric="m", value=1.5, seed=1, x=2, task="t", n=3, layer=0)]).dtypes
    assert first.equals(second) and first.equals(run.results().dtypes) and first.equals(run.record("c", []).dtypes)


def test_whole_numbers_are_written_as_such(run):
    run.record("a", [dict(model="a", metric="m", value=0.5, seed=0, n=3), dict(model="a", metric="m", value=0.5)])
    assert run.results_file.read_text().splitlines()[1] == "a,a,tgl,,m,0.5,0,,,,,,,3"


def test_language_nan_is_a_language(tmp_path):
    run = Run(tmp_path / "r", load_profile("smoke", "language=nan"))
    assert run.record("a", [dict(model="a", metric="m", value=1)])["language"].tolist() == ["nan"]
    assert Run(tmp_path / "r").profile.language == "nan"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0",
        b"\xff\xfe",
        b"a,b\n1,2\n",
        b"stage,value\n",
        b'"',
        (",".join(COLUMNS) + "\n" + "x," * 13 + "x\n").encode(),
        (",".join(COLUMNS) + "\na,m,tgl,t,q,1,1.5,,,,,,,\n").encode(),
    ],
)
def test_broken_results(run, content):
    run.results_file.write_bytes(content)
    with pytest.raises(UserError, match="results.csv"):
        read_results(run.results_file)
    with pytest.raises(UserError, match="results.csv"):
        run.record("probe", [dict(model="a", metric="m", value=1.0)])
    assert run.results_file.read_bytes() == content


def test_full_disk_keeps_the_older_results(run, monkeypatch):
    run.record("probe", [dict(model="a", metric="m", value=1.0)])
    before = listing(run.path)
    monkeypatch.setattr(pd.DataFrame, "to_csv", full_disk)
    with pytest.raises(UserError, match="No space left"):
        run.record("distill", [dict(model="b", metric="m", value=2.0)])
    assert listing(run.path) == before and run.results()["model"].tolist() == ["a"]


def test_stage_is_done_with_the_key_it_was_marked_with(run):
    assert not run.done("probe", "k")
    run.mark("probe", "k", 1.234, {})
    assert run.done("probe", "k") and not run.done("probe", "other") and not run.done("distill", "k")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b'{"data": 3}', b"\xff"])
def test_broken_mark_counts_as_not_done(run, content):
    (run.folder("stages") / "probe.json").write_bytes(content)
    assert not run.done("probe", "k") and run.changed("probe", {"corpus": "a"}) == []


def test_a_finished_stage_tells_which_data_changed(run):
    assert run.changed("probe", {"corpus": "a"}) == []
    run.mark("probe", "k", 1.0, {"corpus": "a", "tasks": "b"})
    assert run.changed("probe", {"corpus": "a", "tasks": "b"}) == []
    assert run.changed("probe", {"corpus": "a", "tasks": "c"}) == ["tasks"]


def test_two_commands_cannot_work_in_one_folder(tmp_path):
    run = Run(tmp_path / "run", load_profile("smoke"))
    script = (
        f"import time\nfrom kdlib.study.run import Run\nwith Run({str(run.path)!r}).lock():\n"
        " print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another kdlib run is using this folder"), run.lock():
            pass
    finally:
        holder.kill()
        holder.wait()
    with run.lock():  # a killed command leaves nothing locked
        pass
