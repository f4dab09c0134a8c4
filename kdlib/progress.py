"""Progress of long work: a bar in a terminal, a line in a notebook, a file for the runner."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
FILE = "KDLIB_PROGRESS"  # set by the runner: the file where a kernel writes its progress
INTERVAL = 0.5  # seconds between two reports


class Progress:
    """Shows how much of a piece of work is done.

    Args:
        label: name of the work.
        total: its number of steps.
    """

    def __init__(self, label: str, total: int):
        from kdlib import distributed  # imports torch, which the command line does not need

        self.label, self.total, self.started, self.last = label, total, time.time(), 0.0
        self.file = os.environ.get(FILE)
        ipython = sys.modules.get("IPython")  # the library works without it
        kernel, other = ipython is not None and hasattr(ipython.get_ipython(), "kernel"), distributed.rank() > 0
        self.bar = None if self.file or kernel else tqdm(total=total, desc=label, leave=False, delay=1, disable=other)
        self.line = None  # text in a notebook: tqdm's widget would stay dead in the saved file

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are done, with a few words such as the loss."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        elif time.time() - self.last > INTERVAL:
            self.last = time.time()
            seconds = self.last - self.started
            if not self.file:
                if seconds > 1:
                    self._show(tqdm.format_meter(done, self.total, seconds, prefix=self.label, postfix=note, ncols=100))
                return
            left = seconds / done * (self.total - done) if done else None
            report = dict(label=self.label, done=done, total=self.total, note=note, left=left)
            target = Path(self.file)
            work = target.with_suffix(".part")
            try:
                work.write_text(json.dumps(report))
                work.replace(target)
            except OSError:
                pass  # a full disk is reported by the work itself

    def _show(self, text: str) -> None:
        bundle = {"text/plain": text}
        if self.line is None:
            from IPython.display import display

            self.line = display(bundle, raw=True, display_id=True)
        else:
            self.line.update(bundle, raw=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
        if self.line is not None:
            self._show("")


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Iterate and show progress; `total` is needed where the items have no length."""
    total = len(items) if total is None else total  # pyright: ignore[reportArgumentType]
    progress = Progress(label, total)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(done)
    finally:
        progress.close()


def clock(seconds: float) -> str:
    """Seconds in words: 45 s, 3 min 20 s."""
    seconds = round(seconds)
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s"
