"""Every family of teachers passes every stage, on small random models with the family's quirks."""

from pathlib import Path

import pytest
from families import STAGES, TEACHERS, training_texts, try_stages

from kdlib.errors import UserError
from kdlib.models.families import FAMILIES, family_of, older_settings

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_of_every_family_passes_every_stage(family, tmp_path):
    assert try_stages(family, tmp_path, *training_texts()) == {}


def test_the_docs_have_a_row_for_every_family_and_a_column_for_every_stage():
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    assert lines[0] == ["family", *STAGES]
    assert [line[0] for line in lines[2 : 2 + len(TEACHERS)]] == list(TEACHERS)
    assert set(TEACHERS) == set(FAMILIES)


def test_other_families_are_refused_in_one_line_with_those_that_work():
    with pytest.raises(UserError, match="a model of kind 't5'; supported are bert, .*, modernbert, eurobert, gte$"):
        family_of("t5")
    with pytest.raises(UserError, match="gte-multilingual has a version in this format"):
        family_of("new")


@pytest.mark.parametrize(
    "kinds, step",
    [("gllgll", 3), ("g", 1), ("gl", 2), ("gll", 3), ("ggg", 1), ("glgl", 2), ("gglg", None), ("gllgg", None)],
)
def test_the_order_of_global_layers_is_said_as_transformers_4_reads_it(kinds, step):
    names = {"g": "full_attention", "l": "sliding_attention"}
    rope = {names["g"]: {"rope_theta": 5.0}, names["l"]: {"rope_theta": 7.0}}
    settings = dict(model_type="modernbert", layer_types=[names[k] for k in kinds], rope_parameters=rope)
    found = older_settings(settings)
    assert found.get("global_attn_every_n_layers") == step
    assert (found["global_rope_theta"], found["local_rope_theta"]) == (5.0, 7.0)
    if step:
        assert [names["l"] if i % step else names["g"] for i in range(len(kinds))] == settings["layer_types"]
