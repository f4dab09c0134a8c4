"""Several processes of one training, as torchrun and `accelerate launch` start them. Alone, nothing here does anything.

Every process holds the whole student and computes its share of every batch; gradients are averaged.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

PATIENCE = timedelta(days=1)  # for what the first process makes while the others wait

T = TypeVar("T")


def join(device: torch.device) -> None:
    """Meet the processes that were started together, over NCCL on GPUs (one each), over gloo on CPUs."""
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place() -> int:
    """Which of them this is, 0 = first."""
    return dist.get_rank() if count() > 1 else 0


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        dist.barrier()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """The first process alone goes through the block and leaves files; then the others, who find them."""
    if place() > 0:
        wait()
    yield
    if place() == 0:
        wait()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over the processes; no gradient flows through it."""
    if count() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / count()


def agreed(value: T) -> T:
    """The first process's value, which all go by."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values)
    return values[0]
