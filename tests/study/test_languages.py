"""A study of two languages: a mixed corpus, words and scripts of both, and numbers for each."""

import pytest
import tiny

from kdlib import Study
from kdlib.config import load_profile
from kdlib.data.corpus import load_languages
from kdlib.data.tasks import load_tasks
from kdlib.files import read_json


@pytest.fixture(scope="module")
def study(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "eng.txt").write_text(
        "\n\n".join("\n".join(f"the {t} of" for t in tiny.texts(3, s)) for s in range(60, 90))
    )
    rows = {"ceb": list(tiny.texts(30, 7)), "eng": [f"the {t} of" for t in tiny.texts(30, 7)]}
    (folder / "parallel.csv").write_text("ceb,eng\n" + "\n".join(f'"{a}","{b}"' for a, b in zip(*rows.values())))
    change = {
        "language": ["ceb", "eng"],
        "corpora": {"eng": {"source": str(folder / "eng.txt"), "heldout": 0.1}},
        "parallel": {"source": str(folder / "parallel.csv"), "languages": ["ceb", "eng"]},
        "vocabulary.max_rows": None,
        "vocabulary.coverage": 0.9,
        "probe.languages_rows": 20,
    }
    return Study(folder / "run", "smoke", given(change))


def test_both_languages_are_read_and_recorded(study):
    assert study.tasks
    found = read_json(study.run.path / "sources.json")
    assert set(found["corpora"]) == {"ceb", "eng"} and found["corpora"]["eng"]["source"].endswith("eng.txt")
    english = [d for d in study.corpus.train if d.sentences[0].startswith("the")]
    assert 0 < len(english) < len(study.corpus.train)


def test_held_out_sentences_keep_the_shares(study):
    held = study.graph.heldout.get()
    english = sum(s.startswith("the") for s in held)
    assert english == pytest.approx(0.3 * len(held), abs=1)


def test_fertility_coverage_and_unknown_tokens_are_told_for_each_language(study):
    rows = study.report("prune").rows()
    for metric in ("fertility", "unknown_rate"):
        found = {(r["model"], r["language"]) for r in rows if r["metric"] == metric and r["method"] == "heldout"}
        assert found == {(m, code) for m in ("teacher", "pruned teacher") for code in ("ceb", "eng")}
    (size,) = [r for r in rows if r["metric"] == "rows_found"]
    assert size["x"] == 0.9 and size["value"] == len(study.selection.ids)
    for code in ("ceb", "eng"):
        curve = [r for r in rows if r["metric"] == "coverage" and r["method"] == "heldout" and r["language"] == code]
        assert max(r["value"] for r in curve) >= 0.9


def test_retrieval_is_between_the_languages(study):
    assert {r["language"] for r in study.report("probe").retrieval_rows()} == {"eng"}


@pytest.mark.slow
def test_a_student_is_distilled_and_its_card_names_both_languages(study):
    assert study.student.parameters > 0
    card = (study.run.path / "student" / "README.md").read_text()
    assert "- ceb" in card and "- eng" in card


def test_embedded_tasks_are_made_of_the_embedded_corpus_alone(tmp_path):
    (tmp_path / "eng.txt").write_text("\n\n".join(f"Line {i} of some text." for i in range(40)))
    several = {"language": ["tgl", "eng"], "corpora": {"eng": {"source": str(tmp_path / "eng.txt")}}}
    profile = load_profile("workshop", several)
    corpus = load_languages(profile, lambda texts: sum(len(text.split()) for text in texts))
    alone = load_tasks(profile.tasks, corpus.parts["tgl"])
    assert [(t.train, t.test) for t in load_tasks(profile.tasks, corpus)] == [(t.train, t.test) for t in alone]
