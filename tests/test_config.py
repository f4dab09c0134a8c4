"""Profiles: they load, can be overridden, and every wrong key or value is a UserError that says what would be right."""

import pytest

from kdlib.config import Profile, all_keys, load_profile, parse_overrides, profile_names
from kdlib.errors import UserError


def refusal(overrides=(), profile="smoke"):
    with pytest.raises(UserError) as caught:
        load_profile(profile, overrides)
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text and "http" not in text and "instance of" not in text
    return text


@pytest.fixture
def profile_file(tmp_path):
    def write(content):
        path = tmp_path / "mine.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_four_profiles_are_shipped():
    assert profile_names() == ["full", "paper", "smoke", "workshop"]


@pytest.mark.parametrize("name", ["paper", "smoke", "workshop"])
def test_shipped_profile_loads_and_survives_a_round_trip(name):
    profile = load_profile(name)
    assert profile.name == name
    assert Profile.model_validate(profile.model_dump()) == profile


def test_profile_of_another_folder_by_path(profile_file):
    assert load_profile(profile_file("name: mine\nseed: 7\n")).seed == 7


def test_empty_profile_file_has_the_defaults(profile_file):
    assert load_profile(profile_file("")) == Profile()


@pytest.mark.parametrize(
    "overrides",
    [
        "distill.epochs=2 seed=5",
        ["distill.epochs=2", "seed=5"],
        ("distill.epochs=2", "seed=5"),
        {"distill.epochs": 2, "seed": 5},
    ],
)
def test_overrides_as_text_list_or_dict(overrides):
    profile = load_profile("smoke", overrides)
    assert (profile.distill.epochs, profile.seed) == (2, 5)
    assert profile.distill.max_texts == load_profile("smoke").distill.max_texts


def test_later_override_wins():
    assert load_profile("smoke", ["seed=1", "seed=2"]).seed == 2


def test_override_values_are_yaml():
    parsed = parse_overrides(["a=5e-4", "b=[1, x]", "c={d: null}", "e=", "f=true", "g=1=2", "h='3'"])
    assert parsed == {"a": 5e-4, "b": [1, "x"], "c": {"d": None}, "e": None, "f": True, "g": "1=2", "h": "3"}


@pytest.mark.parametrize("text, value", [("5e-4", 5e-4), ("5E-4", 5e-4), ("1e3", 1e3), ("5.0e-4", 5e-4), (".5e1", 5.0)])
def test_scientific_notation_is_a_number(text, value):
    assert load_profile("smoke", f"distill.learning_rate={text}").distill.learning_rate == value


def test_whole_number_where_a_fraction_is_meant():
    epochs = load_profile("smoke", "distill.epochs=3").distill.epochs
    assert epochs == 3.0 and isinstance(epochs, float)
    assert load_profile("smoke", {"distill.objectives": {"hidden": 1}}).distill.objectives == {"hidden": 1.0}


def test_language_codes_stay_text():
    assert load_profile("smoke", "language=no").language == "no"
    assert load_profile("smoke", "language=nan").language == "nan"


def test_section_switched_off_can_be_set_again():
    assert load_profile("paper", "parallel=null").parallel is None
    assert load_profile("paper", "parallel=null parallel.source=p.csv").parallel.source == "p.csv"


def test_profiles_do_not_share_defaults():
    first, second = load_profile("smoke"), load_profile("smoke")
    first.distill.objectives["hidden"] = 9.0
    assert second.distill.objectives["hidden"] == 1.0
    with pytest.raises(ValueError, match="frozen"):
        first.corpus.heldout = 0.4


@pytest.mark.slow
def test_all_keys_can_be_set_to_what_they_are():
    profile = load_profile("workshop")
    for key in all_keys():
        value = profile.model_dump()
        for part in key.split("."):
            value = value[part]
        assert load_profile("workshop", {key: value}) == profile, key


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("distil.epochs", "distill.epochs"),
        ("distill.epoch", "distill.epochs"),
        ("epochs", "distill.epochs"),
        ("epochs", "ablations.epochs"),
        ("sed", "seed"),
        ("student.layer", "student.layers"),
        ("teacher.sorce", "teacher.source"),
        ("Distill.Epochs", "distill.epochs"),
        ("vocabulary.max_row", "vocabulary.max_rows"),
    ],
)
def test_unknown_key_names_the_closest(wrong, right):
    text = refusal(f"{wrong}=3")
    assert repr(wrong) in text and right in text.split("closest: ")[1].split(", ")


def test_unknown_key_like_none_lists_the_sections():
    assert "distill" in refusal("qqqqqqqq=1")


def test_unknown_key_in_a_task_names_its_place():
    text = refusal({"tasks": [{"name": "topic"}, {"name": "mine", "lable": "y"}]})
    assert "'tasks.1.lable'" in text and "tasks.1.label" in text


@pytest.mark.parametrize(
    "override, key, found",
    [
        ("distill.epochs=x", "distill.epochs", "'x'"),
        ("distill.epochs=-1", "distill.epochs", "-1"),
        ("distill.epochs=0", "distill.epochs", "0"),
        ("distill.epochs=.inf", "distill.epochs", "inf"),
        ("distill.epochs=.nan", "distill.epochs", "nan"),
        ("distill.epochs=true", "distill.epochs", "True"),
        ("distill.warmup=1", "distill.warmup", "1"),
        ("corpus.heldout=1.5", "corpus.heldout", "1.5"),
        ("benchmark.probe_share=1.01", "benchmark.probe_share", "1.01"),
        ("language=[a]", "language", "['a']"),
        ("language=t", "language", "'t'"),
        ("language=12", "language", "12"),
        ("seed=1.5", "seed", "1.5"),
        ("seed=-1", "seed", "-1"),
        ("seed=99999999999999999999", "seed", "99999999999999999999"),
        ("seed=", "seed", "None"),
        ("seed=true", "seed", "True"),
        ("device=tpu", "device", "'tpu'"),
        ("student.layers=0", "student.layers", "0"),
        ("student.init=middle", "student.init", "'middle'"),
        ("'student.init=[1, x]'", "student.init.1", "'x'"),
        ("distill.windows=[0]", "distill.windows.0", "0"),
        ("distill.windows=[]", "distill.windows", "[]"),
        ("benchmark.seeds=[]", "benchmark.seeds", "[]"),
        ("benchmark.seeds=[-1]", "benchmark.seeds.0", "-1"),
        ("ablations.arms.x=[2]", "ablations.arms.x", "[2]"),
        ("student.preset=huge", "student.preset", "'huge'"),
        ("student.heads=0", "student.heads", "0"),
        ("condition.mask=1", "condition.mask", "1"),
        ("'distill.objectives={hidden: much}'", "distill.objectives.hidden", "'much'"),
        ("distill.compile=1", "distill.compile", "1"),
        ("distill.cache=maybe", "distill.cache", "'maybe'"),
        ("distill=3", "distill", "3"),
        ("corpus=x.txt", "corpus", "'x.txt'"),
        ("tasks=3", "tasks", "3"),
        ("tasks=[3]", "tasks.0", "3"),
        ("seed.x=1", "seed", "{'x': 1}"),
    ],
)
def test_wrong_value_names_key_and_value(override, key, found):
    text = refusal(override)
    assert f"{key}: " in text and text.endswith(f"got {found}")


def test_task_without_a_name():
    assert "tasks.0.name: is missing" in refusal({"tasks": [{}]})


def test_several_wrong_values_are_all_named():
    text = refusal("seed=x distill.epochs=y")
    assert "seed: " in text and "distill.epochs: " in text


@pytest.mark.parametrize("override", ["distill.epochs.x=1", "tasks.0.name=x", "name.a.b=1"])
def test_assigning_below_a_value(override):
    assert override.split("=")[0].rpartition(".")[0].split(".")[0] in refusal(override)


@pytest.mark.parametrize(
    "override", ["seed", "=3", "a b", "seed='", "seed=[", "seed={", "seed=!!python/name:os.system"]
)
def test_override_that_is_no_assignment(override):
    refusal(override)


@pytest.mark.parametrize("overrides", [3, None, [3], {3: 4}, {"": 1}, {"seed": object}])
def test_overrides_of_a_wrong_type(overrides):
    refusal(overrides)


@pytest.mark.parametrize("content", ["- 1\n", "3", "text", "true"])
def test_profile_that_is_no_mapping(profile_file, content):
    assert "mapping" in refusal(profile=profile_file(content))


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "seed: 1\n  x: 2",
        "{",
        "a: *b",
        "? [x]\n: 1",
        "<<: 3",
        "---\nseed: 1\n---\nseed: 2",
        "seed: \x00",
        "seed: 2024-13-45",
        "seed: " + "9" * 5000,
        "1: 2",
        "null: 2",
        b"\xff\xfes\x00",
        b"name: \xe9",
    ],
)
def test_profile_file_that_cannot_be_read(profile_file, content):
    refusal(profile=profile_file(content))


def test_bad_yaml_says_the_line(profile_file):
    assert "line 2" in refusal(profile=profile_file("name: a\nseed: {]\nlanguage: x\n"))


@pytest.mark.parametrize("name", ["nope", "", "smoke.txt", "no/such.yaml", "x\0.yaml", "."])
def test_profile_that_is_not_there(name):
    refusal(profile=name)


def test_profile_that_is_a_folder(tmp_path):
    (tmp_path / "a.yaml").mkdir()
    refusal(profile=tmp_path / "a.yaml")


def test_python_tags_are_refused(profile_file, tmp_path):
    target = tmp_path / "ran"
    refusal(profile=profile_file(f"seed: !!python/object/apply:os.mkdir ['{target}']"))
    assert not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("content", ["language: " + "[" * 5000, "{a: " * 3000 + "1" + "}" * 3000])
def test_deep_nesting(profile_file, content):
    refusal(profile=profile_file(content))


def bomb(first, wrap):
    lines = [f"  - &a0 {first}"] + [f"  - &a{i} {wrap(f'*a{i - 1}')}" for i in range(1, 30)]
    return "language:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "content",
    [
        bomb("[x]", lambda a: f"[{', '.join([a] * 9)}]"),
        bomb("{x: y}", lambda a: "{" + ", ".join(f"k{i}: {a}" for i in range(9)) + "}"),
        bomb("{x: y}", lambda a: f"{{<<: [{', '.join([a] * 9)}]}}"),
        "&x {seed: *x}",
        "&x {wrong: *x}",
        "seed: &x [*x]",
        "distill: &x\n  objectives: *x",
    ],
)
def test_aliases_are_not_multiplied_out(profile_file, content):
    assert len(refusal(profile=profile_file(content))) < 10_000  # multiplied out they would not fit in memory


# -- several languages


def test_one_language_is_the_whole_mixture():
    profile = load_profile("smoke", "language=ceb")
    assert profile.languages == ["ceb"] and profile.target == "ceb" and profile.shares == {"ceb": 1.0}


def test_the_target_has_seven_tenths_unless_weights_say_otherwise():
    several = {"language": ["tgl", "eng", "ceb"], "corpora": {"eng": {"source": "a.txt"}, "ceb": {"source": "b.txt"}}}
    assert load_profile("smoke", several).shares == pytest.approx({"tgl": 0.7, "eng": 0.15, "ceb": 0.15})
    weighted = load_profile("smoke", several | {"weights": {"tgl": 2.0, "eng": 1.0, "ceb": 1.0}})
    assert weighted.shares == {"tgl": 0.5, "eng": 0.25, "ceb": 0.25}


@pytest.mark.parametrize(
    "overrides, told",
    [
        ({"language": ["tgl", "eng"]}, "corpora should name eng"),
        ({"corpora": {"eng": {"source": "a.txt"}}}, "corpora should name no language"),
        ({"language": ["tgl", "tgl"]}, "language: should be an ISO 639 code, or a list of different ones"),
        (
            {"language": ["tgl", "eng"], "corpora": {"eng": {"source": "a.txt"}}, "weights": {"eng": 1.0}},
            "weights should name tgl, eng",
        ),
    ],
)
def test_every_language_has_a_corpus_and_a_weight(overrides, told):
    with pytest.raises(UserError, match=told):
        load_profile("smoke", overrides)
