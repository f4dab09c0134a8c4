"""One profile for several languages."""

import pandas as pd
import pytest

from kdlib.errors import UserError
from kdlib.study import sweep
from kdlib.study.run import Run
from kdlib.study.sweep import read_sweep, run_sweep
from kdlib.viz.languages import language_figure, language_table

GOOD = """
profile: smoke
only: [prune, distill]
set: {corpus.source: a.txt, tasks: []}
languages:
  ceb: {corpus.text: body}
  war: {vocabulary.max_rows: 500}
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "languages.yaml").write_text(text)
        return tmp_path / "languages.yaml"

    return write


def rows(language, shift):
    heldout = dict(metric="fertility", method="heldout", language=language)
    return {
        "prune": [
            dict(model="teacher", value=1.5) | heldout,
            dict(model="pruned teacher", value=1.5 + shift) | heldout,
        ],
        "distill": [dict(model="student", metric="similarity", method="heldout", value=0.9)],
    }


def test_each_language_is_a_run_of_the_profile_with_its_own_parameters(file):
    read = read_sweep(file(GOOD))
    assert read.overrides("ceb") == ['language="ceb"', 'corpus.source="a.txt"', "tasks=[]", 'corpus.text="body"']


@pytest.mark.parametrize(
    "text, told",
    [
        ("profile: smoke", "languages: Field required"),
        (GOOD + "  x: {}", "language"),
        (GOOD.replace("max_rows", "max_row"), "unknown parameter 'vocabulary.max_row'"),
        (GOOD.replace("distill]", "distil]"), "unknown stage 'distil'"),
        (GOOD + "extra: 1", "extra"),
        ("[", "languages.yaml"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(file, tmp_path, text, told):
    with pytest.raises(UserError, match=told):
        run_sweep(file(text), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_one_table_and_one_figure_and_a_failing_language_stops_no_other(file, tmp_path, monkeypatch):
    asked = []

    def run_study(folder, profile, overrides, only, again):
        asked.append((folder.name, only, again))
        if folder.name == "ceb":
            raise UserError("a.txt: no such file")
        run = Run(folder, sweep.config.load_profile(profile, overrides))
        for stage, made in rows("war", 0.2).items():
            run.record(stage, made)

    monkeypatch.setattr(sweep, "run_study", run_study)
    table, failed = run_sweep(file(GOOD), tmp_path / "runs", lambda line: None)
    assert asked == [(code, ["prune", "distill"], False) for code in ("ceb", "war")]
    assert failed == ["ceb: a.txt: no such file"] and list(table.index) == ["war"]
    assert pd.read_csv(tmp_path / "runs" / "languages.csv")["tokens a word, pruned"].tolist() == [1.7]
    assert (tmp_path / "runs" / "languages.png").stat().st_size > 1000


def test_the_table_has_the_languages_own_rows_and_no_empty_columns():
    def table_of(code):
        made = [row | {"stage": stage} for stage, some in rows(code, 0.1).items() for row in some]
        other = dict(stage="prune", model="teacher", metric="fertility", method="heldout", language="eng", value=9.0)
        return pd.DataFrame([*made, other]).assign(seed=None, language=lambda t: t["language"].fillna(code))

    table = language_table({code: table_of(code) for code in ("tgl", "ceb")})
    assert list(table.columns) == ["tokens a word, teacher", "tokens a word, pruned", "similarity after"]
    assert table.loc["ceb"].tolist() == [1.5, 1.6, 0.9]
    assert [ax.get_xlabel() for ax in language_figure(table).axes] == ["tokens a word"]
    with pytest.raises(UserError, match="no language has results"):
        language_table({"tgl": table_of("tgl").iloc[:0]})
