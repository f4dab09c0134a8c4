"""A whole study on a tiny local teacher, somebody's own corpus and own task, in another language."""

import json

import pytest
from transformers import AutoModel

from kdlib.distillation import distill as distillation
from kdlib.errors import UserError
from kdlib.evaluation.benchmark import trial_rows
from kdlib.study.stage import contents
from kdlib.study.study import STAGES, Study

pytestmark = pytest.mark.slow  # the tests share one study, and run in order


@pytest.fixture(scope="module")
def study(given, tmp_path_factory):
    return Study(tmp_path_factory.mktemp("runs") / "ceb", "smoke", given())


def test_every_stage_gives_rows_in_the_studys_language(study):
    probe = study.report("probe")
    rows = probe.segmentation_rows() + probe.usage_rows() + probe.layer_probe_rows() + probe.cka_rows()
    assert probe.retrieval_rows() == probe.cloze_rows() == []
    study.run.record("probe", rows)
    study.run.record("prune", study.report("prune").rows())
    study.run.record("condition", study.report("condition").rows() + study.report("condition").cloze_rows())
    study.run.record("distill", study.report("distill").rows())
    compared = study.report("benchmark")
    methods = ("probe", "best layer", "finetune", "fewshot")
    trials = [trial for method in methods for trial in compared.trials(method)]
    rows = trial_rows(trials, study.profile.benchmark) + compared.efficiency_rows() + compared.paired_rows(trials)
    rows += compared.retention_rows(compared.trials("probe"))
    study.run.record("benchmark", rows)
    study.run.record("ablations", study.ablation_rows())
    table = study.run.results()
    assert set(table["stage"]) == {"probe", "prune", "condition", "distill", "benchmark", "ablations"}
    assert set(table["language"]) == {"ceb"} and table["value"].notna().all()
    assert set(table[table["stage"] == "benchmark"]["model"]) == {
        "teacher",
        "pruned teacher",
        "student",
        "no distillation",
        "random weights",
        "shallow",
        "tf-idf",
        "static",
        "static SIF",
        "pruned teacher int8",
        "student int8",
        "chance",
        "machine",
    }
    student = study.student
    assert student.layers == 2 and student.tokenizer.vocab_size <= 100


def test_pruning_is_proved_on_every_text(study):
    proof = study.report("prune").verify()
    assert (proof["checked"] == proof["holds"]).all() and proof["checked"].iloc[0] > 100


def test_teacher_and_pruned_teacher_probe_alike(study):
    table = study.run.results()
    scores = table[(table["method"] == "probe") & (table["metric"] == "score")].set_index("model")["value"]
    assert scores["teacher"] == pytest.approx(scores["pruned teacher"], abs=0.02)


def test_a_second_study_takes_what_is_there(study, given, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr("kdlib.study.stages.distill", never)
    monkeypatch.setattr("kdlib.study.stages.prune_encoder", never)
    again = Study(study.run.path, "smoke", given())
    assert again.student.layers == 2 and len(again.ablation_rows()) > 0


def test_only_the_new_arm_is_run(study, given, monkeypatch):
    labels = []
    real = distillation.distill
    monkeypatch.setattr("kdlib.study.stages.distill", lambda *a, **k: labels.append(a[7]) or real(*a, **k))
    starts = {name: {"student.init": name} for name in ("last", "first")}
    arms = given()["ablations.arms"] | {"init": starts}
    more = Study(study.run.path, "smoke", given({"ablations.arms": arms}))
    rows = more.ablation_rows(["init/last"])
    assert labels == ["arm init last, 1 of 1"]
    assert {row["arm"] for row in rows if "arm" in row} >= {"half", "all", "last"} and "first" not in str(rows)


def test_other_data_under_the_same_name_makes_what_was_made_of_it_stale(sources, given, tmp_path):
    def keys():
        study = Study(tmp_path / "run", "smoke", given(files))
        for name, report in study.graph.reports.items():
            study.run.mark(name, report.key, 1.0, contents(report))
        return {name: report.key for name, report in study.graph.reports.items()}

    def changed(stage):
        study = Study(tmp_path / "run", "smoke", given(files))
        return study.run.changed(stage, contents(study.report(stage)))

    corpus, labels = tmp_path / "corpus.txt", tmp_path / "labels.csv"
    corpus.write_bytes((sources / "corpus.txt").read_bytes())
    labels.write_bytes((sources / "labels.csv").read_bytes())
    task = {"name": "length", "source": str(labels), "text": "sentence", "label": "gitas-on"}
    files = {"corpus.source": str(corpus), "tasks": [task]}
    first = keys()
    corpus.touch()
    assert keys() == first
    labels.write_text(labels.read_text() + "\nxyzzy xyzzy,mubo")  # stands nowhere in the corpus
    assert changed("probe") == ["tasks"] and changed("distill") == []
    second = keys()
    assert {stage for stage in STAGES if first[stage] != second[stage]} == {
        "probe",
        "benchmark",
        "ablations",
        "figures",
    }
    corpus.write_text(corpus.read_text().replace("ang", "ng"))
    assert changed("distill") == ["corpus", "training"]
    third = keys()
    unmoved = {stage for stage in STAGES if second[stage] == third[stage]}
    assert unmoved == {"task"}, "no task of this study is distilled"


def test_a_test_row_that_stands_in_the_corpus_changes_what_is_distilled(study, sources, given, tmp_path):
    labelled = (sources / "labels.csv").read_text()
    sentence = next(s for document in study.corpus.train for s in document.sentences if s not in labelled)
    data = []
    for name, row in (("one", "xyzzy"), ("two", sentence)):
        (tmp_path / f"{name}.csv").write_text(f"sentence,gitas-on\nxyzzy xyzzy,taas\n{row},mubo")
        task = {"name": "length", "source": str(sources / "labels.csv"), "test": str(tmp_path / f"{name}.csv")}
        task |= {"text": "sentence", "label": "gitas-on"}
        data.append(contents(Study(tmp_path / name, "smoke", given({"tasks": [task]})).report("distill")))
    assert data[0]["corpus"] == data[1]["corpus"] and data[0]["training"] != data[1]["training"]


def test_parallel_sentences_without_the_language_are_left_out(given, tmp_path):
    change = {"language": "amh", "parallel": {"languages": ["tgl", "eng"]}}
    study = Study(tmp_path / "run", "smoke", given(change))
    assert study.parallel == {} and {row["language"] for row in study.report("probe").segmentation_rows()} == {"amh"}


def test_the_students_head_is_kept_with_it(given, tmp_path):
    change = {"distill.objectives": {"mlm": 1.0}, "distill.max_texts": 50, "vocabulary.prune": False}
    study = Study(tmp_path / "run", "smoke", given(change))
    student, _, facts = study.distill()
    assert student.head is not None and AutoModel.from_pretrained(study.run.path / "student").config.hidden_size == 32
    assert len(student.head.bias) == student.model.config.vocab_size


def test_student_card_quotes_the_results(study):
    study.write_cards()
    card = (study.run.path / "student" / "README.md").read_text()
    value = (
        study.run.results()
        .query("stage == 'benchmark' and model == 'student' and method == 'probe' and metric == 'score'")["value"]
        .iloc[0]
    )
    assert f"{value:.3f} [" in card and "ceb" in card


def test_student_folder_says_what_it_was_made_of(study):
    assert json.loads((study.run.path / "student" / "made.json").read_text())["key"] == study.graph.distill.key


@pytest.mark.parametrize("name, stage", [("vocabulary", "prune"), ("conditioned", "condition"), ("student", "distill")])
def test_a_damaged_model_is_named_and_rebuilt(study, given, name, stage, caplog):
    file = study.run.path / name / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-2] + bytes([good[-2] ^ 1, good[-1]]))
    again = Study(study.run.path, "smoke", given())
    assert not again.report(stage).intact()
    assert "model.safetensors is corrupted" in caplog.text and "it is rebuilt" in caplog.text
    {"prune": lambda: again.pruned, "condition": again.condition, "distill": again.distill}[stage]()
    assert file.read_bytes() == good and Study(study.run.path, "smoke", given()).report(stage).intact()


def test_what_comes_beside_a_model_later_is_no_damage(study):
    (study.run.path / "student" / "onnx").mkdir()
    (study.run.path / "student" / "README.md").write_text("another card")
    assert study.report("distill").intact() and study.report("benchmark").intact()


@pytest.mark.parametrize(
    "change, word",
    [
        ({"student.layers": 9}, "layers"),
        ({"student.init": [1, 99]}, "1 to 4"),
        ({"distill.objectives": {"x": 1.0}}, "objective"),
    ],
)
def test_contradictions_between_parameters_are_told(given, tmp_path, change, word):
    with pytest.raises(UserError, match=word):
        Study(tmp_path, "smoke", given(change)).undistilled()


def test_tasks_are_compared_where_the_profile_says_so(tmp_path):
    def compared(first, second):
        tasks = [{"name": "topic"} | first, {"name": "dengue", "kind": "multilabel"} | second]
        study = Study(tmp_path / "run", "smoke", {"tasks": tasks})
        return {flag: study.graph.named(flag) for flag in ("probe", "finetune", "ablate")}

    both, off = ["topic", "dengue"], {"probe": False, "finetune": False, "ablate": False}
    assert compared({}, {}) == {"probe": both, "finetune": both, "ablate": both}
    assert compared({}, off) == {"probe": ["topic"], "finetune": ["topic"], "ablate": ["topic"]}
    assert compared(off, off) == {"probe": both, "finetune": [], "ablate": both}
