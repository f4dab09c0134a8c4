"""The notebooks, headlessly under `smoke`, as a user runs them; and what happens when something is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbconvert import HTMLExporter

from kdlib.study.run import COLUMNS, read_results
from kdlib.study.study import NOTEBOOKS, STAGES, Study
from kdlib.viz import figures, tables
from kdlib.viz.panel import VIEW

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/[!.]*/*.ipynb")])
ABSOLUTE = re.compile(r"(?<![\w.])/(home|opt|private|root|tmp|usr|var|Users)/|\b[A-Z]:\\")
SCRIPT = re.compile(r"<script|javascript:|<[^>]+\son\w+=", re.IGNORECASE)


def kdlib(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "kdlib", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1400,
        env=os.environ | {"COLUMNS": "80"},  # tables are laid out for the width of the terminal
        **options,
    )


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A whole run under `smoke`, by the command line."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    result = kdlib("run", "--profile", "smoke", "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_notebooks_in_git_are_valid_stripped_and_parameterised(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    folded = [cell for cell in code if "hide-input" in cell.metadata.get("tags", [])]
    assert all(cell.metadata.jupyter.source_hidden for cell in folded), "the book and JupyterLab fold the same cells"
    assert all(len(cell.source.splitlines()) <= 20 for cell in code if cell not in folded)


def test_every_stage_ran_without_an_error(smoke):
    out, _ = smoke
    for stage in STAGES:
        notebook = nbformat.read(out / "notebooks" / f"{NOTEBOOKS[stage]}.ipynb", 4)
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert outputs and not [o for o in outputs if o.output_type == "error"]
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        assert pictures or stage == "figures"


def unreadable(output, *folders):
    """What is wrong with an output of a cell for those who read the notebook without its kernel, or elsewhere.

    folders: none of these may be named.
    """
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    text = json.dumps([data, output.get("text"), output.get("traceback")], ensure_ascii=False)
    if ABSOLUTE.search(text) or any(str(folder) in text for folder in folders):
        return "names a folder of this machine"
    if "application/javascript" in data or SCRIPT.search(data.get("text/html", "")):
        return "runs a script"
    if VIEW in data and not data.get("text/html") and "image/png" not in output["data"]:
        return "shows a widget or nothing"
    return ""


def unreadable_outputs(notebook, *folders):
    """The outputs of a notebook that are `unreadable`, with the reason and the source of their cells."""
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    reasons = [(unreadable(output, *folders), cell.source) for cell in cells for output in cell.outputs]
    return [(reason, source) for reason, source in reasons if reason]


def test_executed_notebooks_can_be_read_without_a_kernel_and_without_trust(smoke):
    out, _ = smoke
    frame, _ = HTMLExporter(sanitize_html=True).from_notebook_node(nbformat.v4.new_notebook())  # brings a picture
    for path in (out / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        assert not unreadable_outputs(notebook, ROOT, out.parent)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        page, _ = HTMLExporter(sanitize_html=True).from_notebook_node(notebook)
        pictures = page.count("data:image/png") - frame.count("data:image/png")
        assert pictures == sum("image/png" in output.get("data", {}) for output in outputs)


def test_what_cannot_be_read_is_found():
    def shown(**data):
        return nbformat.v4.new_output("display_data", {kind.replace("_", "/"): value for kind, value in data.items()})

    assert unreadable(shown(text_html="<p onclick='x()'>a</p>")) == "runs a script"
    assert unreadable(shown(text_html="<script>x()</script>")) == "runs a script"
    assert unreadable(shown(text_plain="saved in /home/ana/runs")) == "names a folder of this machine"
    assert unreadable(nbformat.v4.new_output("stream", text="C:\\runs"))
    widget = nbformat.v4.new_output("display_data", {VIEW: {"model_id": "1"}, "text/plain": "VBox()"})
    assert unreadable(widget) == "shows a widget or nothing"
    widget.data["text/html"] = "<p>Once and/or twice a day</p>"
    assert not unreadable(widget)


def test_results_are_tidy_and_cover_every_stage(smoke):
    table = read_results(smoke[0] / "results.csv")
    assert list(table.columns) == COLUMNS
    assert set(table["stage"]) == set(STAGES) - {"figures"}
    assert table["value"].notna().all() and set(table["language"]) >= {"tgl"}


def test_terminal_ends_with_where_things_are_and_the_headline(smoke):
    out, printed = smoke
    for word in ("student", "results.csv", "figures", "teacher", "no distillation", "random weights", "tf-idf"):
        assert word in printed
    assert (out / "figures").is_dir() and len(list((out / "figures").glob("*.png"))) >= 8


def test_second_run_does_nothing_again(smoke):
    out, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in (out / "notebooks").glob("*.ipynb")}
    result = kdlib("run", "--profile", "smoke", "--out", out)
    assert result.returncode == 0 and result.stdout.count("done before") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "notebooks").glob("*.ipynb")}


def test_figures_drawn_twice_are_the_same_bytes(smoke, tmp_path):
    out, _ = smoke
    table = read_results(out / "results.csv")
    figures.draw_all(table, tmp_path)
    tables.main_table(table).to_csv(tmp_path / "main_table.csv")
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert drawn and drawn == {path.name: path.read_bytes() for path in (out / "figures").iterdir()}


def test_student_is_a_plain_folder_that_loads_without_kdlib(smoke, tmp_path):
    code = f"""
import sys
sys.modules["kdlib"] = None
from transformers import AutoModel, AutoTokenizer
import torch, json
folder = {str(smoke[0] / "student")!r}
model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(["query: Magandang umaga po.", "query: Kumusta?"], padding=True, return_tensors="pt")
state = model(**batch).last_hidden_state
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert torch.isfinite(state).all() and max(tokenizer.get_vocab().values()) < model.config.vocab_size
print(tuple(state.shape), model.config.num_hidden_layers)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(" 2\n")
    card = (smoke[0] / "student" / "README.md").read_text()
    assert "| probe | average |" in card and not list((smoke[0] / "student").glob("*.bin"))


def test_a_notebook_runs_alone_by_papermill_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parameters = {
        "profile": "smoke",
        "run_dir": str(tmp_path / "alone"),
        "overrides": "distill.max_texts=60 benchmark.seeds=[0]",
    }
    papermill.execute_notebook(
        ROOT / "notebooks" / "03_distill_a_student.ipynb", tmp_path / "out.ipynb", parameters, progress_bar=False
    )
    assert (tmp_path / "alone" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "name, nothing",
    [("00_start_here", "Nothing to compare yet"), ("fil/00_magsimula_rito", "Wala pang maihahambing")],
    ids=["english", "filipino"],
)
def test_start_here_runs(tmp_path, name, nothing):
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        tmp_path / "out.ipynb",
        {"profile": "smoke", "run_dir": str(tmp_path / "r")},
        progress_bar=False,
    )
    shown = nbformat.read(tmp_path / "out.ipynb", 4)
    outputs = [output for cell in shown.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(str(output.get("data", {}).get("text/html", output.get("data", {}))) for output in outputs)
    study = Study(tmp_path / "r", "smoke")
    assert all(f"<th>{task.name}</th>" in text for task in study.tasks), "the tasks and their rows"
    for part in ("train", "heldout", "test"):
        assert f"<td>{len(getattr(study.corpus, part))}</td>" in text, "the sizes of the corpus"
    assert study.corpus.train[0].sentences[0] in text, "a document"
    assert nothing in text, "the first experiment waits for its two runs"


def broken_notebooks(folder):
    """The project's notebooks with a cell that fails in the second."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    path = folder / "notebooks" / f"{NOTEBOOKS['prune']}.ipynb"
    notebook = nbformat.read(path, 4)
    parameters = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells[parameters + 1].source += "\nraise ValueError('planted')"
    nbformat.write(notebook, path)
    return folder / "notebooks", parameters + 3  # papermill adds a cell before it, and counts from 1


def test_failed_notebook_leaves_its_part_and_names_cell_and_error(tmp_path, monkeypatch, smoke):
    from rich.console import Console

    from kdlib.study import runner

    folder, broken = broken_notebooks(tmp_path)
    monkeypatch.setattr(runner, "notebook_folder", lambda: folder)
    out = tmp_path / "run"
    shutil.copytree(smoke[0], out)
    (out / "stages" / "prune.json").unlink()
    with pytest.raises(runner.NotebookError) as error:
        runner.run_study(out, "smoke", [], console=Console(quiet=True))
    message = str(error.value)
    assert "02_prune_the_vocabulary" in message and f"cell {broken}:" in message and "ValueError: planted" in message
    partial = nbformat.read(out / "notebooks" / "02_prune_the_vocabulary.ipynb", 4)
    assert any(cell.get("outputs") for cell in partial.cells if cell.cell_type == "code")


def test_killed_run_goes_on_from_the_last_finished_stage(tmp_path, smoke):
    out = tmp_path / "run"
    shutil.copytree(smoke[0], out)
    finished = STAGES.index("ablations")
    for stage in STAGES[finished:]:
        (out / "stages" / f"{stage}.json").unlink()
    command = [sys.executable, "-m", "kdlib", "run", "--profile", "smoke", "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    partial = out / "notebooks" / f"{NOTEBOOKS['ablations']}.ipynb"
    old, end = partial.stat().st_mtime_ns, time.time() + 300
    while partial.stat().st_mtime_ns == old and time.time() < end:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    nbformat.read(partial, 4)
    result = kdlib("run", "--profile", "smoke", "--out", out)
    assert result.returncode == 0 and result.stdout.count("done before") == finished
