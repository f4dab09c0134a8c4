"""Stages: what makes one out of date, what arms share, and what a stop in the middle leaves behind."""

import types
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import tiny
import torch
from pydantic import BaseModel
from transformers import AutoModel

from kdlib import config
from kdlib.errors import UserError
from kdlib.study.plan import Graph
from kdlib.study.stage import Context, Source, Stage, Watch, link_folder
from kdlib.study.study import STAGES, Study

# Parameters that change no result, each with its reason.
COMPUTE = "says where a result is computed, and not what it is"
WITHOUT_EFFECT = {
    "name": "a label of the profile; results do not hold it",
    "compute.jobs": COMPUTE,
    "compute.backend": COMPUTE,
    "compute.address": COMPUTE,
}


@pytest.fixture
def unread(monkeypatch):
    """Keys of settings alone: no data is read."""
    monkeypatch.setattr(Source, "content", "as it was")


def graph_of(tmp_path, overrides):
    profile = config.load_profile("smoke", overrides)
    return Graph(profile, Context(tmp_path, torch.device("cpu"), profile.distill.precision))


def keys_of(graph):
    return {name: report.key for name, report in graph.reports.items()} | {"student": graph.distill.key}


def stale(tmp_path, before, after):
    """The stages that two sets of overrides give different keys."""
    first, second = (keys_of(graph_of(tmp_path, changes)) for changes in (before, after))
    return {name for name in first if first[name] != second[name]}


# -- what makes a stage out of date


@pytest.mark.parametrize("change", ["distill.windows=[1]", "distill.heldout_texts=20", "distill.precision=fp32"])
def test_conditioning_depends_on_the_texts_and_the_precision_it_is_trained_with(unread, tmp_path, change):
    assert "condition" in stale(tmp_path, "", change)


def test_the_report_of_conditioning_depends_on_the_cloze_sentences(unread, tmp_path):
    assert stale(tmp_path, "", "probe.cloze_sentences=9") == {"probe", "condition", "figures"}


@pytest.mark.parametrize("change", ["parallel=null", "parallel.languages=[tgl,eng]", "probe.languages_rows=29"])
def test_reports_that_translate_depend_on_the_parallel_sentences(unread, tmp_path, change):
    changed = stale(tmp_path, "", change)
    assert {"probe", "prune", "figures"} == changed, "and the student does not"


def test_the_benchmark_depends_on_the_conditioning_of_another_student(unread, tmp_path):
    students = {"students": {"conditioned": {"condition.use": True}}}
    assert "benchmark" in stale(tmp_path, students, students | {"condition.epochs": 2})
    assert "benchmark" not in stale(tmp_path, {}, {"condition.epochs": 2})


def test_a_changed_parameter_makes_its_stage_and_those_after_it_stale(unread, tmp_path):
    assert stale(tmp_path, "", "student.layers=3") == {
        "distill",
        "student",
        "benchmark",
        "task",
        "ablations",
        "figures",
    }
    assert "distill" not in stale(tmp_path, "", "condition.epochs=2"), "nobody is distilled from the conditioned one"
    assert "distill" in stale(tmp_path, "condition.use=true", "condition.epochs=2 condition.use=true")


def leaves(model: type[BaseModel], path: str = "") -> dict[str, Any]:
    """Every parameter of a profile with its type, those of sections written as `section.name`."""
    found = {}
    for name, field in model.model_fields.items():
        inner = next((t for t in [field.annotation, *get_args(field.annotation)] if is_section(t)), None)
        inner = (
            None if name in ("fallbacks", "baselines", "corpora") else inner
        )  # lists and dicts that smoke leaves empty
        found |= leaves(inner, f"{path}{name}.") if inner else {f"{path}{name}": field}
    return found


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def another(field: Any, value: Any) -> Any:
    """A valid value of a field that is not the one it has."""
    kind = field.annotation
    options = [kind] if get_origin(kind) not in (types.UnionType,) else list(get_args(kind))
    for option in options:
        while get_origin(option) is Annotated:
            option = get_args(option)[0]
        if get_origin(option) is Literal:
            return next(x for x in get_args(option) if x != value)
        if option is bool:
            return not value
        if option is int and not isinstance(value, (str, list)):
            low = next((m.ge for m in field.metadata if hasattr(m, "ge")), 1)
            return (value if value is not None else low + 100) + 1
        if option is float:
            return value * 0.5 if value else 0.5
        if option is str:
            return f"{value or 'x'}y"
    return None


SPECIAL = {  # values that a rule on the type alone does not give
    "corpus.streaming": {"corpus.streaming": True, "corpus.max_documents": 200},
    "corpus.fallbacks": {"corpus.fallbacks": [{"source": "other.txt"}]},
    "distill.objectives": {"distill.objectives": {"hidden": 1.0}},
    "distill.windows": {"distill.windows": [2]},
    "benchmark.seeds": {"benchmark.seeds": [5]},
    "ablations.seeds": {"ablations.seeds": [5]},
    "benchmark.fewshot": {"benchmark.fewshot": [2]},
    "ablations.arms": {"ablations.arms": {"init": {"last": {"student.init": "last"}}}},
    "students": {"students": {"shallow": {"student.layers": 1}}},
    "baselines": {"baselines": {"other": {"source": "owner/model"}}},
    "parallel.languages": {"parallel.languages": ["tgl", "eng"]},
    "student.preset": {"student.preset": "tiny"},
    "student.init": {"student.init": "last"},
    "distill.layers": {"distill.layers": "late"},
    "language": {"language": "ceb"},
    "task_student.rows": {"task_student.rows": [3]},
    "task_student.arms": {"task_student.arms": {"balanced": {"balance": True}}},
    "compute.backend": {"compute.backend": "dask", "compute.address": "tcp://first:8786"},
    "compute.address": {"compute.backend": "dask", "compute.address": "tcp://second:8786"},
    "corpora": {"language": ["tgl", "eng"], "corpora": {"eng": {"source": "other.txt"}}},
    "weights": {"weights": {"tgl": 0.6, "eng": 0.4}},
    "vocabulary.coverage": {"vocabulary.coverage": 0.99},
}
LEAVES = leaves(config.Profile)


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_parameter_changes_the_key_of_a_stage_or_says_why_not(unread, tmp_path, leaf):
    base: dict[str, Any] = {"corpus.source": "mine.txt", "students": {"wide": {"condition.use": True}}}
    if leaf == "weights":
        base |= SPECIAL["corpora"]
    if leaf.startswith("tasks."):
        name, task = leaf.removeprefix("tasks."), {"name": "topic", "kind": "classify"}
        task |= {"distill": True} if name == "unlabelled" else {}
        given = {"label": "category", "kind": "multilabel", "fallbacks": [{"source": "other.csv"}]}
        value = given[name] if name in given else another(LEAVES[leaf], config.Task(name="topic").model_dump()[name])
        tasks = [task, {"name": "sentiment"}]  # a flag that no task has means all tasks
        changed = base | {"tasks": [task | {name: value}, {"name": "sentiment"}]}
        base = base | {"tasks": tasks}
    elif leaf in SPECIAL:
        changed = base | SPECIAL[leaf]
    else:
        value: Any = config.load_profile("smoke", base)
        for part in leaf.split("."):
            value = getattr(value, part)
        changed = base | {leaf: another(LEAVES[leaf], value)}
    assert config.load_profile("smoke", changed) != config.load_profile("smoke", base)
    assert bool(stale(tmp_path, base, changed)) != (leaf in WITHOUT_EFFECT), WITHOUT_EFFECT.get(leaf, "no key changed")


def test_transfer_is_measured_for_families_with_objectives_of_translations(unread, tmp_path):
    grid = {"a": {"b": {}, "c": {"distill.objectives": {"transport": 1.0}}}, "d": {"e": {"student.layers": 1}, "f": {}}}
    graph = graph_of(tmp_path, {"ablations.arms": grid})
    assert {arm.name: scores[0].reader is graph.teacher for arm, scores in graph.grid} == dict(b=1, c=1, e=0, f=0)
    for families, measured in ((grid, True), ({"d": grid["d"]}, False)):
        changes = {"ablations.arms": families}
        assert ("ablations" in stale(tmp_path, changes, changes | {"probe.languages_rows": 29})) == measured


TRANSLATIONS = {"distill.objectives": {"crosslingual": 1.0}, "parallel.languages": ["tgl", "eng"]}


@pytest.mark.parametrize(
    "change", [{"parallel.languages": ["eng", "tgl", "spa"]}, {"probe.languages_rows": 31}, {"seed": 7}], ids=str
)
def test_a_student_of_translations_depends_on_the_pairs_it_is_trained_on(unread, tmp_path, change):
    assert "student" in stale(tmp_path, TRANSLATIONS, TRANSLATIONS | change)


@pytest.mark.parametrize("change", [{"parallel": None}, {"parallel.languages": ["tgl"]}, {"language": "ceb"}], ids=str)
def test_objectives_of_translations_without_parallel_text_are_refused_at_the_start(tmp_path, change):
    with pytest.raises(UserError, match="crosslingual and transport need parallel text; set parallel.source"):
        graph_of(tmp_path, TRANSLATIONS | change).check()


def test_whom_the_student_learns_from_is_in_its_key(unread, tmp_path):
    assert "student" in stale(tmp_path, "condition.use=false", "condition.use=true")


def test_the_weights_of_a_local_teacher_are_in_the_keys(given, tmp_path):
    folder = tmp_path / "teacher"
    own = given({"teacher.source": str(folder)})
    tiny.encoder(seed=0).save(folder)
    first = keys_of(graph_of(tmp_path, own))
    assert keys_of(graph_of(tmp_path, own)) == first
    tiny.encoder(seed=1).save(folder)
    second = keys_of(graph_of(tmp_path, own))
    assert all(first[name] != second[name] for name in first.keys() - {"task"}), "no task asks for a model"


# -- equal keys are one object


def test_arms_share_what_they_leave_alone(unread, tmp_path):
    graph = graph_of(tmp_path, "")
    arms = {f"{arm.family}/{arm.name}": scores[0] for arm, scores in graph.grid}
    assert arms["init/random"].student.source is graph.prune
    assert arms["init/alternate"] is arms["fraction/100%"], "two arms that come to the same thing are one"
    assert arms["conditioning/conditioned teacher"].student.source is graph.condition


def test_what_an_arm_leaves_alone_keeps_its_key(unread, tmp_path):
    grid = {
        "a": {
            "depth": {"student.layers": 1},
            "rows": {"vocabulary.max_rows": 8000},
            "conditioned": {"condition.use": True},
        }
    }
    graph = graph_of(tmp_path, {"ablations.arms": grid})

    def changed(arm):
        mine = Graph(arm.profile, graph.context)
        return [name for name in ("prune", "condition", "distill") if getattr(mine, name) is not getattr(graph, name)]

    found = {arm.name: changed(arm) for arm, _ in graph.grid}
    assert found == {"depth": ["distill"], "rows": ["prune", "condition", "distill"], "conditioned": ["distill"]}


def test_a_variant_shares_the_data_and_leaves_the_run_as_it_is(tmp_path):
    study = Study(tmp_path / "run", "smoke")
    written = (study.run.path / "profile.yaml").read_bytes()
    variant = study.variant("student.layers=1")
    assert variant.corpus is study.corpus and variant.graph.prune is study.graph.prune
    assert variant.graph.distill.key != study.graph.distill.key and variant.profile.student.layers == 1
    assert (study.run.path / "profile.yaml").read_bytes() == written
    with pytest.raises(UserError, match="student.layer"):
        study.variant({"student.layer": 1})


def test_settings_of_a_stage_cannot_be_changed(unread, tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        graph_of(tmp_path, "").distill.settings.seed = 3


# -- other students, and arms with a precision of their own


@pytest.fixture(scope="module")
def study(given, tmp_path_factory):
    change = {"students": {"shallow": {"student.layers": 1, "distill.objectives": {"sentence": 1.0}}}}
    return Study(tmp_path_factory.mktemp("runs") / "stages", "smoke", given(change))


def test_every_student_has_a_card_of_its_own(study):
    study.distill()
    study.graph.others["shallow"].distill.get()
    cards = [(study.run.path / name / "README.md").read_text() for name in ("student", "students/shallow")]
    assert "2 layers started" in cards[0] and "1 layer started" in cards[1]
    assert "(objectives hidden, sentence)" in cards[0] and "(objectives sentence)" in cards[1]
    study.write_cards()
    assert "1 layer started" in (study.run.path / "students/shallow" / "README.md").read_text()


def test_the_student_is_a_link_to_its_stage_and_a_plain_folder(study):
    study.distill()
    student = study.run.path / "student"
    assert student.resolve() == study.graph.distill.folder.resolve()
    assert AutoModel.from_pretrained(student).config.num_hidden_layers == 2


def test_an_arm_is_distilled_in_its_own_precision(study, monkeypatch):
    seen = []
    monkeypatch.setattr("kdlib.study.stages.distill", lambda teacher, *a, **k: seen.append(teacher.bf16) or stop())

    def stop():
        raise UserError("seen enough")

    for precision in ("bf16", "fp32"):
        arms = {"ablations.arms": {"precision": {precision: {"distill.precision": precision}}}}
        with pytest.raises(UserError, match="seen enough"):
            study.variant(arms).ablation_rows()
    assert seen == [True, False]


# -- stops


@pytest.mark.slow
def test_ablations_that_were_stopped_after_each_arm_end_as_undisturbed_ones(given, tmp_path):
    grid = {
        "vocabulary": {"whole": {"vocabulary.prune": False}},
        "sentences": {"few": {"distill.heldout_texts": 15}, "as it is": {}},
    }
    own = given({"ablations.arms": grid, "students": {}, "corpus.heldout": 0.4})
    whole = Study(tmp_path / "whole", "smoke", own).ablation_rows()

    class Stop(Exception):
        pass

    def stop_once_more(arm, rows):
        if (arm.family, arm.name) not in seen:
            seen.append((arm.family, arm.name))
            raise Stop

    seen, rows = [], None
    while rows is None:
        try:  # a new study each time, as a new process has one
            rows = Study(tmp_path / "stopped", "smoke", own).ablation_rows(on_arm=stop_once_more)
        except Stop:
            pass
    assert len(seen) == 3 and rows == whole


# -- the machinery


class Counted(Stage):
    """Writes a number that rises with each time it is made."""

    name, made = "counted", 0

    def make(self, folder, watch):
        type(self).made += 1
        (folder / "number").write_text(str(self.made))

    def load(self, folder):
        return (folder / "number").read_text()


@pytest.fixture
def counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "made", 0)
    from kdlib.study.reports import NoSettings

    return lambda link="": Counted(Context(tmp_path, torch.device("cpu"), "fp32"), NoSettings(), link)


def test_a_stage_is_made_once_and_then_read(counted):
    assert counted().get() == counted().get() == "1"


def test_a_damaged_stage_is_named_and_rebuilt(counted, caplog):
    counted().get()
    (counted().folder / "number").write_text("7")
    assert not counted().intact() and counted().get() == "2"
    assert "corrupted" in caplog.text and "it is rebuilt" in caplog.text


def test_a_new_version_of_the_code_is_another_key(counted, monkeypatch):
    before = counted().key
    monkeypatch.setattr(Counted, "version", 2)
    assert counted().key != before


def test_a_stage_that_fails_leaves_no_folder(counted, monkeypatch):
    def fail(self, folder, watch):
        (folder / "half").write_text("x")
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Counted, "make", fail)
    with pytest.raises(RuntimeError):
        counted().get(Watch())
    assert not counted().folder.exists()


def test_a_link_follows_its_stage_and_replaces_what_is_in_its_way(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / "artefacts" / name).mkdir(parents=True)
        (tmp_path / "artefacts" / name / "file").write_text(name)
    link = tmp_path / "shown"
    link.mkdir()
    for name in ("one", "two", "two"):
        link_folder(link, tmp_path / "artefacts" / name)
        assert (link / "file").read_text() == name and link.is_symlink()
    link.unlink()

    def refuse(*args, **kwargs):
        raise OSError(1, "links need a privilege here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    link_folder(link, tmp_path / "artefacts" / "one")
    assert (link / "file").read_text() == "one" and not link.is_symlink()


def test_stages_are_those_of_the_notebooks(unread, tmp_path):
    assert list(graph_of(tmp_path, "").reports) == STAGES


# -- translations


def test_transfer_is_measured_beside_the_probes_and_compared_with_the_base_arm(given, tmp_path):
    lines = [f"{a},{b}" for a, b in zip(tiny.texts(60, 5, 9), tiny.texts(60, 6, 9))]
    (tmp_path / "pairs.csv").write_text("\n".join(["ceb,eng", *dict.fromkeys(lines)]))
    arms = {"base": {}, "translated": {"distill.objectives": {"crosslingual": 1.0, "transport": 1.0}}}
    own = {"parallel": {"source": str(tmp_path / "pairs.csv"), "languages": ["ceb", "eng"]}, "ablations.seeds": [0, 1]}
    study = Study(tmp_path / "run", "smoke", given(own | {"ablations.arms": {"similar work": arms}}))
    rows = study.ablation_rows()
    transfer = [row for row in rows if row["metric"] == "transfer" and row.get("seed") is None]
    assert {(row["method"], row.get("arm"), row["task"]) for row in transfer} >= {
        ("similar work", arm, f"retrieval {way} eng") for arm in arms for way in ("into", "from")
    }
    teacher = {row["task"]: row["value"] for row in transfer if row["model"] == "teacher"}
    assert set(teacher) == {"retrieval into eng", "retrieval from eng"} and max(teacher.values()) <= 1
    tested = {row["task"] for row in rows if row["metric"] == "p_holm" and row["arm"] == "translated"}
    assert tested == {"length", "average", None, "retrieval into eng", "retrieval from eng"}
    base = [row for row in rows if row.get("arm") == "base" and row.get("seed") is None]
    score = {(row.get("task"), row["metric"]): row["value"] for row in base}
    assert score["average", "score"] == pytest.approx(score["length", "accuracy"]), "the average is of probes alone"
