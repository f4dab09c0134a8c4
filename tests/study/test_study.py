"""A whole study on a tiny local teacher, somebody's own corpus and own task, in another language."""

import json

import pytest
import tiny
from transformers import AutoModel

from kdlib.config import load_profile
from kdlib.distillation import distill as distillation
from kdlib.errors import UserError
from kdlib.evaluation import benchmark
from kdlib.study.study import STAGES, Study, stage_key

OVERRIDES = {
    "language": "ceb", "parallel": None, "teacher.max_length": 32,
    "vocabulary.max_rows": 100, "vocabulary.wordlist": False, "student.layers": 2,
    "distill.batch_tokens": 128, "distill.evaluations": 2, "distill.precision": "fp32", "distill.epochs": 1,
    "benchmark.seeds": [0, 1], "benchmark.finetune_epochs": 1, "benchmark.bootstrap": 100,
    "benchmark.latency_runs": 3, "ablations.epochs": 1, "ablations.max_texts": 50, "condition.batch_tokens": 128,
    "benchmark.fewshot": [4], "benchmark.fewshot_steps": 3, "benchmark.finetune_batch": 16,
    "ablations.arms": {
        "fraction": {"half": {"distill.fraction": 0.5}, "all": {"distill.fraction": 1.0}},
        "init": {"alternate": {"student.init": "alternate"}, "random": {"student.init": "random"}},
        "objective": {"attention": {"distill.objectives": {"attention": 1.0}}},
        "conditioning": {"conditioned teacher": {"condition.use": True}},
        "vocabulary": {"whole": {"vocabulary.prune": False}},
        "width": {"16 wide": {"student.hidden": 16}},
    },
    "students": {"shallow": {"student.layers": 1}},
    "probe.train_rows": 40, "probe.test_rows": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    tiny.encoder().save(folder / "teacher")
    (folder / "corpus.txt").write_text("\n\n".join("\n".join(tiny.texts(4, seed)) for seed in range(40)))
    rows = [f"{text},{'taas' if len(text.split()) > 3 else 'mubo'}" for text in dict.fromkeys(tiny.texts(150, 99, 7))]
    (folder / "labels.csv").write_text("sentence,gitas-on\n" + "\n".join(rows))
    return folder


def overrides(sources, **more):
    task = {"name": "length", "source": str(sources / "labels.csv"), "text": "sentence", "label": "gitas-on"}
    own = {"teacher.source": str(sources / "teacher"), "corpus.source": str(sources / "corpus.txt"), "tasks": [task]}
    return OVERRIDES | own | more


@pytest.fixture(scope="module")
def study(sources, tmp_path_factory):
    return Study(tmp_path_factory.mktemp("runs") / "ceb", "smoke", overrides(sources))


def test_every_stage_gives_rows_in_the_studys_language(study):
    rows = study.segmentation_rows() + study.usage_rows() + study.layer_probe_rows() + study.cka_rows()
    assert study.retrieval_rows() == []
    study.run.record("probe", rows)
    study.run.record("prune", study.prune_rows())
    _, curve, facts = study.condition()
    study.run.record("condition", study.condition_rows(curve, facts) + study.cloze_rows())
    student, curve, facts = study.distill()
    study.run.record("distill", study.distill_rows(curve, facts))
    trials = [trial for method in ("probe", "finetune", "fewshot") for trial in study.trials(method)]
    rows = benchmark.rows(trials, study.profile.benchmark) + study.efficiency_rows() + study.paired_rows(trials)
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
        "from scratch",
        "shallow",
    }
    assert student.layers == 2 and student.tokenizer.vocab_size <= 100


def test_pruning_is_proved_on_every_text(study):
    study.pruned
    proof = study.prove_pruning()
    assert (proof["checked"] == proof["holds"]).all() and proof["checked"].iloc[0] > 100


def test_teacher_and_pruned_teacher_probe_alike(study):
    table = study.run.results()
    scores = table[(table["method"] == "probe") & (table["metric"] == "score")].set_index("model")["value"]
    assert scores["teacher"] == pytest.approx(scores["pruned teacher"], abs=0.02)


def test_a_second_study_takes_what_is_there(study, sources, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr("kdlib.study.study.distill", never)
    monkeypatch.setattr("kdlib.pruning.model.prune_encoder", never)
    again = Study(study.run.path, "smoke", overrides(sources))
    assert again.student.layers == 2 and len(again.ablation_rows()) > 0


def test_only_the_new_arm_is_run(study, sources, monkeypatch):
    labels = []
    real = distillation.distill
    monkeypatch.setattr("kdlib.study.study.distill", lambda *a, **k: labels.append(a[7]) or real(*a, **k))
    starts = {name: {"student.init": name} for name in ("last", "first")}
    arms = OVERRIDES["ablations.arms"] | {"init": starts}
    more = Study(study.run.path, "smoke", overrides(sources, **{"ablations.arms": arms}))
    rows = more.ablation_rows(["init/last"])
    assert labels == ["arm init last"]
    assert {row["arm"] for row in rows if "arm" in row} >= {"half", "all", "last"} and "first" not in str(rows)


def stale(before, after):
    """The stages that two overrides of a profile give different keys."""
    keys = [{s: stage_key(load_profile("smoke", o), s, {}) for s in STAGES} for o in (before, after)]
    return {stage for stage in STAGES if keys[0][stage] != keys[1][stage]}


def test_a_changed_parameter_makes_its_stage_and_those_after_stale():
    assert stale("", "student.layers=3") == {"distill", "benchmark", "ablations", "figures"}
    assert "distill" not in stale("", "condition.epochs=2")  # nobody is distilled from the conditioned one
    assert "distill" in stale("condition.use=true", "condition.epochs=2 condition.use=true")


def test_other_data_under_the_same_name_makes_what_was_made_of_it_stale(sources, tmp_path):
    def keys():
        study = Study(tmp_path / "run", "smoke", overrides(sources, **files))
        for stage in STAGES:
            study.run.mark(stage, study.key(stage), 1.0, study.data_of(stage))
        return {stage: study.key(stage) for stage in STAGES}, study.data

    def changed(stage):
        study = Study(tmp_path / "run", "smoke", overrides(sources, **files))
        return study.run.changed(stage, study.data_of(stage))

    corpus, labels = tmp_path / "corpus.txt", tmp_path / "labels.csv"
    corpus.write_bytes((sources / "corpus.txt").read_bytes())
    labels.write_bytes((sources / "labels.csv").read_bytes())
    task = {"name": "length", "source": str(labels), "text": "sentence", "label": "gitas-on"}
    files = {"corpus.source": str(corpus), "tasks": [task]}
    first, _ = keys()
    corpus.touch()
    assert keys()[0] == first
    labels.write_text(labels.read_text() + "\nxyzzy xyzzy,mubo")  # stands nowhere in the corpus
    assert changed("probe") == ["tasks"] and changed("distill") == []
    second, _ = keys()
    assert {stage for stage in STAGES if first[stage] != second[stage]} == {
        "probe",
        "benchmark",
        "ablations",
        "figures",
    }
    corpus.write_text(corpus.read_text().replace("ang", "ng"))
    assert changed("distill") == ["corpus", "training"]
    third, _ = keys()
    assert all(second[stage] != third[stage] for stage in STAGES)


def test_a_test_row_that_stands_in_the_corpus_changes_what_is_distilled(study, sources, tmp_path):
    labelled = (sources / "labels.csv").read_text()
    sentence = next(s for document in study.corpus.train for s in document.sentences if s not in labelled)
    data = []
    for name, row in (("one", "xyzzy"), ("two", sentence)):
        (tmp_path / f"{name}.csv").write_text(f"sentence,gitas-on\nxyzzy xyzzy,taas\n{row},mubo")
        task = {"name": "length", "source": str(sources / "labels.csv"), "test": str(tmp_path / f"{name}.csv")}
        task |= {"text": "sentence", "label": "gitas-on"}
        data.append(Study(tmp_path / name, "smoke", overrides(sources, tasks=[task])).data)
    assert data[0]["corpus"] == data[1]["corpus"] and data[0]["training"] != data[1]["training"]


def test_parallel_sentences_without_the_language_are_left_out(sources, tmp_path):
    change = {"language": "amh", "parallel": {"languages": ["tgl", "eng"]}}
    study = Study(tmp_path / "run", "smoke", overrides(sources, **change))
    assert study.parallel == {} and {row["language"] for row in study.segmentation_rows()} == {"amh"}


def test_the_students_head_is_kept_with_it(sources, tmp_path):
    change = {"distill.objectives": {"mlm": 1.0}, "distill.max_texts": 50, "vocabulary.prune": False}
    study = Study(tmp_path / "run", "smoke", overrides(sources, **change))
    student, _, facts = study.distill()
    assert student.head is not None and AutoModel.from_pretrained(study.run.path / "student").config.hidden_size == 32
    assert len(student.head.bias) == student.model.config.vocab_size


def test_student_card_quotes_the_results(study):
    from kdlib.study.model_card import write_card

    write_card(study.run.path / "student", study.run)
    card = (study.run.path / "student" / "README.md").read_text()
    value = (
        study.run.results()
        .query("stage == 'benchmark' and model == 'student' and method == 'probe' and metric == 'score'")["value"]
        .iloc[0]
    )
    assert f"{value:.3f} [" in card and "ceb" in card


def test_student_folder_says_what_it_was_made_of(study):
    assert json.loads((study.run.path / "student" / "made.json").read_text())["key"] == study.key("distill")


@pytest.mark.parametrize("name, stage", [("vocabulary", "prune"), ("conditioned", "condition"), ("student", "distill")])
def test_a_damaged_model_is_named_and_made_again(study, sources, name, stage, caplog):
    file = study.run.path / name / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-2] + bytes([good[-2] ^ 1, good[-1]]))
    again = Study(study.run.path, "smoke", overrides(sources))
    assert not again.intact(stage)
    assert f"{name}: model.safetensors is corrupted" in caplog.text and "made again" in caplog.text
    {"prune": lambda: again.pruned, "condition": again.condition, "distill": again.distill}[stage]()
    assert file.read_bytes() == good and Study(study.run.path, "smoke", overrides(sources)).intact(stage)


def test_what_comes_beside_a_model_later_is_no_damage(study):
    (study.run.path / "student" / "onnx").mkdir()
    (study.run.path / "student" / "README.md").write_text("another card")
    assert study.intact("distill") and study.intact("benchmark")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"student.layers": 9}, "layers"),
        ({"student.init": [1, 99]}, "1 to 4"),
        ({"distill.objectives": {"x": 1.0}}, "objective"),
    ],
)
def test_contradictions_between_parameters_are_told(sources, tmp_path, change, word):
    with pytest.raises(UserError, match=word):
        Study(tmp_path, "smoke", overrides(sources, **change)).undistilled()


def test_tasks_are_compared_where_the_profile_says_so(tmp_path):
    def compared(first, second):
        tasks = [{"name": "topic"} | first, {"name": "dengue", "kind": "multilabel"} | second]
        study = Study(tmp_path / "run", "smoke", {"tasks": tasks})
        return {flag: [task.name for task in study._tasks_that(flag)] for flag in ("probe", "finetune", "ablate")}

    both, off = ["topic", "dengue"], {"probe": False, "finetune": False, "ablate": False}
    assert compared({}, {}) == {"probe": both, "finetune": both, "ablate": both}
    assert compared({}, off) == {"probe": ["topic"], "finetune": ["topic"], "ablate": ["topic"]}
    assert compared(off, off) == {"probe": both, "finetune": [], "ablate": both}
