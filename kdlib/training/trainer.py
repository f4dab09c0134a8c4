"""The Trainer that all trainings use: batches of a token budget, and a curve."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback

from kdlib.batching import BudgetSampler


class BudgetTrainer(Trainer):
    """A Trainer whose batches come from a sampler of batches.

    Args:
        curve: makes the callback that follows the training; called with the trainer.
        sampler: of the training batches.
        more: arguments of `transformers.Trainer`.
    """

    def __init__(
        self, curve: Callable[["BudgetTrainer"], TrainerCallback], sampler: BudgetSampler | None = None, **more: Any
    ):
        super().__init__(**more)
        self.sampler = sampler
        self.remove_callback(PrinterCallback)
        self.add_callback(curve(self))

    def get_train_dataloader(self) -> DataLoader:
        """The training batches."""
        loader = DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)
