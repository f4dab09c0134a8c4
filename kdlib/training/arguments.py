"""Settings of the Trainer that all trainings share."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel


@contextlib.contextmanager
def training_attention(model: PreTrainedModel) -> Iterator[None]:
    """Plain attention while training on a CPU.

    For short texts the gradient of the fused kernel takes several times as long there.
    """
    fused = model.config._attn_implementation
    plain = model.device.type == "cpu" and fused == "sdpa"
    if plain:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if plain:
            model.set_attn_implementation(fused)
