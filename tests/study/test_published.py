"""Numbers in README and docs come from a run's results, and only between markers."""

import re
from pathlib import Path

import pandas as pd
import pytest

from kdlib.config import load_profile
from kdlib.errors import UserError
from kdlib.evaluation.task_students import HARD, SOFT
from kdlib.files import write_json
from kdlib.study.published import CLAIMS, MARKED, PARTS, fill, filled, keep, kept_run
from kdlib.study.run import Run
from kdlib.study.study import STAGES

ROOT = Path(__file__).parents[2]
SCORES = {"teacher": 0.8, "pruned teacher": 0.8, "student": 0.75, "tf-idf": 0.6, "no distillation": 0.4}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", load_profile("smoke"))
    rows = []
    for model, value in SCORES.items():
        at = dict(model=model, method="probe", low=value - 0.1, high=value + 0.1, n=100)
        rows += [
            at | dict(task="topic", metric="accuracy", value=value),
            at | dict(task="average", metric="score", value=value),
        ]
        for task in ("topic", "average", "with room"):
            kept = (value - 0.3) / 0.5
            rows.append(at | dict(task=task, metric="retention", value=kept, low=kept - 0.1, high=kept + 0.1))
        rows += [dict(model=model, metric=name, value=value * 1e7) for name in ("parameters", "megabytes")]
    rows += [
        dict(model="chance", method="probe", task="topic", metric="chance", value=0.3),
        dict(model="teacher", arm="tf-idf", method="probe", task="topic", metric="room", value=0.2, low=0.1, high=0.3),
        dict(metric="threads", value=2, arm="a processor"),
    ]
    for first, second, gap, p, tost in (
        ("student", "teacher", -0.05, 0.2, 0.9), ("student", "no distillation", 0.35, 0.001, 1.0),
        ("pruned teacher", "teacher", 0.0, 1.0, 0.01),
    ):  # fmt: skip
        found = dict(difference=gap, p_holm=p, tost_p_holm=tost, detectable=0.06)
        at = dict(model=first, arm=second, method="probe", task="average", n=100, low=gap - 0.02, high=gap + 0.02)
        rows += [at | dict(metric=metric, value=value) for metric, value in found.items()]
    run.record("benchmark", rows)
    found = dict(difference=-0.1, p_holm=0.01, tost_p_holm=1.0, detectable=0.05)
    at = dict(model="student", method="init", arm="random", low=-0.15, high=-0.05, n=100)
    transfer = dict(task="topic from eng", metric="transfer", value=0.5, low=0.4, high=0.6, n=100)
    run.record(
        "ablations",
        [at | dict(task=task, metric=m, value=v) for task in ("average", None) for m, v in found.items()]
        + [transfer | dict(model="teacher", method="reference"), at | transfer | dict(value=0.25)],
    )
    rows = []
    for model, value in {"tf-idf": 0.3, "teacher": 0.7, HARD: 0.5, SOFT: 0.6, f"{SOFT}: balanced": 0.55}.items():
        scores = dict(model=model, method="task", task="topic", x=8, metric="accuracy", value=value)
        rows.append(scores | dict(low=value - 0.1, high=value + 0.1, n=100))
    for first, second, gap in ((SOFT, "teacher", -0.1), (SOFT, HARD, 0.1), (f"{SOFT}: balanced", SOFT, -0.05)):
        at = dict(model=first, arm=second, method="task", task="topic", x=8, low=gap - 0.02, high=gap + 0.02, n=100)
        compared = dict(difference=gap, p_holm=0.001, tost_p_holm=1.0, detectable=0.03)
        rows += [at | dict(metric=metric, value=value) for metric, value in compared.items()]
    run.record("task", rows)
    write_json(run.folder("stages") / "benchmark.json", {"seconds": 120})
    return run


def written(run, part):
    return filled(f"<!-- from the run: {part} -->\nold\n<!-- end -->", run)


def test_only_what_is_between_the_markers_changes(run, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- from the run: claims -->\nit was 7.1%\n<!-- end -->\nafter 97.9%\n")
    assert fill(file, run) and not fill(file, run)
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after 97.9%\n") and "7.1%" not in text


def test_a_claim_holds_is_not_shown_or_fails_as_its_test_says(run):
    lines = {line.split(" | ")[0].strip("| "): line for line in written(run, "claims").splitlines()}
    assert lines["Copying layers is not enough: distillation matters"].endswith("better | yes |")
    assert lines["The student equals the teacher"].endswith("undecided | not shown |")
    assert lines["Pruning the vocabulary costs nothing"].endswith("on par (within 0.02) | yes |")
    assert "+35.0 | +33.0 to +37.0 | 0.001, 1.000 | 6.0" in lines["Copying layers is not enough: distillation matters"]
    assert not set(lines) & {claim for claim, *pair, _ in CLAIMS if "blank" in pair}, (
        "nothing is said of a model that was not there"
    )


def test_the_tables_show_chance_controls_and_room_beside_the_student(run):
    tasks = written(run, "tasks")
    assert "| topic | accuracy | 30.0 | 60.0 [50.0, 70.0]" in tasks and "20.0 [10.0, 30.0], over tf-idf" in tasks
    assert "| **student** | 7.5 |" in written(run, "headline") and "90.0 [80.0, 100.0]" in written(run, "headline")
    about = written(run, "about")
    assert (
        "keeps 90.0 [80.0, 100.0]% of its probe score above chance, averaged over the tasks with room (topic)" in about
    )
    assert "2 threads of a processor" in about
    assert "not run to the end (probe, prune," in about and "benchmark" not in about.split(")")[0]
    for stage in STAGES:
        write_json(run.folder("stages") / f"{stage}.json", {"seconds": 60})
    assert f": {len(STAGES)} min 00 s, on 2 threads" in written(run, "about")
    assert "| init | random − alternate | probe | -10.0 |" in written(run, "ablations")


def test_the_students_of_tasks_are_shown_with_what_soft_labels_and_each_arm_changed(run):
    line = written(run, "task_students").splitlines()[-2]
    assert line.startswith(
        "| topic | 8 | 30.0 [20.0, 40.0] | 70.0 [60.0, 80.0] | 50.0 [40.0, 60.0] | 60.0 [50.0, 70.0] |"
    )
    assert line.endswith("| +10.0 | +8.0 to +12.0 | 0.001, 1.000 | 3.0 | better |")
    assert written(run, "task_arms").splitlines()[-2].startswith("| topic | 8 | balanced | -5.0 |")


def test_transfer_is_shown_for_every_arm_and_the_teacher(run):
    assert written(run, "transfer").splitlines()[3:5] == [
        "| teacher | 50.0 [40.0, 60.0] |",
        "| random | 25.0 [40.0, 60.0] |",
    ]


def test_results_that_come_with_the_project_are_found_and_others_are_not():
    assert kept_run("workshop").profile.name == "workshop" and kept_run("nothing") is None


def test_an_unknown_part_and_a_run_without_its_numbers_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"x.md: no part 'clams'; the parts are about, headline"):
        filled("<!-- from the run: clams -->\n<!-- end -->", run, "x.md")
    empty = Run(tmp_path / "empty", load_profile("smoke"))
    for part in PARTS:
        with pytest.raises(UserError):
            written(empty, part)


def test_a_finished_run_is_kept_without_its_models_and_an_unfinished_one_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="not finished"):
        keep(run, tmp_path / "results")
    write_json(run.path / "sources.json", {})
    write_json(run.folder("stages") / "figures.json", {"seconds": 1})
    (run.folder("artefacts") / "weights").write_bytes(b"large")
    kept = keep(run, tmp_path / "results")
    assert kept == tmp_path / "results" / "smoke" and not (kept / "artefacts").exists()
    assert written(Run(kept), "claims") == written(run, "claims")
    pd.testing.assert_frame_equal(Run(kept).results(), run.results())


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_the_numbers_in_the_documents_are_those_of_the_kept_run(name):
    text = (ROOT / name).read_text("utf-8")
    kept = sorted((ROOT / "results").glob("*/results.csv"))
    assert MARKED.search(text) and kept
    from_run = Run(ROOT / "results" / re.search(r"kdlib readme --run results/(\w+)", text)[1])
    assert filled(text, from_run, name) == text
