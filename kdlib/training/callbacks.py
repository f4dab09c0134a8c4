"""The curve of a training. Checkpoints hold its points too, so a resumed run has all of them."""

import time
from typing import Any

from transformers import TrainerCallback

from kdlib.progress import Progress


class Curve(TrainerCallback):
    """Keeps the points of a curve and shows progress. Subclasses decide when to add a point and what it holds.

    A point has its split ("train", "heldout", ...), the step, and the seconds of training without pauses between runs.

    Args:
        trainer: the Trainer of this training.
        label: name of the progress bar.
        split: split whose last loss is shown beside the progress.
    """

    def __init__(self, trainer: Any, label: str, split: str = "train"):
        self.trainer, self.label, self.split, self.points = trainer, label, split, []

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the progress bar and read the points of a checkpoint."""
        self.progress, self.started = Progress(self.label, state.max_steps), time.time()
        self.seconds_before = state.log_history[-1].get("seconds", 0.0) if state.log_history else 0.0
        self.points = [point for point in state.log_history if "split" in point]

    def seconds(self) -> float:
        """Seconds of training so far, without pauses."""
        return round(self.seconds_before + time.time() - self.started, 2)

    def add(self, state, split: str, values: dict[str, float]) -> None:
        """Add a point to the curve."""
        point = {"split": split, "step": state.global_step, "seconds": self.seconds(), **values}
        point = dict(sorted(point.items()))  # as read from a checkpoint: columns keep their order
        self.points.append(point)
        state.log_history.append(point)

    def on_step_end(self, args, state, control, **kwargs):
        """Show progress."""
        loss = next((point["loss"] for point in reversed(self.points) if point["split"] == self.split), None)
        self.progress.update(state.global_step, f"loss {loss:.3f}" if loss is not None else "")

    def on_train_end(self, args, state, control, **kwargs):
        """Remove the progress bar."""
        self.progress.close()
