"""The grid is data: arms are the study's profile with one thing changed, checked before anything runs."""

import pytest

from kdlib.config import changed, load_profile, profile_names
from kdlib.errors import UserError
from kdlib.study.arms import arms


@pytest.fixture
def profile():
    return load_profile("full")


@pytest.mark.parametrize("name", profile_names())
def test_every_arm_of_every_profile_is_valid_and_each_name_is_told_once(name):
    found = arms(load_profile(name))
    assert len({(arm.family, arm.name) for arm in found}) == len(found) > 1


def test_an_arm_is_the_profile_with_its_changes_and_the_grids_epochs(profile):
    arm = next(arm for arm in arms(profile) if arm.name == "2 layers")
    assert arm.profile.student.layers == 2 and arm.profile.distill.epochs == profile.ablations.epochs
    assert arm.profile.vocabulary == profile.vocabulary and arm.profile.tasks == profile.tasks


def test_an_arm_may_set_its_own_epochs(profile):
    longer = changed(profile, {"ablations.arms": {"epochs": {"10": {"distill.epochs": 10}}}}, "test")
    assert [arm.profile.distill.epochs for arm in arms(longer)] == [10]


def test_x_is_the_one_number_that_changes(profile):
    grid = {"a": {"b": {"distill.fraction": 0.5}, "c": {"distill.cache": True}, "d": {}}}
    grid["a"]["e"] = {"student.layers": 2, "student.ffn": 64}
    assert [arm.x for arm in arms(changed(profile, {"ablations.arms": grid}, "test"))] == [0.5, None, None, None]


def test_only_the_wanted_arms(profile):
    assert {arm.family for arm in arms(profile, ["depth"])} == {"depth"}
    assert [(arm.family, arm.name) for arm in arms(profile, ["init/last", "depth/2 layers"])] == [
        ("init", "last"),
        ("depth", "2 layers"),
    ]


@pytest.mark.parametrize("name, close", [("dept", "depth"), ("init/lest", "init/last"), ("???", "fraction")])
def test_an_unknown_arm_is_refused_with_the_closest(profile, name, close):
    with pytest.raises(UserError, match=f"no ablation arm .*{close}"):
        arms(profile, [name])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"corpus.source": "x.txt"}, "cannot change 'corpus.source'.*vocabulary, condition, student, distill"),
        ({"student.layer": 3}, "unknown parameter 'student.layer'.*student.layers"),
        ({"student.layers": "three"}, "student.layers: .*'three'"),
        ({"distill": {"fraction": 2.0}}, "distill.fraction"),
    ],
)
def test_a_wrong_arm_is_told_before_anything_runs(profile, changes, said):
    with pytest.raises(UserError, match=said):
        arms(changed(profile, {"ablations.arms": {"mine": {"one": changes}}}, "test"))


@pytest.mark.parametrize("family", ["../x", "", "a/b", ".hidden"])
def test_a_familys_name_is_fit_for_a_file(profile, family):
    with pytest.raises(UserError, match="ablations.arms"):
        changed(profile, {"ablations.arms": {family: {"one": {}}}}, "test")


def test_a_preset_that_is_asked_for_comes_before_the_profiles_sizes(profile):
    tiny = changed(profile, {"student.preset": "tiny"}, "test").student
    assert (tiny.layers, tiny.hidden, tiny.ffn, tiny.heads) == (4, 312, 1200, 12)
    deeper = changed(profile, {"student.preset": "tiny", "student.layers": 6}, "test").student
    assert (deeper.layers, deeper.hidden) == (6, 312)
