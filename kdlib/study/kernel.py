"""One kernel that runs several notebooks.

This module imports little, so that a kernel can start and load libraries while this process loads them too.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.utils import run_sync  # pyright: ignore[reportPrivateImportUsage]

from kdlib import progress

START_SECONDS = 300  # until a kernel must have started; a laptop may be busy
ARGUMENTS = [
    "--IPKernelApp.log_level=40",
    "--HistoryManager.enabled=False",  # keep this out of the user's history, and independent of a full disk
]


@contextmanager
def kernel(preload: str | None = None) -> Iterator[AsyncKernelManager]:
    """A kernel for several notebooks, since loading the libraries takes longer than some notebooks.

    It reports progress in a file (`progress.FILE`).

    Args:
        preload: a module to import at once; None: the kernel starts with the first notebook. Objects of the module are
            frozen, since the garbage collection at every start of a Trainer would take a third of a second.
    """
    manager, before = AsyncKernelManager(kernel_name="python3"), os.environ.get(progress.FILE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[progress.FILE] = str(Path(folder) / "progress.json")
        try:
            if preload:
                first = f"--IPKernelApp.exec_lines=import gc, {preload}; gc.freeze()"
                run_sync(manager.start_kernel)(extra_arguments=[*ARGUMENTS, first])
            yield manager
        finally:
            if manager.has_kernel:
                run_sync(manager.shutdown_kernel)(now=True)
            os.environ.pop(progress.FILE)
            if before is not None:
                os.environ[progress.FILE] = before


def empty(manager: AsyncKernelManager) -> None:
    """Remove all names and objects of the last notebook from a kernel."""
    run_sync(_empty)(manager)


async def _empty(manager: AsyncKernelManager) -> None:
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=START_SECONDS)
        code = "get_ipython().reset()\nimport gc\ngc.collect()\ndel gc"
        await client.execute(code, silent=True, store_history=False, reply=True)  # pyright: ignore[reportCallIssue]
    finally:
        client.stop_channels()
