"""The exercises of the notebooks: their form, and every solution run, on a teacher that is as deep as the real one, has
its tokenizer, and is very narrow."""

import re
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
import yaml
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from nbformat.v4 import new_code_cell, new_notebook
from traitlets.config import Config
from transformers import BertConfig, BertModel

from kdlib.config import load_profile
from kdlib.study.run import read_results

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = {path.stem.split("_")[0]: path for path in sorted(FOLDER.glob("0[0-6]*.ipynb"))}  # 07 is a demo
SMALL = {
    "corpus.max_documents": 80,
    "probe.languages_rows": 20,
    "probe.cka_sentences": 20,
    "probe.train_rows": 40,
    "probe.test_rows": 40,
    "vocabulary.max_rows": 12000,
    "condition.max_texts": 60,
    "condition.use": False,
    "student.layers": 4,
    "distill.max_texts": 50,
    "tasks": [{"name": "topic", "finetune": False}],
    "benchmark.probe_rows": 60,
    "benchmark.probe_test_rows": 40,
    "benchmark.bootstrap": 100,
    "ablations.max_texts": 50,
    "ablations.arms": {"init": {"random": {"student.init": "random"}}},
}


WRONG = {"00": "torch.zeros(2, 3)", "03": "torch.tensor(0.0)", "04": "p"}  # wrong answers of the right kind


def cells(name, tag=None):
    """Code cells of a notebook: those with a tag, or those that are no solutions."""
    code = [cell for cell in nbformat.read(NOTEBOOKS[name], 4).cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags", []) for cell in code]
    return [c for c, t in zip(code, tags) if (tag in t if tag else "solution" not in t)]


def prose(name):
    """The markdown of a notebook."""
    return "\n".join(cell.source for cell in nbformat.read(NOTEBOOKS[name], 4).cells if cell.cell_type == "markdown")


@pytest.fixture(scope="module")
def narrow_teacher(tmp_path_factory, teacher_tokenizer):
    folder = tmp_path_factory.mktemp("teacher")
    sizes = dict(hidden_size=24, intermediate_size=48, num_attention_heads=4, num_hidden_layers=12)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(teacher_tokenizer), **sizes), add_pooling_layer=False).save_pretrained(folder)
    teacher_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, narrow_teacher):
    """run(name): a notebook's names after all its cells were run; all notebooks work on one run folder."""
    folder, done = tmp_path_factory.mktemp("exercises"), {}
    profile = folder / "small.yaml"
    small = load_profile("smoke", SMALL | {"teacher.source": str(narrow_teacher), "teacher.prefix": "query: "})
    profile.write_text(yaml.safe_dump(small.model_dump(), sort_keys=False))
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))  # or display() gives no handles

    def names_of(name):
        if name not in done:
            done[name] = {"display": display}
            for cell in cells(name):
                exec(cell.source, done[name])
                if "parameters" in cell.metadata.get("tags", []):
                    done[name]["profile"] = str(profile)
        return done[name]

    yield names_of
    InteractiveShell.clear_instance()
    patch.undo()


def solve(run, name, number):
    """The names of a notebook after its solution of that number."""
    names = run(name)
    before = names["study"].run.results_file if "study" in names else names["run"].results_file
    table = before.read_bytes() if before.is_file() else b""
    source = cells(name, "solution")[number - 1].source.replace('"smoke"', repr(names["profile"]))
    exec(source.replace("solution = False", "solution = True"), names)
    assert (before.read_bytes() if before.is_file() else b"") == table, "a solution changed the run's table"
    return names


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_opens_with_its_question_and_ends_with_what_comes_next(name):
    notebook = nbformat.read(NOTEBOOKS[name], 4)
    assert re.search(r"\?\*\*|the question it answers", notebook.cells[0].source)
    assert notebook.cells[-1].cell_type == "markdown" and "**Next**: " in notebook.cells[-1].source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_between_notebooks_and_documents_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(name)) if "://" not in link]
    assert all((FOLDER / link.partition("#")[0]).is_file() for link in links)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_its_goals_what_one_needs_and_how_long_it_takes(name):
    header = prose(name).split("\n# ", 1)[0]
    assert all(header.count(f"**{part}**") == 1 for part in ("Goals.", "What you need.", "Time:"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_four_exercises_with_hint_and_answer_folded(name):
    text = prose(name)
    text = text[text.index("## Try it") : text.index("## Five questions")]
    parts = re.split(r"^### \d\. ", text, flags=re.MULTILINE)[1:]
    assert [part.split("\n", 1)[0] for part in parts] == ["Predict", "Change", "Explain", "Fill in"]
    for part in parts:
        folded = re.findall(r"<details><summary>(\w+)</summary>\n\n.+?\n\n</details>", part, flags=re.DOTALL)
        assert folded == ["Hint", "Solution" if part.startswith("Fill in") else "Answer"]
    assert text.count("<details>") == text.count("</details>") == 8


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_five_questions_each_with_one_right_answer_and_a_word_on_every_other(name):
    text = prose(name)
    parts = re.split(r"^\*\*\d\.\*\* ", text[text.index("## Five questions") :], flags=re.MULTILINE)[1:]
    assert len(parts) == 5
    for part in parts:
        options = re.findall(r"<details><summary>.+?</summary>\n\n\*\*(Right|No)\.\*\* .+?\n\n</details>", part)
        assert len(options) == part.count("<details>") == 3 and options.count("Right") == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_done_by_hand_ends_in_an_assert(name):
    by_hand = [cell.source for cell in cells(name) if cell.id.startswith("hand-")]
    assert by_hand and any(re.search(r"^ *assert ", source, flags=re.MULTILINE) for source in by_hand)


def test_every_exercise_is_in_the_instructors_key():
    key = (FOLDER.parent / "docs" / "instructor.md").read_text("utf-8")
    wanted = [f"| {name}.{number} |" for name in NOTEBOOKS for number in range(1, 5)]
    assert [row for row in wanted if row not in key] == []


def test_every_source_that_a_notebook_links_is_in_the_references():
    known = (FOLDER.parent / "docs" / "references.bib").read_text("utf-8")
    for name in NOTEBOOKS:
        links = re.findall(r"\((https://(?:aclanthology|arxiv|doi|www\.jstor)[^)]+)\)", prose(name))
        assert links and all(link.split("org/", 1)[1].removeprefix("abs/").rstrip("/") in known for link in links)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_solutions_are_folded_and_do_nothing_until_they_are_asked_to(name):
    solutions = cells(name, "solution")
    assert len(solutions) == (3 if name == "00" else 2)
    for cell in solutions:
        assert cell.metadata.jupyter.source_hidden and "skip-execution" in cell.metadata.tags
        names = {}
        exec(cell.source, names)
        assert names.keys() - {"__builtins__"} == {"solution"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_function_to_fill_in_accepts_the_solution_alone(run, name, capsys):
    names = run(name)
    [cell] = cells(name, "fill-in")
    solution = re.search(r"<summary>Solution</summary>\n\n```python\n(.+?)```", prose(name), flags=re.DOTALL)[1]
    start, rest = re.match(r"(def .+?:)[^\n]*\n    return None\n(.+)", cell.source, flags=re.DOTALL).groups()
    assert solution.startswith(start.split("(")[0])
    capsys.readouterr()
    exec(cell.source, names)
    assert "Not filled in yet." in capsys.readouterr().out
    exec(solution + rest, names)
    assert "Right" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="not yet"):
        exec(f"{start}\n    return {WRONG.get(name, '0.123')}\n{rest}", names)


def test_headless_runs_pass_solutions_over(tmp_path):
    notebook = new_notebook(cells=[new_code_cell("1 + 1"), *cells("00", "solution")])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False)
    out = nbformat.read(tmp_path / "out.ipynb", 4)
    assert [cell.execution_count for cell in out.cells] == [1, None, None, None]


def test_00_first_experiment(run):
    assert run("00")["missing"] == ["runs/two_layers", "runs/four_layers"]
    names = solve(run, "00", 1)
    tables = {name: read_results(Path("runs") / name / "results.csv") for name in ("two_layers", "four_layers")}
    for cell in cells("00"):
        if cell.source.startswith(("from kdlib.study.run import read_results", "if not missing")):
            exec(cell.source, names)
    assert not names["missing"] and list(names["facts"].index) == ["teacher", "two layers", "four layers"]
    for name, table in tables.items():
        row = table[(table["model"] == "student") & (table["metric"] == "parameters")]["value"].item() / 1e6
        assert names["facts"].loc[name.replace("_", " "), "parameters (M)"] == row


def test_00_predict_fewer_rows_more_chance(run):
    chance = solve(run, "00", 2)["chance"]
    assert chance["± points, at most"].between(0, 50).all()
    assert chance.sort_values("test rows")["± points, at most"].is_monotonic_decreasing


def test_00_change_only_the_training_part_shrinks(run):
    shrunk = solve(run, "00", 3)["shrunk"]
    assert shrunk.loc["train", "50 documents"] == 50 < shrunk.loc["train", "as it is"]
    assert (shrunk.loc[["heldout", "test"], "50 documents"] == shrunk.loc[["heldout", "test"], "as it is"]).all()


def test_01_predict_shares_of_the_last_layer(run):
    names = solve(run, "01", 1)
    assert set(names["kept"].index) == {task.name for task in names["study"].tasks}
    assert names["kept"].is_monotonic_decreasing


def test_01_change_prefix(run):
    names = solve(run, "01", 2)
    both = names["both"]
    assert set(both.columns) == {
        (way, prefix) for way in ("plain", "centred") for prefix in ("none", "query: ", "hello: ", "mangga: ")
    }
    assert both.notna().all().all() and names["teacher"].prefix == "query: "


def test_02_predict_word_list(run):
    price = solve(run, "02", 1)["price"]
    assert price.loc["no word list", "rows"] <= price.loc["as pruned", "rows"] < price.loc["teacher", "rows"]
    assert price.loc["no word list", "fertility"] >= price.loc["teacher", "fertility"]


def test_02_change_every_script_costs_more(run):
    fewer, more = solve(run, "02", 2)["spelled"].values()
    assert more > 2 * fewer > 0


def test_02b_predict_the_vectors_move(run):
    assert -1 < solve(run, "02b", 1)["moved"] < 1.00001


def test_02b_change_fewer_texts(run):
    names = solve(run, "02b", 2)
    assert names["quarter"] == 50 and names["fewer"] != names["facts"] and names["fewer"]["perplexity_after"] > 1


def test_03_predict_a_copied_start_begins_lower(run):
    starts = solve(run, "03", 1)["starts"]
    assert (starts["alternate"] < starts["random"]).all()


def test_03_change_last_layers_copied_alternate_ones_compared(run):
    names = solve(run, "03", 2)
    assert names["copied"] == [10, 11, 12] and names["compared"] == [4, 8, 12]


def test_04_predict_losses_by_task(run):
    names = solve(run, "04", 1)
    assert list(names["lost"].index) == ["topic"] and names["lost"]["difference"].between(-1, 1).all()
    run("01")
    assert solve(run, "04", 1)["lost"]["gained over the teacher's layers"].notna().all()


def test_04_change_fewer_rows(run, capsys):
    run("04")
    capsys.readouterr()
    solve(run, "04", 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if " rows: " in line]
    assert len(lines) == 4 and all(re.search(r"seeds: [01]\.\d{3}", line) for line in lines)


def test_05_predict_undistilled_copies(run):
    untrained = solve(run, "05", 1)["untrained"]
    assert set(untrained) == {"first", "last", "alternate", "random"} and max(untrained, key=untrained.get) != "random"


def test_05_change_an_arm_of_ones_own(run):
    names = solve(run, "05", 2)
    assert names["ends"] == [1, 2, 11, 12] and list(names["tried"]["arm"]) == ["random", "mine"]


def test_06_predict_unbeaten_models(run):
    run("04")
    worth = solve(run, "06", 1)["worth"]
    assert worth["unbeaten"].iloc[0] and worth.loc[worth["unbeaten"], "probe score (%)"].is_monotonic_increasing


def test_06_change_a_figure_of_two_models(run):
    run("04")
    names = solve(run, "06", 2)
    assert set(names["two"]["model"]) == {"teacher", "student"} and all(path.is_file() for path in names["saved"])
