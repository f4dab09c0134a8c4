"""Arms, models and seeds in several processes: equal rows, and a worker that dies is replaced."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from kdlib import config
from kdlib.device import use_bf16
from kdlib.errors import UserError
from kdlib.files import SHARED, locked
from kdlib.study import compute
from kdlib.study.run import read_results
from kdlib.study.study import Study

ARMS = {
    "fraction": {f"{share}%": {"distill.fraction": share / 100} for share in (40, 60, 80, 100)},
    "init": {init: {"student.init": init} for init in ("alternate", "last", "first", "random")},
}


def table(folder, given, **more):
    """The rows of the benchmark's probes and of the arms, without times."""
    own = {"ablations.arms": ARMS, "ablations.seeds": [0], "distill.epochs": 0.5, "ablations.epochs": 0.5}
    study = Study(folder, "smoke", given(own | {f"compute.{name}": value for name, value in more.items()}))
    trials = study.report("benchmark").trials("probe")
    rows = [
        dict(model=t.model, task=t.task, seed=t.seed, metric=m.name, value=m.value) for t in trials for m in t.metrics
    ]
    study.run.record("benchmark", rows)
    study.run.record("ablations", study.ablation_rows())
    return read_results(study.run.results_file)


@pytest.fixture(scope="module")
def sequential(tmp_path_factory, given):
    return table(tmp_path_factory.mktemp("one"), given)


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one_process(tmp_path, given, sequential):
    assert table(tmp_path, given, jobs=2).equals(sequential)
    assert not list(compute.progress_folder(tmp_path).glob("*.json"))


def in_two_workers(folder, check, bf16=False):
    """Call `check` in two workers, as the units of a report."""

    class Calls:
        def __init__(self, run, profile):
            self.context = type("Context", (), {})()

        def report(self, stage):
            return self

        def unit(self, number):
            check()

    (folder / "profile.yaml").write_text("name: x")
    compute.spread(folder, config.Compute(jobs=2), "probe", [(0,), (1,)], Calls, bf16)


def test_the_progress_of_workers_that_were_killed_is_forgotten(tmp_path):
    stale = compute.progress_folder(tmp_path) / "gone-1.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")

    def check():
        assert not stale.exists()

    in_two_workers(tmp_path, check)


@pytest.mark.parametrize("bf16", [True, False])
def test_workers_compute_in_the_precision_of_the_process_that_asked(tmp_path, bf16):
    def check():
        assert use_bf16("auto", torch.device("cpu")) is bf16  # whatever this busy worker would measure

    in_two_workers(tmp_path, check, bf16)


def test_a_worker_that_tries_tf_idf_makes_no_student(tmp_path, given):
    study = Study(tmp_path, "smoke", given())
    study.report("benchmark").unit("probe", "tf-idf", study.tasks[0].name, 0)
    assert (tmp_path / "benchmark").is_dir() and not list(tmp_path.glob("artefacts/student-*"))


@pytest.mark.slow
def test_a_dask_cluster_gives_the_rows_of_one_process(tmp_path, given, sequential):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        rows = table(tmp_path, given, backend="dask", address=cluster.scheduler_address)
    assert rows.equals(sequential)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tmp_path, given, sequential, caplog):
    killed = []

    def kill():
        while not killed:
            for file in compute.progress_folder(tmp_path).glob("*.json"):
                killed.append(int(file.stem.rsplit("-", 1)[1]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert table(tmp_path, given, jobs=2).equals(sequential)
    assert killed and "a worker died" in caplog.text


def test_an_unknown_cluster_is_one_line(tmp_path, given, monkeypatch):
    distributed = pytest.importorskip("distributed")

    def refuse(*_, **options):
        raise OSError("Timed out trying to connect to tcp://127.0.0.1:9")

    monkeypatch.setattr(distributed, "Client", refuse)
    spec = config.Compute(backend="dask", address="tcp://127.0.0.1:9")
    (tmp_path / "profile.yaml").write_text("")
    with pytest.raises(UserError, match=r"compute.address tcp://127.0.0.1:9: no dask scheduler there"):
        compute.spread(tmp_path, spec, "ablations", [("a", "b"), ("a", "c")], Study, False)


def test_dask_needs_an_address_when_the_profile_is_read():
    with pytest.raises(UserError, match="address"):
        config.load_profile("smoke", {"compute.backend": "dask"})


def test_a_second_worker_waits_until_the_first_has_made_the_artefact(tmp_path, monkeypatch):
    monkeypatch.setenv(SHARED, "1")
    order = []

    def second():
        with locked(tmp_path / "made") as alone:
            order.append(("second", alone))

    with locked(tmp_path / "made"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", ("second", False)]


def test_without_workers_nothing_is_locked(tmp_path):
    with locked(tmp_path / "made") as alone:
        assert alone and not list(tmp_path.iterdir())


def test_each_worker_of_a_machine_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    seen = []
    for _ in range(2):
        monkeypatch.setattr(compute, "_held", [])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none")
        compute.own_gpu(tmp_path, 2)
        seen.append((os.environ["CUDA_VISIBLE_DEVICES"], compute._held))
    assert [number for number, _ in seen] == ["0", "1"]


def test_the_runner_shows_every_worker(tmp_path):
    runner = pytest.importorskip("kdlib.study.runner")
    for name in ("a", "b"):
        at = dict(label=f"arm {name}", done=1, total=4, note="", left=None)
        (tmp_path / f"{name}.json").write_text(json.dumps(at))
    report = runner._Report("05", tmp_path / "absent", runner.Console(quiet=True), tmp_path)
    assert report.step() == "arm a 1/4 | arm b 1/4"
