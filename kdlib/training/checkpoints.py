"""Checkpoints that survive a kill at any moment.

The Trainer writes a checkpoint file by file, and resumes from the newest even if it is incomplete. Here a checkpoint
is valid once its checksums are written (`files.seal`). The last two are kept; damaged ones are skipped.
"""

import logging
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from kdlib.errors import UserError
from kdlib.files import flaw, seal

log = logging.getLogger(__name__)
SECONDS = 60.0  # seconds of training between two checkpoints, at least
SHARE = 0.02  # share of the time for writing checkpoints: large models are saved less often
KEPT = 2


class Checkpoints(TrainerCallback):
    """Writes a checkpoint every SECONDS, seals it, and keeps the last KEPT. For a Trainer with save_strategy "no".

    Args:
        every: only at multiples of this step, such as those of the curve, so that no running sum is lost.
        at_end: also after the last step.
    """

    def __init__(self, every: int = 1, at_end: bool = True):
        self.every, self.at_end, self.wait = every, at_end, SECONDS

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint when one is due."""
        self.begun = time.monotonic()
        due = state.global_step % self.every == 0 and _agreed(self.begun - self.saved >= self.wait)
        if due or (self.at_end and state.global_step == state.max_steps):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Seal the checkpoint and remove old ones."""
        if distributed.is_initialized():
            distributed.barrier()  # each process writes a part
        if state.is_world_process_zero:
            work = Path(args.output_dir)
            seal(work / f"checkpoint-{state.global_step}")
            for old in _found(work)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self.saved = time.monotonic()
        self.wait = max(SECONDS, (self.saved - self.begun) / SHARE)


def _agreed(due: bool) -> bool:
    """The first process's answer, in all processes: their clocks differ."""
    answer = [due]
    if distributed.is_initialized():
        distributed.broadcast_object_list(answer)
    return answer[0]


def _found(work: str | Path) -> list[Path]:
    """The checkpoints under `work`, oldest first."""
    steps = {folder: folder.name.split("-")[-1] for folder in Path(work).glob("checkpoint-*")}
    return sorted((folder for folder in steps if steps[folder].isdigit()), key=lambda folder: int(steps[folder]))


def newest(work: str | Path) -> Path | None:
    """The newest whole checkpoint in `work`. Damaged ones are named in a warning and removed."""
    for folder in reversed(_found(work)):
        wrong = flaw(folder)
        if not wrong:
            return folder
        log.warning("%s: %s; resuming from the one before", folder, wrong)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def train(trainer: Trainer, last: Path | None) -> list[dict]:
    """Train, from the checkpoint `last` if there is one.

    Returns:
        The points of the curve: those entries of the Trainer's log that name a split.

    Raises:
        UserError: where a checkpoint cannot be written; the earlier one is kept.
    """
    work = Path(trainer.args.output_dir)
    try:
        state = last and TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        if last and state and state.global_step >= trainer.args.max_steps:  # the Trainer would do one more step
            load_model(trainer.model, str(last / SAFE_WEIGHTS_NAME))
            trainer.state = state
        else:
            trainer.train(resume_from_checkpoint=last and str(last))
    except torch.OutOfMemoryError:  # before RuntimeError, of which it is one
        _remove_unsealed(work)
        raise UserError(
            "the memory of the GPU is full; give it smaller batches, such as half of distill.batch_tokens, "
            "condition.batch_tokens or benchmark.finetune_batch"
        ) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        writing = any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos"))
        if isinstance(error, RuntimeError) and not writing:
            raise
        _remove_unsealed(work)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{work}: a checkpoint could not be read or written ({reason})") from error
    except UserError:
        _remove_unsealed(work)
        raise
    points = [point for point in trainer.state.log_history if "split" in point]
    return [dict(sorted(point.items())) for point in points]  # as read from a checkpoint


def _remove_unsealed(work: Path) -> None:
    """Remove unfinished checkpoints: they are of no use and take disk space."""
    for folder in _found(work):
        if flaw(folder):
            shutil.rmtree(folder, ignore_errors=True)
