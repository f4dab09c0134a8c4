"""The command line: bad input ends with one line and code 2, quickly; `kdlib export` on a small run."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import tiny
from typer.testing import CliRunner

from kdlib.cli import app
from kdlib.config import load_profile
from kdlib.files import flaw, seal
from kdlib.study import run as run_module
from kdlib.study.run import Run

ROOT = Path(__file__).parents[1]
needs_packages = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs the optional packages: pip install 'kdlib[onnx]'",
)


def invoke(*arguments):
    """The command in this process, which has loaded the libraries already."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result):
    """The one line that a command ends with when it refuses its input."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("kdlib: ") and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture
def run(tmp_path):
    """A run folder with a very small student."""
    run = Run(tmp_path / "run", load_profile("smoke"))
    tiny.encoder(layers=1).save(run.folder("student"))
    seal(run.path / "student", key="abc")
    return run.path


# -- bad input


BAD = {
    "missing corpus file": ["corpus.source=/no/such.txt"],
    "misspelt parameter": ["distill.epoch=3"],
    "wrong type": ["distill.epochs=many"],
    "unknown objective": ["distill.objectives={hiden: 1.0}"],
    "unknown task": ["tasks=[{name: topics}]"],
    "embedded corpus in another language": ["language=ceb"],
    "layers to compare for another depth": ["distill.layers=[4]"],
    "layers to copy for another depth": ["student.init=[4]"],
    "unknown rule of layers": ["distill.layers=middle"],
    "not an assignment": ["distill.epochs"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_code_2(case, tmp_path):
    sets = [part for item in BAD[case] for part in ("--set", item)]
    refused(invoke("run", "--profile", "smoke", "--out", tmp_path / "run", *sets))
    assert not list(tmp_path.rglob("*.ipynb"))


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own_ends_the_same(tmp_path):
    command = [sys.executable, "-m", "kdlib", "run", "--profile", "smoke", "--out", tmp_path / "run"]
    done = subprocess.run([*command, "--set", "corpus.source=/no/such.txt"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "kdlib: /no/such.txt: no such file\n")


@pytest.mark.parametrize("content", [b"", b"\n\n\n", b"\xff\xfe\x00rubbish\x00", b"isang linya lamang\n"])
def test_a_bad_corpus_file_is_reported_before_anything_runs(content, tmp_path):
    (tmp_path / "c.txt").write_bytes(content)
    source = f"corpus.source={tmp_path / 'c.txt'}"
    assert "c.txt" in refused(invoke("run", "--profile", "smoke", "--out", tmp_path / "run", "--set", source))


def test_a_label_column_of_one_class_and_an_unknown_one_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"teksto {i},a\n" for i in range(30)))
    for label, word in (("label", "one class"), ("etiketa", "etiketa")):
        task = f"tasks=[{{name: mine, source: {tmp_path / 't.csv'}, label: {label}}}]"
        assert word in refused(invoke("run", "--profile", "smoke", "--out", tmp_path / "run", "--set", task))


def test_an_unknown_stage_or_profile_is_refused(tmp_path):
    for arguments in (["--only", "distil"], ["--profile", "huge"]):
        said = refused(invoke("run", "--profile", "smoke", "--out", tmp_path, *arguments))
        assert "stages are" in said or "workshop" in said


LIGHT = """
import sys
from kdlib.cli import app
try:
    app(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "pandas", "numpy", "jupyter_client"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["--help"], 0, "export"),
        (["run", "--help"], 0, "--only"),
        (["run", "--profile", "smoke", "--set", "distill.epoch=1"], 2, "kdlib: unknown parameter 'distill.epoch'"),
        (["distill", "--profile", "smoke", "--set", "distill.epoch=1"], 2, "kdlib: unknown parameter 'distill.epoch'"),
        (["parameters", "--profile", "smoke"], 0, "heldout_texts: 30"),
    ],
)
def test_help_and_a_slip_in_a_parameter_need_no_heavy_library(arguments, code, says):
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code and says in done.stdout + done.stderr and "heavy" not in done.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["run", "--profile", "huge"], "huge"),
        (["distill", "--profile", "huge"], "huge"),
        (["parameters", "--profile", "huge"], "huge"),
        (["export", "--run", "none"], "none/student: no student here"),
        (["page", "--run", "none"], "none/student: no student here"),
        (["push", "--run", "none", "--to", "owner/student"], "none/student: no student here"),
        (["figures", "--run", "none"], "no run here"),
        (["reset", "--folder", "none"], "nothing was moved"),
    ],
)
def test_every_command_ends_with_one_line_and_code_2(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(invoke(*arguments))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_with_one_line_and_code_130(run, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "copy_figures", stopped)
    result = invoke("figures", "--run", run)
    assert (result.exit_code, result.output) == (130, "kdlib: stopped; the same command resumes\n")


@pytest.mark.parametrize("command", [["push", "--to", "owner/student"], ["export"], ["page"]])
def test_a_damaged_student_is_refused(command, run):
    weights = run / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "model.safetensors is torn" in refused(invoke(*command, "--run", run))


# -- export


@pytest.mark.slow
@needs_packages
def test_export_writes_the_files_and_their_numbers(run):
    result = invoke("export", "--run", run)
    folder = run / "student" / "onnx"
    assert result.exit_code == 0, result.output
    assert all(
        word in result.output for word in ("torch fp32", "onnx fp32", "onnx int8", "accuracy, topic", str(folder))
    )
    numbers = pd.read_csv(folder / "numbers.csv")
    assert set(numbers["method"]) == {"torch fp32", "onnx fp32", "onnx int8"}
    assert set(numbers["metric"]) >= {"accuracy", "similarity", "megabytes", "latency_ms"}
    scores = numbers[numbers["metric"] == "accuracy"]
    assert set(scores["task"]) == {"topic"} and (scores["low"] <= scores["value"]).all() and set(scores["n"]) == {30}
    assert (folder / "model_int8.onnx").is_file() and not flaw(run / "student")
    result = invoke("export", "--run", run, "--no-int8")  # replaces the older files
    assert result.exit_code == 0 and "onnx fp32" in result.output and "onnx int8" not in result.output
    assert (folder / "model.onnx").is_file() and not (folder / "model_int8.onnx").exists()


def test_export_without_the_packages_says_how_to_install_them(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'kdlib[onnx]'" in refused(invoke("export", "--run", run))
    assert not (run / "student" / "onnx").exists()


def test_export_of_a_folder_that_is_no_model_is_refused(run):
    (run / "student" / "config.json").write_text("{}")
    seal(run / "student", key="abc")
    assert "student" in refused(invoke("export", "--run", run))


def test_export_needs_a_task_and_a_free_run(run):
    with Run(run).lock():
        assert "another kdlib run" in refused(invoke("export", "--run", run))
    Run(run, load_profile("smoke", "tasks=[]"))
    assert "no task" in refused(invoke("export", "--run", run))
