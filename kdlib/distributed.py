"""Several processes of one training, as torchrun and `accelerate launch` start them. A single process needs none of it.

Every process holds the whole student and computes its share of every batch. Gradients are averaged.
"""

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce

PATIENCE = timedelta(days=1)  # how long the other processes wait for the first one
T = TypeVar("T")


def join(device: torch.device) -> None:
    """Connect the processes that were started together: over NCCL on GPUs (one each), over gloo on CPUs."""
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def world_size() -> int:
    """The number of processes."""
    return PartialState().num_processes


def rank() -> int:
    """The number of this process; 0 is the first."""
    return PartialState().process_index


def barrier() -> None:
    """Wait until all processes are here."""
    PartialState().wait_for_everyone()


def main_process_first() -> AbstractContextManager:
    """The first process runs the block alone; then the others run it and find its files."""
    return PartialState().main_process_first()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over the processes, without gradient where there are several."""
    return reduce(value.detach(), "mean") if world_size() > 1 else value  # pyright: ignore[reportReturnType]


def gather(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, with their gradient. Where a process has fewer, rows of zeros are added."""
    if world_size() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    most = torch.tensor(len(rows), device=rows.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    filled = torch.cat([rows, rows.new_zeros(int(most) - len(rows), *rows.shape[1:])])
    return torch.cat(all_gather(filled))


def broadcast(value: T) -> T:
    """The first process's value, in every process."""
    return broadcast_object_list([value])[0]  # pyright: ignore[reportIndexIssue]
