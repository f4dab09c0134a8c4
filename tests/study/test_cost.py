"""What a study will take: arithmetic written out, and the sizes of what is made."""

from pathlib import Path

import pytest
import torch

from kdlib import config
from kdlib.errors import UserError
from kdlib.study.cost import Machine, Plan, Shape, measure, print_plan
from kdlib.study.plan import Graph
from kdlib.study.stage import Context
from kdlib.study.study import STAGES, Study

MACHINE = Machine(forward=1e9, training=1e9, step=0.01)


def plan_of(folder, given, **more):
    profile = config.load_profile("smoke", given(more))
    return Plan(Graph(profile, Context(folder, torch.device("cpu"), "fp32")), MACHINE)


def seconds(plan, stage, what=""):
    return sum(line.seconds for line in plan.lines() if line.stage == stage and line.what.startswith(what))


def test_operations_and_weights_are_those_of_a_bert_layer():
    shape, length = Shape(2, 16, 64, 100), 10
    layer = 8 * 16 * 16 + 4 * 16 * 64 + 4 * 16 * length  # four projections, two of the feed-forward part, attention
    assert shape.operations(50, length) == 50 * 2 * layer
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 64 + 13 * 16) + (100 + 516) * 16
    assert shape.gigabytes == pytest.approx(4e-9 * weights)


def test_every_stage_has_a_line_and_arms_are_counted(tmp_path, given):
    lines = plan_of(tmp_path, given).lines()
    assert list(dict.fromkeys(line.stage for line in lines)) == STAGES
    families = {line.what.split(":")[0]: line.what for line in lines if line.stage == "ablations" and line.what}
    assert families["fraction"] == "fraction: 2 arms x 1" and len(families) == 6


def test_twice_the_epochs_take_twice_the_training(tmp_path, given):
    one, two = (seconds(plan_of(tmp_path, given, **{"distill.epochs": e}), "distill", "student") for e in (1, 2))
    three = seconds(plan_of(tmp_path, given, **{"distill.epochs": 3}), "distill", "student")
    assert three - two == pytest.approx(two - one) and two > one  # the rest is the teacher's pass, once


def test_nothing_is_computed_and_no_weights_are_read(tmp_path, given, monkeypatch):
    monkeypatch.setattr("kdlib.study.plan.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    plan_of(tmp_path, given).lines()
    assert not (tmp_path / "artefacts").exists() and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_size_of_the_student_is_as_planned(tmp_path, given):
    planned = next(line for line in plan_of(tmp_path / "plan", given).lines() if line.what == "student").gigabytes
    study = Study(tmp_path / "run", "smoke", given())
    assert study.student
    made = sum(f.stat().st_size for f in (tmp_path / "run" / "student").resolve().glob("model.safetensors"))
    states = sum(f.stat().st_size for f in Path(study.context.cache).rglob("layer-*.f16"))
    assert planned == pytest.approx((made + states) / 1e9, rel=0.25)


def test_the_machine_is_measured():
    found = measure(Shape(2, 32, 64, 100), torch.device("cpu"), False, 8)
    assert found.forward > 0 and found.training > 0 and found.step >= 0


def test_the_plan_is_printed_with_sums(given, capsys):
    print_plan("smoke", given())
    printed = capsys.readouterr().out
    assert "plan of smoke" in printed and "6 arms" not in printed and "Measured now, on cpu" in printed
    assert all(stage in printed for stage in [*STAGES, "all"])


def test_a_wrong_parameter_is_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="epochs"):
        print_plan("smoke", ["distill.epochs=-1"])
