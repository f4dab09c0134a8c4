"""The model of a task in a run: its folder, card, predictions, ONNX files and the report."""

import pandas as pd
import pytest
from test_cli import invoke, needs_packages, refused
from transformers import pipeline

from kdlib.evaluation.benchmark import trial_rows
from kdlib.evaluation.task_students import HARD, SOFT
from kdlib.study.study import Study
from kdlib.study.task_students import predict, task_folder

SMALL = {
    "task_student": {
        "rows": [2, 4], "texts": 20, "epochs": 1, "learning_rate": 1e-3, "arms": {"balanced": {"balance": True}}
    },
    "distill.epochs": 0.5, "benchmark.finetune_head": "probe", "benchmark.finetune_batch": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def own(given):
    overrides = given(SMALL)
    return overrides | {"tasks": [overrides["tasks"][0] | {"distill": True}]}


@pytest.fixture(scope="module")
def study(tmp_path_factory, own):
    study = Study(tmp_path_factory.mktemp("task"), "smoke", own)
    study.report("task").made["length"].get()
    return study


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("ang aso\nang pusa ay natulog sa bahay\n")
    return tmp_path / "texts.txt"


def test_a_pipeline_and_the_command_give_the_same_labels(study, texts):
    folder = study.run.path / "tasks" / "length"
    classify = pipeline("text-classification", model=str(folder))
    wanted = [answer["label"] for answer in classify(texts.read_text().splitlines())]
    found = predict(folder, texts)
    assert list(found["label"]) == wanted and set(wanted) <= {"taas", "mubo"}
    shown = invoke("predict", "--run", study.run.path, "--task", "length", texts)
    assert shown.exit_code == 0 and [line.split("\t")[1] for line in shown.stdout.splitlines()[1:]] == wanted


def test_a_table_is_labelled_by_the_column_that_is_named(study, tmp_path):
    pd.DataFrame({"sentence": ["ang aso", "si ako"], "id": [1, 2]}).to_csv(tmp_path / "t.csv", index=False)
    folder = task_folder(study.run.path, "length")
    assert list(predict(folder, tmp_path / "t.csv", "sentence")["sentence"]) == ["ang aso", "si ako"]
    line = refused(invoke("predict", "--run", study.run.path, "--task", "length", tmp_path / "t.csv"))
    assert "no column 'text'; there are sentence, id" in line


def test_an_unknown_task_and_a_damaged_model_are_one_line(study, tmp_path, texts):
    line = refused(invoke("predict", "--run", study.run.path, "--task", "lenght", texts))
    assert "no model of this task; there are length" in line
    assert "a task with distill: true" in refused(invoke("predict", "--run", tmp_path, "--task", "length", texts))
    (tmp_path / "tasks" / "length").mkdir(parents=True)
    assert "distil it again" in refused(invoke("predict", "--run", tmp_path, "--task", "length", texts))


def test_the_card_has_labels_rows_and_scores(study):
    stage = study.report("task").made["length"]
    card = (stage.folder / "README.md").read_text()
    assert "Its answers: mubo, taas." in card and 'pipeline("text-classification"' in card
    assert f"fine-tuned on {len(stage.drawn.train)} labelled rows" in card
    score = next(row for row in stage.get().rows if row["model"] == "student")
    assert f"| student | model | {score['value']:.3f} |" in card


def test_the_model_is_made_once_and_again_after_a_change(study, own):
    stage = study.report("task").made["length"]
    same = Study(study.run.path, "smoke", own).report("task").made["length"]
    assert same.key == stage.key and same.intact()
    for change in ({"task_student.share": 0.5}, {"task_student.texts": 10}, {"benchmark.finetune_rate": 1e-3}):
        assert study.variant(change).report("task").made["length"].key != stage.key
    kept = study.variant({"benchmark.probe_rows": 50, "task_student.rows": [3], "compute.jobs": 2})
    assert kept.report("task").made["length"].key == stage.key


@pytest.mark.slow
def test_all_models_learn_from_the_same_rows_and_are_kept(study, own):
    report = study.report("task")
    assert report.units() == [("length", x, seed) for x in (2, 4) for seed in (0, 1)]
    trials = report.trials()
    names = ["tf-idf", "teacher", HARD, SOFT]
    arm = f"{SOFT}: balanced"
    assert [(t.model, t.x) for t in trials if t.seed == 0] == [(n, 2) for n in [*names, arm]] + [(n, 4) for n in names]
    files = {file: file.stat().st_mtime_ns for file in (study.run.path / "task_trials").iterdir()}
    again = Study(study.run.path, "smoke", own).report("task").trials()
    assert files == {file: file.stat().st_mtime_ns for file in (study.run.path / "task_trials").iterdir()}
    assert [t.metrics[0].value for t in again] == [t.metrics[0].value for t in trials]
    pairs = {(row["model"], row["arm"]) for row in report.paired_rows(trials)}
    assert pairs == {(SOFT, "tf-idf"), (SOFT, "teacher"), (SOFT, HARD), (arm, SOFT)}
    assert {row["model"] for row in trial_rows(trials, study.profile.benchmark)} == {*names, arm}


@pytest.mark.slow
@needs_packages
def test_onnx_files_are_scored_beside_torch(study):
    shown = invoke("export", "--run", study.run.path, "--task", "length")
    assert shown.exit_code == 0, shown.output
    rows = pd.DataFrame(study.report("task").rows()).set_index(["method", "metric"])["value"]
    assert rows["onnx fp32", "accuracy"] == rows["torch fp32", "accuracy"] == rows["model", "accuracy"].iloc[-1]
    assert rows["onnx int8", "megabytes"] < rows["onnx fp32", "megabytes"]
    assert "| student | onnx int8 |" in (study.run.path / "tasks" / "length" / "README.md").read_text()
