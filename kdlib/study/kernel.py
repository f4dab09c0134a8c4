"""A kernel that runs one notebook after the other.

It imports little itself, so that a kernel can be started, and load the libraries, while this process loads them too.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.utils import run_sync  # pyright: ignore[reportPrivateImportUsage]

from kdlib import progress

START_SECONDS = 300  # that a kernel may take to start: a laptop may be busy with others
ARGUMENTS = [
    "--IPKernelApp.log_level=40",
    "--HistoryManager.enabled=False",  # what a person typed is not to be mixed with this, and a full disk not to matter
]


@contextmanager
def kernel(preload: str | None = None) -> Iterator[AsyncKernelManager]:
    """A kernel for one notebook after the other: loading the libraries takes longer than some of them.

    It starts with the first notebook; with `preload`, a module it imports, at once. Of that module's objects there are
    so many that looking for garbage among them, as the Trainer does at every start, takes a third of a second: they are
    frozen. What the kernel works on is told in a file of its own (`progress.FILE`).
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
    """Have a kernel forget all names and objects of the notebook before, as if it were new."""
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
