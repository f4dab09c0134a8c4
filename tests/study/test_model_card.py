"""The model card: front matter that parses, this run's numbers with their intervals, settings other libraries read."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml

from kdlib.config import load_profile
from kdlib.errors import UserError
from kdlib.files import write_json
from kdlib.models.safetensors_files import HEAD_FILE
from kdlib.models.sentence import SentenceVector, save_sentence
from kdlib.study.model_card import write_card
from kdlib.study.plan import card_facts
from kdlib.study.run import Run


@pytest.fixture
def make(tmp_path):
    def write(overrides=(), rows=()):
        run = Run(tmp_path / "run", load_profile("smoke", overrides))
        if rows:
            run.record("benchmark", list(rows))
        student = run.folder("student")
        (student / "config.json").write_text('{"hidden_size": 384}')
        write_card(student, card_facts(run.profile), run.path, run.results())
        return student

    return write


def card(folder):
    return (folder / "README.md").read_text("utf-8")


def front_matter(folder):
    _, head, body = card(folder).split("---\n", 2)
    return yaml.safe_load(head), body


def result(model="student", value=0.7654, **more):
    row = dict(
        model=model,
        task="topic",
        metric="accuracy",
        method="probe",
        value=value,
        low=value - 0.05,
        high=value + 0.05,
        n=504,
    )
    return row | more


@pytest.mark.parametrize("language", ["tgl", "no", "nan", "on"])
def test_front_matter_parses(make, language):
    head, body = front_matter(make(f"language={language}"))
    assert head["language"] == language and head["license"] == "mit"
    assert head["base_model"] == "intfloat/multilingual-e5-small" and head["library_name"] == "transformers"
    assert body.lstrip().startswith(f"# A small {language} encoder")


def test_without_results_it_says_so(make):
    text = card(make())
    assert "Not measured yet" in text and "| how |" not in text


def test_a_kept_head_is_told_of(make):
    student = make()
    assert "head" not in card(student)
    (student / HEAD_FILE).write_bytes(b"")
    assert HEAD_FILE in card(make())


def test_numbers_stand_with_their_intervals(make):
    rows = [
        result("teacher", 0.8),
        result("student", 0.75),
        result("student", 0.75, metric="macro_f1"),
        result("student", 0.6, method="finetune"),
        result("student", 0.7, task="average", metric="score", n=1000),
    ]
    lines = [line for line in card(make(rows=rows)).splitlines() if line.startswith("| ")]
    assert lines[2:] == [
        "| probe | topic | accuracy | 0.800 [0.750, 0.850] | 0.750 [0.700, 0.800] | 504 |",
        "| finetune | topic | accuracy |  | 0.600 [0.550, 0.650] | 504 |",
        "| probe | average | score |  | 0.700 [0.650, 0.750] | 1000 |",
    ]
    assert "95% bootstrap intervals" in card(make(rows=rows))


def test_what_is_kept_above_chance_is_in_the_card(make):
    kept = dict(task="with room", metric="retention", low=0.8, high=1.0)
    text = card(make(rows=[result("student", 0.75), result("student", 0.9, **kept)]))
    assert "the student keeps, averaged over tasks: 90% [80%, 100%] of the tasks with room." in text
    assert "above chance" not in card(make(rows=[result("student", 0.75)]))


def test_data_stand_with_source_commit_and_sizes(make, tmp_path):
    assert "No text was read yet." in card(make())
    corpus = {"source": "owner/texts", "revision": "a" * 40, "sha256": "b" * 64, "rows": {"train": 1200, "test": 30}}
    task = {"source": "embedded", "revision": None, "sha256": "c" * 64, "rows": {"train": 5}}
    write_json(tmp_path / "run" / "sources.json", {"corpus": corpus, "tasks": {"topic": task}})
    text = card(make())
    assert f"| corpus (documents) | owner/texts | {'a' * 12} | train 1,200, test 30 | {'b' * 12} |" in text
    assert f"| topic | embedded |  | train 5 | {'c' * 12} |" in text


def test_single_seeds_other_models_and_other_stages_are_left_out(make, tmp_path):
    rows = [result(value=0.11, seed=0), result("blank student", 0.22), result(value=0.33, method="layer probe")]
    folder = make(rows=rows)
    run = Run(tmp_path / "run")
    run.record("ablations", [result(value=0.44)])
    write_card(folder, card_facts(run.profile), run.path, run.results())
    assert "Not measured yet" in card(folder)


def test_written_again_after_the_benchmark(make):
    assert "Not measured yet" in card(make())
    text = card(make(rows=[result()]))
    assert "Not measured yet" not in text and "0.765 [0.715, 0.815]" in text


@pytest.mark.parametrize(
    "override, prefix", [((), "query: "), ({"teacher.prefix": ""}, ""), ({"teacher.prefix": "tanong: "}, "tanong: ")]
)
def test_prefix_goes_into_the_example(make, override, prefix):
    assert (f'"{prefix}" + text' in card(make(override))) == bool(prefix)


def test_the_way_to_a_vector_is_said_as_the_folder_has_it(make):
    folder = make()
    assert "mean pooling" in card(folder) and "vectors = (states * mask)" in card(folder)
    dense = torch.nn.Sequential(torch.nn.Linear(384, 8), torch.nn.Tanh())
    save_sentence(SentenceVector("cls", [dense], normalised=True), folder, 384, 128, "")
    text = card(make())
    assert "cls pooling, a dense layer of 8, length 1" in text and "states * mask" not in text


def test_example_of_the_card_runs(make, monkeypatch):
    folder = make(rows=[result()])
    encoder = tiny.encoder(layers=1)
    encoder.save(folder)
    code = card(folder).split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    assert names["vectors"].shape == (1, encoder.hidden)


def test_other_teacher_and_corpus_are_named(make):
    text = card(make({"teacher.source": "owner/teacher", "corpus.source": "mine.txt", "tasks": []}))
    assert "base_model: owner/teacher" in text and "over mine.txt" in text and "license: other" in text
    assert "CC0" not in text and '"query: "' not in text


def test_full_disk_keeps_the_older_card(make, monkeypatch):
    folder = make()
    before = card(folder)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(UserError, match="No space left"):
            write_card(folder, card_facts(Run(folder.parent).profile), folder.parent)
    assert card(folder) == before
