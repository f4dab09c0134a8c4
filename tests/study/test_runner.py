"""What stops a run from outside: each ends in one line and the right code, and the same command resumes."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import soak
import tiny
from nbclient.exceptions import CellTimeoutError
from rich.console import Console

from kdlib.distillation.teacher_cache import teacher_states
from kdlib.errors import UserError
from kdlib.files import new_folder
from kdlib.study import runner
from kdlib.study.run import Run
from kdlib.study.runner import NotebookError, execute

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)


@pytest.fixture
def own(tmp_path):
    """The overrides of a very small study in tmp_path."""
    soak.write_study(tmp_path)
    return soak.own_overrides(tmp_path)


def command(out, overrides, *more):
    settings = [part for key, value in overrides.items() for part in ("--set", f"{key}={soak.json.dumps(value)}")]
    return [sys.executable, "-m", "kdlib", "run", "--profile", "smoke", "--out", str(out), *settings, *more]


def run(*arguments, **options):
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, **options
    )


def line(stderr):
    """The one line that a run ends with."""
    found = [line for line in stderr.splitlines() if line.startswith("kdlib: ")]
    assert len(found) == 1 and "Traceback" not in stderr, stderr
    return found[0]


def notebook(folder, *cells):
    path = folder / "planted.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


def stopped(tmp_path, *cells):
    """How a notebook of these cells stops; its part is kept."""
    with pytest.raises(NotebookError) as error:
        execute(notebook(tmp_path, *cells), tmp_path / "out.ipynb", {}, QUIET)
    nbformat.validate(nbformat.read(tmp_path / "out.ipynb", 4))
    assert "the same command resumes here" in str(error.value) and "\n" not in str(error.value)
    return error.value


# -- a notebook's kernel


def test_a_kernel_that_dies_in_the_middle_of_a_cell(tmp_path):
    error = stopped(tmp_path, "first = 1", "import os; os.kill(os.getpid(), 9)", "print(first)")
    assert "cell 2: its kernel died" in str(error) and not error.user


def test_a_cell_on_a_full_disk_is_for_the_user_to_mend(tmp_path):
    error = stopped(tmp_path, f"raise OSError({errno.ENOSPC}, 'No space left on device', 'curve.csv')")
    assert "No space left on device: 'curve.csv'" in str(error) and error.user


@pytest.mark.parametrize(
    "error, said, user",
    [
        (CellTimeoutError("A cell timed out"), "a cell took too long", False),
        (
            RuntimeError("Kernel didn't respond in 300 seconds"),
            "its kernel did not start (Kernel didn't respond",
            False,
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "could not be written (No space left on device)", True),
    ],
)
def test_papermill_stops(tmp_path, monkeypatch, error, said, user):
    def stop(*arguments, **options):
        raise error

    monkeypatch.setattr(runner.papermill, "execute_notebook", stop)
    with pytest.raises(NotebookError, match="planted") as found:
        execute(notebook(tmp_path, "1"), tmp_path / "out.ipynb", {}, QUIET)
    assert said in str(found.value) and found.value.user is user


# -- a run's folder


def test_a_second_run_on_a_folder_is_told_of_the_first(tmp_path, own):
    with Run(tmp_path / "run", runner.Study(tmp_path / "run", "smoke", own).profile).lock():
        with pytest.raises(UserError, match="another kdlib run is using this folder"):
            runner.run_study(tmp_path / "run", "smoke", own, console=QUIET)
    assert not list((tmp_path / "run" / "notebooks").iterdir())


@pytest.fixture
def mounted(tmp_path):
    """Mounts a file system on a folder: mounted("ro"), or mounted("size=400k")."""
    place = tmp_path / "mount"
    place.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True)
        if done.returncode:
            pytest.skip("no file system may be mounted here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


def test_a_folder_that_is_read_only(mounted, tmp_path, own):
    place = mounted("ro")
    result = run(place / "run", own)
    assert str(place) in line(result.stderr) and "Read-only file system" in result.stderr and result.returncode == 2
    teacher = tiny.encoder(layers=1)
    with pytest.raises(UserError, match="Read-only file system"):
        teacher_states(place / "cache", teacher, [[2, 5, 3]], [1], 1.0)
    with pytest.raises(UserError, match="Read-only file system"), new_folder(place / "teacher"):
        pass


def test_a_disk_without_room_for_the_cache_or_a_model(mounted, caplog):
    place = mounted("size=100k")
    teacher = tiny.encoder(layers=1)
    ids = [e.ids for e in teacher.tokenize(tiny.texts(400))]
    assert teacher_states(place / "cache", teacher, ids, [1], 1.0) is None
    assert "no room for the teacher's states" in caplog.messages[0]
    with pytest.raises(UserError, match="No space left on device|writing"), new_folder(place / "teacher") as folder:
        tiny.encoder(hidden=64).save(folder)
    assert not list(place.glob("**/*.safetensors")) and not list(place.glob(".teacher*"))


def test_a_disk_that_fills_up_ends_a_run_in_one_line_and_loses_nothing(tmp_path, own):
    out = tmp_path / "run"

    def little():  # a process may write no longer files than this, as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    result = run(out, own, "--only", "prune", preexec_fn=little)
    assert "too large" in line(result.stderr) and "02_prune_the_vocabulary" in result.stderr and result.returncode == 2
    assert not (out / "vocabulary").exists() and not list(out.rglob(".vocabulary*"))
    result = run(out, own, "--only", "prune")
    assert result.returncode == 0 and (out / "vocabulary" / "model.safetensors").is_file(), result.stderr


def test_ctrl_c_says_how_to_go_on_and_it_goes_on(tmp_path, own):
    out, overrides = tmp_path / "run", own | {"condition.use": False, "distill.epochs": 40.0}
    process = subprocess.Popen(
        command(out, overrides, "--only", "distill"), cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored under `nohup`
    )  # fmt: skip
    end = time.time() + 300
    while not list(out.glob("artefacts/student-*-checkpoints")) and process.poll() is None and time.time() < end:
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert "the same command resumes" in line(said) and process.returncode == 130
    assert kernels and not psutil.wait_procs(kernels, timeout=10)[1]
    nbformat.read(out / "notebooks" / "03_distill_a_student.ipynb", 4)
    result = run(out, overrides, "--only", "distill")
    assert result.returncode == 0 and (out / "student" / "model.safetensors").is_file(), result.stderr
