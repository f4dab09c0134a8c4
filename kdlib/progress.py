"""Progress of long work: a bar in a notebook, a line for the runner when headless."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

from kdlib import processes

Item = TypeVar("Item")
FILE = "KDLIB_PROGRESS"  # set by the runner: where the kernel writes how far it is
INTERVAL = 0.5  # seconds between two reports


class Progress:
    """Reports how far a piece of work is: `label`, steps done of `total`, and a few words such as the loss."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.started, self.last = label, total, time.time(), 0.0
        self.file = os.environ.get(FILE)
        self.bar = None if self.file else tqdm(
            total=total, desc=label, leave=False, delay=1, disable=processes.place() > 0
        )

    def update(self, done: int, note: str = "") -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        elif time.time() - self.last > INTERVAL:
            self.last = time.time()
            seconds = self.last - self.started
            left = seconds / done * (self.total - done) if done else None
            report = dict(label=self.label, done=done, total=self.total, note=note, left=left)
            target = Path(self.file)
            work = target.with_suffix(".part")
            try:
                work.write_text(json.dumps(report))
                work.replace(target)
            except OSError:
                pass  # progress is a courtesy; the work itself reports a full disk where it matters

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with progress."""
    total = len(items) if total is None else total
    progress = Progress(label, total)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(done)
    finally:
        progress.close()
