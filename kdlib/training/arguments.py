"""Settings of the Trainer that all trainings share."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments


def training_arguments(
    work: Path | str, steps: int, learning_rate: float, device: torch.device, seed: int, **more: Any
) -> TrainingArguments:
    """The arguments of a training: AdamW and a linear schedule, without the Trainer's own reports and checkpoints.

    Args:
        work: folder of the checkpoints.
        steps: number of steps.
        learning_rate: its highest value.
        device: where the model is.
        seed: of order and dropout.
        more: other arguments of `TrainingArguments`.
    """
    shared: dict[str, Any] = dict(
        lr_scheduler_type="linear", optim="adamw_torch_fused", max_grad_norm=1.0, weight_decay=0.01, label_names=[],
        eval_strategy="no", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, use_cpu=device.type == "cpu", seed=seed, data_seed=seed,
    )  # fmt: skip
    return TrainingArguments(str(work), max_steps=steps, learning_rate=learning_rate, **shared | more)


@contextlib.contextmanager
def training_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use plain attention while training on a CPU: for short texts the fused gradient is several times slower."""
    fused = model.config._attn_implementation
    plain = model.device.type == "cpu" and fused == "sdpa"
    if plain:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if plain:
            model.set_attn_implementation(fused)
