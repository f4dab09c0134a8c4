"""Independent parts of a run in several processes: joblib's workers on this machine, or a dask cluster.

A worker computes a part and keeps it in the run folder. Then the process that asked for it reads it there, as if it had
been made before. So the results do not depend on where they were computed, and a stopped run resumes.
"""

import functools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from kdlib import config, progress
from kdlib.device import AGREED
from kdlib.errors import UserError
from kdlib.files import SHARED, checksum

log = logging.getLogger(__name__)
ATTEMPTS = 3  # so often workers may die before the run ends with an error


def progress_folder(run: Path) -> Path:
    """Where the workers of a run write their progress."""
    return run / "cache" / "progress"


def spread(
    run: Path, spec: config.Compute, stage: str, units: Iterable[tuple], study: Callable[..., Any], bf16: bool
) -> None:
    """Compute units of a stage's report in workers. What they make is in the run folder.

    A worker that dies is replaced. Units that were finished are not computed again.

    Args:
        run: the run folder.
        spec: how many at a time, and where.
        stage: whose report has the method `unit`.
        units: the arguments of its calls.
        study: makes a study of a run folder and a profile (`Study`), in the worker.
        bf16: whether the precision "auto" means bfloat16.

    Raises:
        UserError: where a unit raises it, the cluster cannot be reached, or workers die again and again.
    """
    units = list(units)
    if len(units) < 2:
        return
    _forget_progress(run)  # of workers that were killed
    profile = run / "profile.yaml"
    calls = [delayed(_work)(study, str(run.resolve()), checksum(profile), stage, unit, bf16) for unit in units]
    for _ in range(ATTEMPTS):
        try:
            with _backend(spec):
                jobs = Parallel(
                    n_jobs=spec.jobs if spec.backend == "loky" else -1, batch_size=1, return_as="generator_unordered"
                )
                for _done in progress.track(jobs(calls), f"{stage}, in {spec.jobs} processes", len(calls)):
                    pass
            return
        except TerminatedWorkerError:
            log.warning("a worker died (killed, or out of memory); its work is done again")
        finally:
            _forget_progress(run)
    raise UserError(f"stage {stage}: workers died {ATTEMPTS} times (out of memory?); set fewer compute.jobs")


def _forget_progress(run: Path) -> None:
    for file in progress_folder(run).glob("*.json"):
        file.unlink(missing_ok=True)


@contextmanager
def _backend(spec: config.Compute) -> Iterator[None]:
    """The workers, each with its share of this process's threads."""
    if spec.backend == "loky":
        with parallel_config(backend="loky", inner_max_num_threads=max(1, torch.get_num_threads() // spec.jobs)):
            yield
        return
    try:
        from distributed import Client
    except ImportError:
        raise UserError("compute.backend: dask needs its package: pip install 'kdlib[dask]'") from None
    try:
        client = Client(spec.address, timeout=30)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"compute.address {spec.address}: no dask scheduler there ({reason})") from None
    with client, parallel_config(backend="dask"):
        yield


def _work(study: Callable[..., Any], run: str, profile: int, stage: str, unit: tuple, bf16: bool) -> None:
    """Compute one unit, in a worker.

    Args:
        study: makes the study.
        run: the run folder.
        profile: checksum of the run's profile; a worker may outlive a change of it.
        stage: whose report has the unit.
        unit: what to compute.
        bf16: what "auto" means. A busy worker could measure something else, and then its results would have other keys.
    """
    os.environ[SHARED], os.environ[AGREED] = "1", str(bf16)
    folder = progress_folder(Path(run))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[progress.FILE] = str(folder / f"{socket.gethostname()}-{os.getpid()}.json")
    if (count := torch.cuda.device_count()) > 1:
        own_gpu(folder, count)
    _study(study, run, profile).report(stage).unit(*unit)


@functools.lru_cache(1)
def _study(study: Callable[..., Any], run: str, profile: int) -> Any:
    """The study of a run folder. It stays in the worker, with the models it has read."""
    found = study(run, str(Path(run) / "profile.yaml"))
    found.context.ahead = lambda stage, units: None
    return found


_held: list[FileLock] = []  # the lock of this worker's GPU, until the process ends


def own_gpu(folder: Path, count: int) -> None:
    """Let this process see one GPU that no other worker of its machine has. The GPU is free when the process ends."""
    for number in range(count) if not _held else ():
        lock = FileLock(folder / f"gpu-{socket.gethostname()}-{number}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        _held.append(lock)
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
        return
