"""The field's benchmark: the library's own runner on tasks of its own classes, with local rows instead of a hub's."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard

from kdlib.errors import UserError
from kdlib.evaluation.probing import retrieval
from kdlib.models.encoder import text_vectors
from kdlib.study.field_benchmark import run_mteb, score, tasks_for
from kdlib.study.study import Study

mteb = pytest.importorskip("mteb")
pytestmark = pytest.mark.slow


def metadata(name, kind, languages, score):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name, description="local rows", dataset={"path": "local/rows", "revision": "1"}, type=kind,
        category="t2c" if kind == "Classification" else "t2t", modalities=["text"], eval_splits=["test"],
        eval_langs=languages, main_score=score,
    )  # fmt: skip


@pytest.fixture(scope="module")
def classification():
    from mteb.abstasks import AbsTaskClassification

    class Animals(AbsTaskClassification):
        metadata = metadata("Animals", "Classification", ["fil-Latn"], "accuracy")

        def load_data(self, *_, **__):
            texts = tiny.texts(200, seed=3)
            rows = {"text": texts, "label": [int("aso" in text.split()) for text in texts]}
            data = Dataset.from_dict(rows)
            self.dataset = DatasetDict(train=data.select(range(120)), test=data.select(range(120, 200)))
            self.data_loaded = True

    return Animals()


@pytest.fixture(scope="module")
def bitext():
    from mteb.abstasks import AbsTaskBitextMining

    class Pairs(AbsTaskBitextMining):
        metadata = metadata("Pairs", "BitextMining", {"tgl-eng": ["tgl-Latn", "eng-Latn"]}, "accuracy")

        def load_data(self, *_, **__):
            texts = list(dict.fromkeys(tiny.texts(60, seed=4)))
            rows = {"sentence1": texts, "sentence2": [text.replace("ang", "ng") for text in texts]}
            self.dataset = {"tgl-eng": DatasetDict(test=Dataset.from_dict(rows))}
            self.data_loaded = True

    return Pairs()


def test_the_kits_vectors_are_what_the_library_scores(classification, bitext):
    encoder = tiny.encoder(prefix="ang ")
    rows = {row["task"]: row for row in score({"student": encoder}, [classification, bitext], "tgl")}
    assert rows["Animals"]["metric"] == "accuracy" and rows["Animals"]["language"] == "tgl"
    assert rows["Animals"]["value"] > 0.5 and rows["Pairs"]["method"] == "test"
    bitext.load_data()  # the library forgets what it has scored
    sides = bitext.dataset["tgl-eng"]["test"]
    first, second = (text_vectors(encoder, list(sides[side]))[:, 0] for side in ("sentence1", "sentence2"))
    assert rows["Pairs"]["value"] == pytest.approx(retrieval(first, second).mean())
    assert rows["Pairs"]["language"] == "eng"


def test_the_scores_are_in_the_table_and_in_the_students_card(given, tmp_path, classification):
    study = Study(tmp_path / "run", "smoke", given())
    table = run_mteb(study, tasks=[classification])
    assert list(table.columns) == ["teacher", "pruned teacher", "student", "static"] and table.notna().all(axis=None)
    kept = study.run.results().query("stage == 'mteb' and model == 'student'")
    assert list(kept["task"]) == ["Animals"]
    found = ModelCard.load(study.run.path / "student" / "README.md").data.eval_results
    assert found[0].dataset_name == "MTEB Animals"
    assert found[0].metric_value == pytest.approx(kept["value"].iloc[0], abs=1e-4)
    assert np.isfinite(kept["value"]).all()


def test_filipino_tasks_are_found_by_language_and_unknown_ones_are_refused_in_one_line():
    names = {task.metadata.name for task in tasks_for("tgl")}
    assert {"FilipinoHateSpeechClassification.v2", "FilipinoShopeeReviewsClassification", "Tatoeba"} <= names
    assert [task.metadata.name for task in tasks_for("tgl", ["Tatoeba"])] == ["Tatoeba"]
    for language, wanted in (("tgl", ["NoSuchTask"]), ("qqq", [])):
        with pytest.raises(UserError, match="mteb"):
            tasks_for(language, wanted)


def test_without_the_library_the_command_says_what_to_install(tmp_path):
    (tmp_path / "mteb.py").write_text("raise ImportError('none', name='mteb')")
    code = "from kdlib.cli import app; app(['mteb', '--run', 'x'])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {json.dumps(str(tmp_path))}); {code}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "pip install 'kdlib[mteb]'" in done.stderr and "Traceback" not in done.stderr
