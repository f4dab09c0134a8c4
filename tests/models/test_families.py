"""Every family of teachers passes every stage, on small random models with the family's quirks."""

import pytest
from families import STAGES, TEACHERS, Stages
from pruning.pairs import ACCENTED, FOREIGN

from kdlib.models.families import FAMILIES


@pytest.fixture(scope="module")
def training(parallel):
    return [row[code] for row in parallel[:120] for code in ("tgl", "eng", "ceb")] + (ACCENTED + FOREIGN) * 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_of_every_family_passes_every_stage(family, training, parallel, tmp_path):
    stages = Stages(family, tmp_path, training, [row["tgl"] for row in parallel[:80]])
    for name, stage in STAGES.items():
        try:
            stage(stages)
        except Exception as error:
            raise AssertionError(f"{family}: {name}") from error


def test_there_is_a_teacher_of_every_family():
    assert set(TEACHERS) == set(FAMILIES)
