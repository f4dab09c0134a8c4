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


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, 0 = first."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Until all are here."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process alone goes through the block and leaves files; then the others, who find them."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over the processes; no gradient flows through it."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world_size()


def broadcast(value: T) -> T:
    """The first process's value, which all go by."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]
