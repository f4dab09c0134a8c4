"""The device and the number format to compute in. Both are measured, not assumed."""

import contextlib
import functools
import os
import platform
import time
from pathlib import Path

import torch

from kdlib.errors import UserError


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; "auto" is the GPU where there is one. Raises UserError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA GPU is visible; use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


AGREED = "KDLIB_BF16"  # environment variable of workers: whether "auto" means bfloat16


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16.

    Args:
        precision: "bf16", "fp32", or "auto": on a GPU that has bfloat16, and on a CPU where it is measured to be
            at least 1.5 times as fast. A worker takes the answer of the process that started it (`AGREED`).
        device: where the computation runs.
    """
    if precision == "auto":
        if AGREED in os.environ:
            return os.environ[AGREED] == "True"
        return torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_bf16_wins()
    return precision == "bf16"


@functools.cache
def _cpu_bf16_wins() -> bool:
    kinds = (torch.bfloat16, torch.float32) * 4  # in turns: other work on the machine slows down some of them
    speeds = [(kind, matmul_speed(kind, seconds=0.03)) for kind in kinds]
    bf16, fp32 = (max(speed for of, speed in speeds if of == kind) for kind in kinds[:2])
    return bf16 > 1.5 * fp32


def matmul_speed(dtype: torch.dtype, size: int = 768, seconds: float = 0.5, device: str = "cpu") -> float:
    """Measure matrix products of `size` x `size` for so many seconds. Returns FLOP/s."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    torch.mm(a, a)
    wait()
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(a, a)
        wait()
        runs += 1
    return 2 * size**3 * runs / (time.perf_counter() - start)


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager:
    """A block that computes in bfloat16, or in the model's own precision."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
