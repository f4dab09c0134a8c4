"""The benchmarks' own parts: rows of results, the plain loop, and what the numbers stand on. No peer is run here."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import encoder, texts
from torch.utils.flop_counter import FlopCounterMode

from kdlib import config
from kdlib.batching import BudgetSampler
from kdlib.distillation.student_init import build_student
from kdlib.distillation.tokenized_corpus import TokenizedCorpus
from kdlib.models.encoder import Encoder
from kdlib.pruning.model import prune_model
from kdlib.pruning.tokenizer import prune_tokenizer

sys.path.append(str(Path(__file__).parents[2]))  # the benchmarks are no part of the package

from benchmarks import __main__ as every
from benchmarks import batches, brewer, cache, common, distillation, reference, step

FIELDS = {"claim", "ours", "other", "ratio", "goal", "met", "unit", "note", "rounds", "versions"}


class TinyStudy:
    """What the benchmarks ask of a study, with a tiny teacher."""

    def __init__(self, folder, teacher):
        self.teacher, self.run = teacher, SimpleNamespace(path=folder)
        self.profile = config.load_profile("workshop", {"student.layers": 2, "distill.batch_tokens": 256})
        ids = sorted({i for e in teacher.tokenize(texts(200)) for i in e.ids} | set(teacher.tokenizer.all_special_ids))
        self.selection = SimpleNamespace(ids=ids)
        model = prune_model(teacher.model, teacher.tokenizer, ids)
        self.source = Encoder(model, prune_tokenizer(teacher.tokenizer, ids), "pruned", max_length=32)

    def undistilled(self):
        return SimpleNamespace(model=build_student(self.source.model, self.profile.student))


@pytest.fixture
def job(teacher, tmp_path, monkeypatch):
    """The benchmarks' job, tiny; they take it for the workshop's, and rows of 32 tokens for the plain loop's."""
    study = TinyStudy(tmp_path, teacher)
    made = common.Job(study, texts(160), study.profile.distill)
    for module in (batches, brewer, cache, distillation, step):
        monkeypatch.setattr(module, "workshop", lambda count, lengths=None: made)
    for module in (batches, reference, distillation):
        monkeypatch.setattr(module, "LENGTH", 32)
    for module in (brewer, cache):
        monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(step, "PROFILE", tmp_path / "profile.txt")
    monkeypatch.setattr(step, "SIZES", (64,))
    return made


@pytest.fixture(scope="module")
def teacher():
    return encoder(layers=4)


def student_of(teacher):
    return build_student(teacher.model, config.Student(layers=2))


def test_a_row_says_how_many_times_better_and_whether_the_goal_is_met():
    rates = common.row("speed", [30, 10, 20], [5, 4, 6], "texts/s", at_least=4)
    assert set(rates) == FIELDS
    assert (rates["ours"], rates["other"], rates["ratio"], rates["goal"], rates["met"]) == (20, 5, 4, ">= 4", True)
    assert rates["rounds"]["ours"] == [30, 10, 20]
    costs = common.row("time", 2, 10, "s", lower=True, at_least=10)
    assert (costs["ratio"], costs["met"]) == (5, False)
    assert common.row("difference", 1e-6, at_most=1e-4)["met"] is True
    assert common.row("size", 3.0)["met"] is None
    assert common.row("right results", 1.0, 0.0)["ratio"] is None
    undefined = common.row("time", 0.0, 2.0, lower=True, at_most=1)  # not judged by ours, which the goal is not for
    assert (undefined["ratio"], undefined["met"]) == (None, False)


def test_rows_are_kept_beside_those_of_other_benchmarks(tmp_path):
    def rows(name, claim):
        return [{"benchmark": name, **common.row(claim, 1.0)}]

    target = tmp_path / "results.json"
    every.keep(rows("step", "a"), target, ())
    every.keep(rows("pruning", "b"), target, ())
    kept = every.keep(rows("step", "c"), target, ())
    assert [row["claim"] for row in kept] == ["b", "c"] and json.loads(target.read_text()) == kept


def test_a_peer_that_cannot_be_run_meets_nothing():
    found = common.row("speed", 20, unit="texts/s", at_least=1, missing=common.PeerMissing("no such wheel"))
    assert (found["met"], found["other"], found["note"]) == (False, None, "no such wheel")
    assert common.row("speed", None, at_least=1, missing="gone")["met"] is False


def test_versions_name_the_peer_as_it_is_pinned():
    found = common.row("speed", 1, 1, peers=["vocabtrimmer"])["versions"]
    assert found["vocabtrimmer"] == "0.0.2" and found["torch"] == torch.__version__ and found["machine"]


def test_results_are_written_as_json_and_as_a_table_in_the_pages(tmp_path):
    rows = [common.row("speed", [2, 3], 1, "texts/s", at_least=4, note="of short texts"), common.row("size", 1234.0)]
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text(f"before\n{common.MARKS[0]}\nan old table\n{common.MARKS[1]}\nafter\n")
    other.write_text("no table wanted")
    for _ in range(2):
        common.write_results(rows, tmp_path / "results.json", [page, other])
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == rows
    table = page.read_text("utf-8")
    assert table.startswith("before\n") and table.endswith("\nafter\n") and "an old table" not in table
    assert other.read_text() == "no table wanted"
    assert "| speed | 2.5 | 1 | texts/s | 2.5 | >= 4 | **no** |" in table
    assert "1,234" in table and "of short texts" in table and f"torch {torch.__version__}" in table


def test_in_turns_lets_nobody_go_twice_in_a_row():
    order = []
    found = common.in_turns({"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}, 2)
    assert order == ["a", "b", "a", "b"] and found == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_a_peer_script_that_fails_is_named_with_its_reason(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text("import json, sys\nprint('noise')\nprint(json.dumps({'argument': sys.argv[1]}))")
    assert common.run_peer(sys.executable, script, "x") == {"argument": "x"}
    script.write_text("raise ValueError('no such model')")
    with pytest.raises(common.PeerMissing, match="no such model"):
        common.run_peer(sys.executable, script, "x")


def test_the_plain_loop_has_the_kits_loss_where_nothing_is_padded(teacher):
    student = student_of(teacher)
    loop = reference.Loop(teacher.model, student_of(teacher))
    loop.teacher.eval()
    loop.student.eval()
    ids = torch.randint(5, len(teacher.tokenizer), (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        theirs = loop.loss(ids, mask)
        ours = distillation.kit_loss(teacher.model, student.eval(), loop.fit_dense, ids, mask)
    assert float(theirs) > 0.01
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_the_plain_loop_learns_and_leaves_the_teacher_alone(teacher):
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    torch.manual_seed(0)
    loop = reference.Loop(teacher.model, student_of(teacher))
    loop.optimizer.param_groups[0]["lr"] = 1e-3
    rows = [encoding.ids for encoding in teacher.tokenize(texts(40))]
    short = ((ids[:, :16], mask[:, :16]) for ids, mask in reference.batches(rows, 0))
    losses = [loop.step(*next(short)) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert loop.teacher.training and all(torch.equal(v, before[n]) for n, v in teacher.model.state_dict().items())


def test_the_plain_loops_batches_are_full_and_of_one_shape():
    rows = [[7] * length for length in (3, 200, *[5] * 62)]
    feed = reference.batches(rows, 1)
    seen = [next(feed) for _ in range(2)]
    assert all(ids.shape == mask.shape == (32, 128) for ids, mask in seen)
    assert sum(int(mask.sum()) for _, mask in seen) == 3 + 128 + 62 * 5
    assert all(bool((ids[mask == 0] == 1).all()) for ids, mask in seen)


def test_operations_are_counted_as_torch_counts_them(teacher):
    model, ids = encoder(layers=3, attn="eager").model, torch.full((1, 20), 7)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    pooler = 2 * model.config.hidden_size**2
    assert counted.get_total_flops() - pooler == step.forward_flops(model.config, 3, 20)


def by_claim(rows, words):
    return next(row for row in rows if words in row["claim"])


def test_rate_is_that_of_the_steps_between_the_first_and_the_last(job, monkeypatch):
    batches_ = [len(batch) for batch in BudgetSampler(job.train.lengths, job.spec.batch_tokens)]
    clock = iter(range(0, 1000, 2))  # two seconds a step
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))

    def steps(*_, should_stop):
        next(clock)  # what the first step takes
        for _ in batches_[:-1]:
            should_stop()

    monkeypatch.setattr(common, "distill", steps)
    assert job.rate(job.train) == sum(batches_[1:-1]) / (2 * (len(batches_) - 2))
    monkeypatch.setattr(common, "distill", lambda *_, should_stop: [should_stop() for _ in batches_])
    with pytest.raises(RuntimeError, match="steps were timed"):
        job.rate(job.train)


def test_rate_asks_the_kit_for_the_batches_it_counts(job, monkeypatch):
    seen = []
    collate = TokenizedCorpus.collate
    monkeypatch.setattr(
        TokenizedCorpus, "collate", lambda texts, batch: seen.append(list(batch)) or collate(texts, batch)
    )
    assert job.rate(job.train) > 0
    planned = list(BudgetSampler(job.train.lengths, job.spec.batch_tokens))
    assert [batch for batch in seen if batch in planned] == planned


@pytest.mark.slow
def test_the_distillation_benchmark_compares_the_same_loss(job):
    rows = distillation.measure(quick=True)
    assert all(row["ours"] > 0 and row["other"] > 0 for row in rows[:5])
    assert by_claim(rows, "the same loss")["met"] is True


def test_the_cache_benchmark_sees_that_nothing_changes(job, tmp_path):
    rows = cache.measure(quick=True)
    assert by_claim(rows, "relative difference")["met"] is True
    width, layers = job.study.source.hidden, 2
    assert by_claim(rows, "size of the cache")["ours"] == pytest.approx(2 * width * layers)
    assert not (tmp_path / "fresh cache").exists()


@pytest.mark.slow
def test_the_step_benchmark_says_where_the_time_goes(job, tmp_path):
    rows = step.measure(quick=True)
    assert all(0 < row["ratio"] and row["unit"] == "GFLOP/s" for row in rows)
    assert "addmm" in (tmp_path / "profile.txt").read_text("utf-8")


def test_the_batches_benchmark_counts_padding(job):
    ours, random, fixed = batches.measure(quick=True)
    assert 0 < fixed["other"] < random["other"] < ours["ours"] <= 1


def test_without_its_peer_a_claim_is_named_and_not_met(job, monkeypatch):
    def gone(name):
        raise common.PeerMissing(f"{name} could not be installed: no such wheel")

    monkeypatch.setattr(brewer, "peer", gone)
    rows = brewer.measure(quick=True)
    assert [row["met"] for row in rows] == [False, False] and "no such wheel" in rows[0]["note"]


def test_every_benchmark_can_be_run_by_name():
    import importlib

    for name in every.NAMES:
        assert callable(importlib.import_module(f"benchmarks.{name}").measure)
