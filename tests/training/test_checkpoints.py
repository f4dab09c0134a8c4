"""Checkpoints: when they are written, which are kept, and what becomes of one that is torn."""

import errno
import logging
import os

import evaluation.test_finetuning as test_finetune
import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from kdlib import files
from kdlib.errors import UserError
from kdlib.evaluation.finetuning import finetune
from kdlib.training import checkpoints
from kdlib.training.checkpoints import Checkpoints, newest, train

STEPS = 12


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.noise = nn.Linear(4, 1), nn.Dropout(0.5)  # the noise goes by the checkpointed random numbers

    def forward(self, x):
        return {"loss": self.linear(self.noise(x)).square().mean()}


def trainer(work, steps=STEPS, every=1, **more):
    torch.manual_seed(0)
    rows = [{"x": row} for row in torch.randn(40, 4)]
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=5, learning_rate=0.1, use_cpu=True,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, label_names=[], seed=1,
        data_seed=1,
    )  # fmt: skip
    return Trainer(model=Line(), args=arguments, train_dataset=rows, callbacks=[Checkpoints(every, **more)])


def weights(found):
    return torch.cat([value.flatten() for value in found.model.state_dict().values()])


def names(work):
    return sorted(path.name for path in work.iterdir())


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


@pytest.fixture
def work(tmp_path, often):
    """A finished training with checkpoints after steps 8 and 12."""
    train(trainer(tmp_path / "work", every=4), None)
    return tmp_path / "work"


def test_the_last_two_are_kept_and_the_newest_is_taken_up(work):
    assert names(work) == ["checkpoint-12", "checkpoint-8"]
    assert newest(work) == work / "checkpoint-12"
    assert newest(work / "nothing") is None


def damage(folder, how):
    file = folder / "model.safetensors"
    if how == "torn":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "corrupted":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif how == "cannot be read":
        file.unlink()
    else:
        (folder / files.SEAL).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torn", "corrupted", "cannot be read", "unfinished"])
def test_a_damaged_one_is_named_and_the_one_before_it_goes_on_to_the_same_weights(work, how, caplog):
    whole = trainer(work.parent / "whole")
    train(whole, None)
    damage(work / "checkpoint-12", how)
    with caplog.at_level(logging.WARNING):
        last = newest(work)
    assert last == work / "checkpoint-8" and names(work) == ["checkpoint-8"]
    assert len(caplog.messages) == 1 and "checkpoint-12" in caplog.messages[0] and how in caplog.messages[0]
    again = trainer(work)
    torch.manual_seed(77)  # a new process has other random numbers
    train(again, last)
    assert torch.equal(weights(whole), weights(again))


def test_where_all_are_damaged_training_starts_anew(work, caplog):
    for name in ("checkpoint-8", "checkpoint-12"):
        damage(work / name, "corrupted")
    assert newest(work) is None and names(work) == [] and len(caplog.messages) == 2


def test_what_is_no_checkpoint_is_left_alone(work):
    (work / "checkpoint-best").mkdir()
    assert newest(work).name == "checkpoint-12" and (work / "checkpoint-best").is_dir()


def test_a_finished_training_is_not_trained_on(work):
    """Eight batches an epoch: the Trainer would take up the second epoch where it was cut off."""
    first, again = trainer(work, every=4), trainer(work, every=4)
    train(first, work / "checkpoint-12")
    again.training_step = None
    train(again, newest(work))
    assert torch.equal(weights(first), weights(again)) and again.state.global_step == STEPS


def test_written_by_the_clock_and_seldom_where_that_takes_long(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoints, "seal", lambda folder: clock.__setitem__(0, clock[0] + 2.0))  # 2 s of writing
    steps = []

    class Slow(Checkpoints):
        def on_step_end(self, args, state, control, **kwargs):
            clock[0] += 10.0  # a step takes 10 s
            super().on_step_end(args, state, control, **kwargs)
            if control.should_save:
                steps.append(state.global_step)

    found = trainer(tmp_path, steps=40)
    found.remove_callback(Checkpoints)
    found.add_callback(Slow(at_end=False))
    train(found, None)
    assert steps == [6, 16, 26, 36]  # after a minute; then every 100 s, as 2 s are 2% of it


def test_a_short_training_leaves_one_at_its_end_unless_nobody_wants_it(tmp_path):
    train(trainer(tmp_path / "a"), None)
    train(trainer(tmp_path / "b", at_end=False), None)
    assert names(tmp_path / "a") == [f"checkpoint-{STEPS}"]
    assert not (tmp_path / "b").exists() or not names(tmp_path / "b")


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0: file write"),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", FULL, ids=["OSError", "torch"])
def test_a_full_disk_is_told_and_costs_no_checkpoint(tmp_path, often, monkeypatch, error):
    whole = trainer(tmp_path / "whole")
    train(whole, None)
    work, save, left = tmp_path / "work", torch.save, [1] * 14

    def full(*arguments):
        if not left:
            raise error
        left.pop()
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="work: a checkpoint could not be read or written"):
            train(trainer(work), None)
    assert len(names(work)) == 2  # the half-written one is gone: its room is needed
    again = trainer(work)
    train(again, newest(work))
    assert torch.equal(weights(whole), weights(again))


def test_an_error_of_the_training_itself_is_not_taken_for_a_full_disk(tmp_path):
    found = trainer(tmp_path)
    found.model.linear = nn.Linear(3, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        train(found, None)


@pytest.mark.slow
def test_fine_tuning_goes_on_to_the_same_predictions(tmp_path, often, monkeypatch):
    encoder, task = tiny.encoder(layers=1), test_finetune.task("classify")
    spec = test_finetune.SPEC.model_copy(update=dict(finetune_epochs=2.0))
    expected = finetune(encoder, task, spec, seed=3)[0].items
    found = []
    step_end = Checkpoints.on_step_end

    def stopping(self, args, state, control, **kwargs):
        found.append(state.global_step)
        if state.global_step == 6:
            raise KeyboardInterrupt
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "on_step_end", stopping)
        finetune(encoder, task, spec, seed=3, work=tmp_path / "work")
    assert names(tmp_path / "work") == ["checkpoint-4", "checkpoint-5"]
    np.testing.assert_array_equal(finetune(encoder, task, spec, seed=3, work=tmp_path / "work")[0].items, expected)


def test_a_full_gpu_is_one_line_that_says_what_to_change(work):
    class Full(Line):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    broken = trainer(work)
    broken.model = broken.model_wrapped = Full()
    with pytest.raises(UserError, match=r"memory of the GPU is full; .* half of distill.batch_tokens") as error:
        train(broken, None)
    assert "\n" not in str(error.value)
