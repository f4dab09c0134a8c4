"""The benchmark: rows of trials, trials that are kept and found again, few-shot draws, statistics from end to end."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
from tiny import SPEC, task
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, RobertaTokenizer

from kdlib.data.tasks import Split, Task
from kdlib.evaluation import benchmark
from kdlib.evaluation.benchmark import (
    Trial,
    fewshot_sizes,
    load_metrics,
    run_trials,
    save_metrics,
    trial_rows,
    trial_settings,
)
from kdlib.evaluation.metrics import Metric
from kdlib.evaluation.paired_tests import paired_rows, verdicts

QUICK = SPEC.model_copy(update=dict(seeds=[0, 1], finetune_epochs=1.0, fewshot=[2, 5], fewshot_steps=3))


def encoders(**more):
    return {"teacher": tiny.encoder(layers=2), "student": tiny.encoder(layers=1, seed=1)} | more


def items_of(trials):
    return [(t.model, t.task, t.method, t.x, t.seed, [(m.name, m.items.tolist()) for m in t.metrics]) for t in trials]


@pytest.fixture(scope="module")
def probes():
    return run_trials(encoders(), [task("classify"), task("tokens")], SPEC, "probe")


def test_there_is_a_trial_for_every_encoder_task_and_seed(probes):
    seen = [(t.model, t.task, t.seed) for t in probes]
    tasks = ("classify task", "tokens task")
    assert seen == [(m, t, s) for m in ("teacher", "student") for t in tasks for s in (0, 1, 2)]
    assert {(t.method, t.x) for t in probes} == {("probe", None)}


def test_rows_are_the_scores_per_seed_their_means_and_an_average(probes):
    table = pd.DataFrame(trial_rows(probes, SPEC)).query("model == 'teacher'")
    summary = table[table["seed"].isna() & (table["task"] != "average")]
    assert set(table["task"]) == {"classify task", "tokens task", "average"} and "x" not in table
    for (name, metric), part in table[table["seed"].notna()].groupby(["task", "metric"]):
        mean = summary[(summary["task"] == name) & (summary["metric"] == metric)].iloc[0]
        assert mean["value"] == pytest.approx(part["value"].mean()) and list(part["seed"]) == [0, 1, 2]
        assert mean["low"] <= mean["value"] + 1e-9 and mean["value"] <= mean["high"] + 1e-9
    average = table[table["task"] == "average"].iloc[0]
    first = summary.query(
        "(task == 'classify task' and metric == 'accuracy') or (task == 'tokens task' and metric == 'f1')"
    )
    assert average["value"] == pytest.approx(first["value"].mean()) and average["n"] == 80
    tokens = [t.metrics for t in probes if (t.model, t.task) == ("student", "tokens task")]
    alone = [t.metrics for t in run_trials({"student": encoders()["student"]}, [task("tokens")], SPEC, "probe")]
    assert [[m.items.tolist() for m in run] for run in alone] == [[m.items.tolist() for m in run] for run in tokens]


FAMILIES = {
    "bert": dict(type_vocab_size=2),
    "xlm-roberta": dict(type_vocab_size=1, max_position_embeddings=66),
    "roberta": dict(type_vocab_size=1, max_position_embeddings=66),
    "distilbert": dict(hidden_dim=64),
    "deberta-v2": dict(type_vocab_size=0, relative_attention=True, position_biased_input=False, pos_att_type=["c2p"]),
}


def byte_level():
    """A byte-level BPE tokenizer, as RoBERTa has one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f" {text}" for text in tiny.texts(300)], trainer)
    spec = json.loads(backend.to_str())["model"]
    return RobertaTokenizer(vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]])


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_of_every_family_run_in_the_same_way(family):
    base = tiny.encoder(layers=1)
    if family == "roberta":
        base.tokenizer = byte_level()
    base.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    config = AutoConfig.for_model(
        family, vocab_size=len(base.tokenizer), pad_token_id=base.tokenizer.pad_token_id, **sizes | FAMILIES[family]
    )
    encoder = replace(base, model=AutoModel.from_config(config).eval())
    assert encoder.token_types == (family == "bert")
    spec = QUICK.model_copy(update=dict(seeds=[0], fewshot=[4], finetune_max_length=500))
    tasks = [task("pair"), task("tokens")]
    for method in ("probe", "finetune", "fewshot"):
        trials = run_trials({family: encoder}, tasks, spec, method)
        assert [t.task for t in trials] == ["pair task", "tokens task"]
        assert all(0 <= metric.value <= 1 and len(metric.items) == 40 for t in trials for metric in t.metrics)


def test_a_size_that_some_tasks_lack_has_no_average():
    right = [Metric("accuracy", np.ones((5, 2)))]
    trials = [Trial("m", t, "fewshot", s, right, x) for t, x in (("a", 2), ("b", 2), ("a", 9)) for s in (0, 1)]
    table = pd.DataFrame(trial_rows(trials, QUICK))
    assert table[table["task"] == "average"]["x"].tolist() == [2] and set(table[table["task"] == "a"]["x"]) == {2, 9}


# -- few examples


@pytest.mark.parametrize("kind", ["classify", "pair", "multilabel", "tokens"])
@pytest.mark.parametrize("count", [1, 4, 1000])
def test_few_examples_are_drawn_of_every_class(kind, count):
    whole = task(kind)
    few, again, other = (whole.few(count, 20, seed) for seed in (3, 3, 4))
    has, could = (Counter(c for t in split.targets for c in whole.classes(t)) for split in (few.train, whole.train))
    assert all(min(count, could[name]) <= has[name] <= could[name] for name in could) and len(could) >= 2
    if kind in ("classify", "pair"):
        assert has == {name: min(count, could[name]) for name in could}
    assert few == again and len(few.test) == 20 and few.test == other.test
    assert few.train != other.train
    known = dict(zip(map(repr, whole.train.texts), whole.train.targets))
    assert all(known[repr(text)] == target for text, target in zip(few.train.texts, few.train.targets))
    if count == 1000:
        assert sorted(map(repr, few.train.texts)) == sorted(map(repr, whole.train.texts))
    more = whole.few(count + 3, 20, 3).train.texts
    assert {repr(text) for text in few.train.texts} <= {repr(text) for text in more}


def test_a_row_is_an_example_of_its_classes():
    split = Split([], [])
    assert Task("t", "classify", ["x", "y"], split, split).classes(1) == {"y"}
    many = Task("t", "multilabel", ["x", "y", "z"], split, split)
    assert many.classes([1, 0, 1]) == {"x", "z"} and many.classes([0, 0, 0]) == {"none"}
    tags = Task("t", "tokens", ["O", "B-PER", "I-PER", "B-LOC"], split, split)
    assert tags.classes([0, 1, 2, 3]) == {"PER", "LOC"} and tags.classes([0, 0]) == {"none"}


def test_fewshot_sizes_end_with_all_rows():
    rare = Split(list("abcdefgh"), [0, 0, 0, 0, 0, 1, 1, 1])
    uneven = Task("t", "classify", ["x", "y"], rare, rare)

    def of(*wanted):
        return fewshot_sizes(uneven, SPEC.model_copy(update=dict(fewshot=list(wanted))))

    assert of(2, 4, 64, 256) == [2, 4, 5] and of(64) == [5] and of(4, 2) == [2, 4] and of() == []


def test_few_shot_trials_train_for_enough_steps_and_record_their_size(monkeypatch):
    steps = []
    finetune = benchmark.finetune
    monkeypatch.setattr(benchmark, "finetune", lambda *a: steps.append((len(a[1].train), a[3], a[5])) or finetune(*a))
    trials = run_trials({"student": tiny.encoder(layers=1)}, [task("classify")], QUICK, "fewshot")
    assert [(t.x, t.seed) for t in trials] == [(2, 0), (2, 1), (5, 0), (5, 1)]
    assert steps == [(4, 0, 3), (4, 1, 3), (10, 0, 3), (10, 1, 3)]
    table = pd.DataFrame(trial_rows(trials, QUICK))
    assert set(table["method"]) == {"fewshot"} and set(table["n"]) == {40}
    means = table[table["seed"].isna()]
    assert list(zip(means["task"], means["metric"], means["x"])) == [
        (name, metric, x)
        for x in (2, 5)
        for name, metric in (("classify task", "accuracy"), ("classify task", "macro_f1"), ("average", "score"))
    ]


def test_without_sizes_there_are_no_few_shot_trials():
    assert run_trials(encoders(), [task("classify")], SPEC, "fewshot") == [] == trial_rows([], SPEC)


# -- kept trials


@pytest.mark.slow
@pytest.mark.parametrize("method, kept", [("probe", 8), ("finetune", 4), ("fewshot", 4)])
def test_finished_trials_are_not_run_again_and_their_encoders_are_not_loaded(tmp_path, method, kept):
    tasks = [task("classify"), task("multilabel")] if method == "probe" else [task("multilabel")]
    spec = QUICK.model_copy(update=dict(seeds=[0] if method == "fewshot" else [0, 1]))
    made = []

    def lazily(name, encoder):
        return lambda: made.append(name) or encoder

    given = {name: lazily(name, encoder) for name, encoder in encoders().items()}
    keys = {"teacher": "t1", "student": "s1"}
    first = run_trials(given, tasks, spec, method, tmp_path, keys)
    assert made == ["teacher", "student"] and len(list(tmp_path.iterdir())) == kept
    again = run_trials(given, tasks, spec, method, tmp_path, keys)
    assert made == ["teacher", "student"] and items_of(again) == items_of(first)
    assert trial_rows(again, spec) == trial_rows(first, spec)
    assert items_of(run_trials(encoders(), tasks, spec, method)) == items_of(first)  # and without a folder


def test_trials_run_again_when_something_that_they_depend_on_changes(tmp_path, monkeypatch):
    calls = []
    attempt = [Metric("accuracy", np.ones((4, 2)))]
    monkeypatch.setitem(benchmark.METHODS, "finetune", lambda *a: lambda seed, *more: calls.append(seed) or attempt)
    one = task("classify")

    def count(spec=QUICK, task=one, key="k", name="m"):
        calls.clear()
        run_trials({name: tiny.encoder(layers=1)}, [task], spec, "finetune", tmp_path, {name: key})
        return len(calls)

    assert count() == 2 and count() == 0
    assert count(key="other") == 2
    assert count(name="other name") == 0  # names are for people
    assert count(QUICK.model_copy(update=dict(finetune_rate=1e-3))) == 2
    assert count(QUICK.model_copy(update=dict(finetune_max_length=16))) == 2
    assert count(QUICK.model_copy(update=dict(bootstrap=333, margin=0.5, latency_runs=9, probe_share=0.5))) == 0
    assert count(QUICK.model_copy(update=dict(seeds=[0, 1, 2]))) == 1
    relabelled = Split(one.test.texts, one.test.targets[::-1])
    assert count(task=Task(one.name, one.kind, one.labels, one.train, relabelled)) == 2
    assert count(task=Task("renamed", one.kind, one.labels, one.train, one.test)) == 0


def test_a_trial_depends_on_every_setting_that_is_not_listed_as_unread():
    tuning = {"test_rows", "head", "epochs", "rate", "batch", "max_length", "fp16"}
    shared = {f"finetune_{name}" for name in tuning} | {"freeze_embeddings"}
    assert trial_settings(SPEC, "probe").keys() == {"probe_share", "probe_rows", "probe_test_rows"}
    assert trial_settings(SPEC, "finetune").keys() == shared | {"finetune_rows"}
    assert trial_settings(SPEC, "fewshot").keys() == shared | {"fewshot_steps"}
    unread = {"seeds", "fewshot", "margin", "latency_runs", "bootstrap"}  # seeds and sizes are in the key themselves
    read = {name for method in benchmark.METHODS for name in trial_settings(SPEC, method)}
    assert read == set(type(SPEC).model_fields) - unread

    class Later(type(SPEC)):
        new: int = 0

    assert all("new" in trial_settings(Later(), method) for method in benchmark.METHODS)


@pytest.mark.slow
def test_a_killed_run_resumes_after_its_last_trial(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
import os, signal, tiny
from tiny import task
from evaluation.test_benchmark import QUICK
from kdlib.evaluation import benchmark
from pathlib import Path
finetune, done = benchmark.finetune, []
def stops(*a):
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(a)
    return finetune(*a)
benchmark.finetune = stops
tasks, student = [task("classify"), task("pair")], {{"student": tiny.encoder(layers=1)}}
benchmark.run_trials(student, tasks, QUICK, "finetune", Path({str(tmp_path)!r}), {{"student": "k"}})
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")}
    assert len(kept) == 3
    student, tasks = {"student": tiny.encoder(layers=1)}, [task("classify"), task("pair")]
    trials = run_trials(student, tasks, QUICK, "finetune", tmp_path, {"student": "k"})
    assert items_of(trials) == items_of(run_trials(student, tasks, QUICK, "finetune"))
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())


def test_saved_metrics_are_loaded_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    metrics = [Metric("macro_f1", rng.integers(0, 9, (30, 6)).astype(float)), Metric("accuracy", np.ones((30, 2)))]
    save_metrics(tmp_path / "a.npz", metrics, dict(model="ñ/ \\"))
    found = load_metrics(tmp_path / "a.npz")
    assert [m.name for m in found] == ["macro_f1", "accuracy"]
    for was, now in zip(metrics, found):
        assert now.items.dtype == float and np.array_equal(was.items, now.items) and was.value == now.value
    assert json.loads(str(np.load(tmp_path / "a.npz")["about"])) == {"model": "ñ/ \\"}


def test_a_damaged_file_is_ignored_or_read_unchanged(tmp_path):
    metrics = [Metric("f1", np.arange(30.0).reshape(10, 3)), Metric("accuracy", np.ones((10, 2)))]
    whole = tmp_path / "whole.npz"
    save_metrics(whole, metrics, {})
    content, broken = whole.read_bytes(), tmp_path / "broken.npz"
    rng = np.random.default_rng(0)
    damaged = [content[:cut] for cut in range(0, len(content), 37)] + [b"rubbish", b"\x80\x04N."]
    for _ in range(150):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    lost = 0
    for bad in damaged:
        broken.write_bytes(bad)
        found = load_metrics(broken)
        lost += found is None
        if found is not None:  # a bit that says nothing, such as a date
            assert [(m.name, m.items.tolist()) for m in found] == [(m.name, m.items.tolist()) for m in metrics]
    assert lost > len(damaged) / 2 and load_metrics(tmp_path / "absent.npz") is None


# -- with the tests


def test_trials_lead_to_verdicts():
    twins = encoders(twin=tiny.encoder(layers=2))
    spec = SPEC.model_copy(update=dict(margin=0.2))
    trials = run_trials(twins, [task("classify"), task("tokens")], spec, "probe")
    lines = verdicts(pd.DataFrame(paired_rows(trials, [("twin", "teacher"), ("student", "teacher")], spec)), 0.2)
    assert list(lines["verdict"][lines["model"] == "twin"]) == ["on par (within 0.2)"] * 3
    assert (lines["difference"][lines["model"] == "twin"] == 0).all()
