"""A short run of the fuzzer over every reader, proof that it sees what it is to see, and what it once found."""

import builtins
import gzip
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules, when this file is run as a script
import fuzz
import hostile
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import strategies as st
from safetensors.torch import load, save

from kdlib import files as store
from kdlib.config import Source, load_profile
from kdlib.data import sources
from kdlib.data.readers import read_file
from kdlib.errors import LONGEST, UserError
from kdlib.models import loading
from kdlib.study import arms
from kdlib.study.run import COLUMNS, Run, run_folder
from kdlib.viz import figures

pytestmark = pytest.mark.slow

CASES = 20


# -- the short run: this file is also the script that makes it, in a process of its own


def stay(here, case):
    time.sleep(60)


def crash(here, case):
    os.kill(os.getpid(), signal.SIGSEGV)


def write(here, case):
    (here.parent / "elsewhere").write_text("x")


def move(here, case):
    (here / "profile.yaml").rename(here.parent / "tmp" / "x")
    (here.parent / "victim.txt").rename(here / "profile.yaml")


def unpickle(here, case):
    pickle.loads(hostile.pickles()[1])


def fill(here, case):
    np.ones(fuzz.MEMORY // 7)


def fail(here, case):
    {}["key"]


def refuse(here, case):
    raise UserError("profile.yaml: no")


def refuse_darkly(here, case):
    raise UserError("no")


READERS = {
    stay: "hangs",
    crash: "the process dies (-11)",
    write: "did what no reader should: open",
    move: "did what no reader should: os.rename",
    unpickle: "code of the input ran",
    fill: "takes too much memory",
    fail: "KeyError in test_fuzz.py",
    refuse_darkly: "message names neither file nor key",
    refuse: None,
}


def build(values, rng):
    return hostile.Case({"profile.yaml": b"x"}, names=("profile.yaml",))


def script():
    fuzz.main(["--cases", str(CASES)])
    fuzz.SECONDS, fuzz.MEMORY = 3, 1 << 28
    for read in READERS:
        reader = hostile.Reader(read.__name__, st.integers(), build, read)
        tally = fuzz.fuzz(reader, 1, 0, Path(tempfile.mkdtemp()))
        kept = [place / "here" / "profile.yaml" for _, _, place in tally.kinds.values()]
        print(read.__name__, tally.cases, tally.failed, tally.refused, [*tally.kinds], all(p.is_file() for p in kept))


@pytest.fixture(scope="module")
def printed():
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("reader", [reader.name for reader in hostile.READERS])
def test_reader_takes_whatever_it_is_given(reader, printed):
    line = re.search(rf"^ *{reader} +(\d+) cases .* seed 0 +(\d+) refused +(\d+) failed\n( .*x .*\n)*", printed, re.M)
    share = next(r.share for r in hostile.READERS if r.name == reader)
    assert int(line[1]) == -(-CASES // share) and int(line[3]) == 0, line[0]


def test_the_run_ends_with_a_count(printed):
    total = sum(-(-CASES // reader.share) for reader in hostile.READERS)
    assert re.search(rf"^{total} passed, 0 failed$", printed, re.M)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_failure_is_seen_counted_and_kept(read, printed):
    cases, failed, refused, kinds, kept = re.search(
        rf"^{read.__name__} (\d+) (\d+) (\d+) (\[.*\]) (\w+)$", printed, re.M
    ).groups()
    expected = READERS[read]
    assert (cases, failed, refused) == (("1", "0", "1") if expected is None else ("1", "1", "0"))
    assert kinds == "[]" if expected is None else expected in kinds
    assert kept == "True"


@pytest.mark.parametrize("message", ["x" * 501, "two\nlines", "red \x1b[31m", "other.yaml: no"])
def test_message_of_an_error_is_judged(message):
    case = build(None, None)
    assert fuzz.complaint("profile.yaml: no", case) is None
    assert fuzz.complaint(message, case)


def test_cases_depend_on_the_seed_alone():
    reader = next(reader for reader in hostile.READERS if reader.name == "jsonl")
    first, again, other = (reader.build([{"text": "ang"}], Random(f"{seed} jsonl 0 1")).files for seed in (0, 0, 1))
    assert first == again != other


# -- what it found


def test_error_is_one_line_whatever_it_quotes():
    assert str(UserError("a\nb\x1b\u202e\ud800 ñ 😀")) == r"a\nb\x1b\u202e\ud800 ñ 😀"
    for message in ("x" * 5000, "\0" * 400, "x" * 501):
        line = str(UserError(message))
        assert len(line) == LONGEST and line.isprintable() and " ... " in line
    assert str(UserError("x" * 500)) == "x" * 500
    error = UserError("a\nb")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that code of the input would write; every question is answered with yes."""
    monkeypatch.setenv(hostile.CANARY, str(tmp_path / "canary"))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return tmp_path / "canary"


def folder_of(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_the_trap_works(canary):
    pickle.loads(hostile.pickles()[0])
    assert canary.exists()
    canary.unlink()
    exec(hostile.EVIL)
    assert canary.exists()


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_code_of_a_model_never_runs(seed, allow_pickle, tmp_path, canary):
    files = dict(hostile.model_files())
    hostile.trap(files, Random(seed))
    try:
        loading.load_encoder(folder_of(tmp_path / "m", files), "m", allow_pickle=allow_pickle)
    except UserError:
        pass
    assert not canary.exists()


@pytest.mark.parametrize("number", range(len(hostile.pickles())))
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "mlm_head.safetensors"])
def test_pickle_posing_as_weights_is_refused(name, number, tmp_path, canary):
    files = hostile.model_files() | {name: hostile.pickles()[number]}
    if name == "pytorch_model.bin":
        files.pop("model.safetensors")
    with pytest.raises(UserError):
        loading.load_encoder(folder_of(tmp_path / "m", files), "m", allow_pickle=True)
    assert not canary.exists()


def bent(**changes):
    return json.dumps(json.loads(hostile.model_files()["config.json"]) | changes).encode()


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"config.json": bent(num_hidden_layers=10**12)}, "layers"),
        ({"config.json": bent(num_hidden_layers=0)}, "layers"),
        ({"config.json": bent(num_hidden_layers=3)}, "encoder.layer.2"),
        ({"config.json": bent(num_attention_heads=-1)}, "cannot be used"),
        ({"config.json": bent(vocab_size=10**12)}, "size mismatch|mismatch"),
    ],
)
def test_model_that_is_not_what_its_config_says(files, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        loading.load_encoder(folder_of(tmp_path / "m", hostile.model_files() | files), "m")


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    files = dict(hostile.model_files())
    state = load(files["model.safetensors"])
    state["encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    files["model.safetensors"] = save(state, {"format": "pt"})
    with pytest.raises(UserError, match="encoder.layer.1.output.dense.weight.*not finite"):
        loading.load_encoder(folder_of(tmp_path / "m", files), "m")


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda spec: spec["model"]["vocab"].update(bata=10_000), "ids up to 10000"),
        (lambda spec: spec["model"]["vocab"].pop("[UNK]"), "cannot be used"),
        (lambda spec: spec["post_processor"]["special_tokens"].clear(), "cannot be used"),
    ],
)
def test_tokenizer_that_does_not_work_is_refused(spoil, expected, tmp_path):
    files = dict(hostile.model_files())
    tokenizer = json.loads(files["tokenizer.json"])
    spoil(tokenizer)
    files["tokenizer.json"] = json.dumps(tokenizer).encode()
    with pytest.raises(UserError, match=expected):
        loading.load_encoder(folder_of(tmp_path / "m", files), "m")


@pytest.mark.parametrize(
    "name, data", [("a.txt.gz", hostile.gzip_bomb), ("a.parquet", hostile.parquet_bomb), ("a.zip", hostile.zip_bomb)]
)
def test_file_that_unpacks_to_gigabytes_is_refused(name, data, tmp_path):
    (tmp_path / name).write_bytes(data())
    with pytest.raises(UserError, match=f"{name}.*(when unpacked|far larger)"):
        sources.read_rows(Source(source=str(tmp_path / name)))


@pytest.mark.parametrize("name, line", [("a.csv", "a,"), ("a.tsv", "a\t")])
def test_table_of_a_million_columns_is_refused(name, line, tmp_path):
    (tmp_path / name).write_text("\n" + line * 1_000_000)
    with pytest.raises(UserError, match="1,000,001 columns"):
        read_file(tmp_path / name)
    (tmp_path / name).write_text(line * 5000 + "\na" * 100_000)
    with pytest.raises(UserError, match=r"5,001 columns in [\d,]+ rows, most of them in few"):
        read_file(tmp_path / name)
    (tmp_path / name).write_text(line * 1000 + "\n" + line * 1000)
    assert read_file(tmp_path / name).shape == (1, 1001)


def test_rows_that_share_no_name_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"{i}": 1}}' for i in range(50_000)))
    with pytest.raises(UserError, match="50,000 different names"):
        read_file(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "a", "{i}": 1}}' for i in range(2000)))
    assert read_file(tmp_path / "a.jsonl").shape == (2000, 2001)


def test_folded_text_is_still_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"ang bata\n" * 500_000))
    assert len(sources.read_rows(Source(source=str(tmp_path / "a.txt.gz")))) == 500_000


def test_parquet_text_that_is_no_utf8_is_refused(tmp_path):
    wrong = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet.*UTF8"):
        read_file(tmp_path / "a.parquet")


@pytest.mark.parametrize("place", ["students", "ablations.arms.a", "ablations.arms.init.last"])
def test_aliases_where_anything_may_stand_are_not_multiplied_out(place, tmp_path):
    tree = [1]
    for _ in range(12):
        tree = [tree] * 9
    for key in reversed(f"{place}.student.init".split(".")):
        tree = {key: tree}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="aliases"):
        arms.arms(load_profile(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "overrides", [{"name": "\ud800"}, {"tasks": [{"name": "\udfff"}]}, {"baselines": {"\ud800": {}}}]
)
def test_text_that_no_file_can_hold_is_refused(overrides):
    with pytest.raises(UserError, match="half a character"):
        load_profile("smoke", overrides)


@pytest.mark.parametrize("name", ["..yaml", "...yaml", "....yaml", " .yaml", "../../x.yaml"])
def test_default_run_folder_lies_in_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(os.path.normpath(run_folder(None, name)))
    assert folder.parent == tmp_path / "runs"


@pytest.mark.parametrize("name", ["results.csv", ".lock", "stages", "figures", "distill/curve.csv"])
@pytest.mark.parametrize("to", ["victim.txt", "new", "."])
def test_run_folder_with_a_way_out_is_refused(name, to, tmp_path):
    (tmp_path / "victim.txt").write_text("as it was")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / to)
    with pytest.raises(UserError, match=f"{link}.*outside the run folder"):
        Run(tmp_path / "run", load_profile("smoke"))
    assert (tmp_path / "victim.txt").read_text() == "as it was" and not (tmp_path / "new").exists()


def test_run_folder_may_be_a_link_and_hold_links_of_its_own(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    (tmp_path / "disk" / "stages").mkdir()
    (tmp_path / "disk" / "also").symlink_to("stages")
    Run(tmp_path / "run", load_profile("smoke")).mark("probe", "k", 1.0, {})
    assert Run(tmp_path / "run").done("probe", "k")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_run_folder_with_an_impossible_name(name, tmp_path):
    with pytest.raises(UserError, match="run folder"):
        Run(tmp_path / name, load_profile("smoke"))


def test_error_in_a_locked_run_is_not_taken_for_one_of_the_lock(tmp_path):
    run = Run(tmp_path / "run", load_profile("smoke"))
    with pytest.raises(OSError, match="mine"), run.lock():
        raise OSError("mine")
    (run.path / ".lock").unlink(missing_ok=True)
    (run.path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be locked"), run.lock():
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"a": %s}' % (b"9" * 5000)])
def test_damaged_facts_of_a_run_are_named(content, tmp_path):
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: damaged"):
        store.read_json(path)
    path.write_bytes(b'{"texts": 3}')
    assert store.read_json(path) == {"texts": 3}


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\n", b"\xff,\n1,2\n", b"step,lose\n1,2\n", b'step,"loss\n', b"step,loss\n1,2,3,4\n1\n5,6,7,8,9"],
)
def test_damaged_curve_of_a_run_is_named(content, tmp_path):
    path = tmp_path / "curve.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: damaged"):
        store.read_table(path, ["step", "loss"])
    path.write_bytes(b"step,loss\n1,0.5\n")
    assert store.read_table(path, ["step", "loss"])["loss"].tolist() == [0.5]


@pytest.mark.parametrize("family", ["/../../x", "../x", "a/b", "a\\b", "x" * 300, "\0", "\n"])
def test_figure_of_a_family_stays_in_its_folder(family, tmp_path):
    row = dict.fromkeys(COLUMNS) | {"stage": "ablations", "method": family, "value": 0.5}
    rows = [row | {"arm": arm} for arm in ("one", "two")]
    (name,) = set(figures.drawers(pd.DataFrame(rows))) - set(figures.FIGURES)
    paths = figures.save(figures.Figure((1, 1)), tmp_path / "figures", name)
    assert {path.parent for path in paths} == {tmp_path / "figures"} and os.listdir(tmp_path) == ["figures"]
    assert sorted(os.listdir(tmp_path / "figures")) == sorted(path.name for path in paths)


if __name__ == "__main__":
    script()
