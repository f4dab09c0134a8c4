"""Hostile input for every reader: `make fuzz`, or `python tests/fuzz.py --cases 10000`.

Whatever it is given, a reader ends with a value that is in order or with a UserError: one line of at most LINE letters
that names the file or key. Everything else fails the case: another exception, more than SECONDS or MEMORY, a process
that dies, code of the input that ran, anything written outside the folder that was given.

The cases, of `hostile.READERS`, are the same for the same --seed. A batch of them is read in a forked process, so that
a crash of native code is one failed case. The first case of every kind of failure is kept in a folder. As many readers
are fuzzed at a time as there are cores.
"""

import argparse
import faulthandler
import hashlib
import io
import multiprocessing
import os
import reprlib
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules, when this file is run as a script
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process cannot use the threads of its parent

import hostile
import hypothesis
from hostile import Case, Link, Reader
from hypothesis import HealthCheck, Phase, settings

from kdlib import progress
from kdlib.errors import UserError

SECONDS = 20
MEMORY = 1 << 30  # bytes that reading a case may add to the process
LINE = 500
BATCH = 250


@dataclass
class Tally:
    """What came of a reader's cases: `refused` with a UserError as it should be, `failed`, the others were read. kinds:
    kind of failure -> how often, what it said, where its first case is."""

    cases: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    kinds: dict[str, tuple[int, str, Path]] = field(default_factory=dict)


# -- one case


class Watch:
    """What Python reports while a case is read: writing elsewhere than in `places`, other programs, unpickling."""

    RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
            "socket.connect"}  # fmt: skip
    CHANGES = {"os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.rename": (0, 1), "os.symlink": (1,),
               "os.link": (1,), "os.chmod": (0,), "shutil.rmtree": (0,)}  # fmt: skip
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self) -> None:
        self.places: tuple[Path, ...] = ()
        self.seen: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.seen is None:
            return
        if event in self.RUNS:
            self.seen.append(f"{event} {reprlib.repr(arguments)}")
        paths: list = []
        if event == "open" and (arguments[2] or 0) & self.WRITING:
            paths = [arguments[0]]
        elif event in self.CHANGES and arguments[-1] in (-1, None):  # else below a folder that an earlier event told
            paths = [arguments[at] for at in self.CHANGES[event]]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)) and path != os.devnull:
                place = Path(os.path.realpath(os.fsdecode(path)))
                if event != "open":  # that goes through a link; the others change the link itself
                    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                    place = Path(os.path.realpath(folder), name)
                if not any(place.is_relative_to(allowed) for allowed in self.places):
                    self.seen.append(f"{event} {str(place)!r}")


def judge(reader: Reader, case: Case, around: Path, watch: Watch) -> str | tuple[str, str]:
    """Read the case in `around`/here: "read", "refused", or the kind of failure and what there is to say of it."""
    here, tmp, canary, victim = (around / name for name in ("here", "tmp", "canary", "victim.txt"))
    shutil.rmtree(around, ignore_errors=True)
    here.mkdir(parents=True)
    tmp.mkdir()
    victim.write_text("as it was")
    for name, content in case.files.items():
        _put(here / name, content)
    os.chdir(here)
    os.environ[hostile.CANARY] = str(canary)
    tempfile.tempdir = str(tmp)
    watch.places, watch.seen = (here, tmp), []
    outcome: str | tuple[str, str] = "read"
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.stderr)
    try:
        reader.read(here, case)
    except UserError as error:
        outcome = complaint(str(error), case) or "refused"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = ([frame for frame in frames if "kdlib/" in frame.filename] or frames)[-1]
        kind = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno} {frame.name}"
        outcome = kind, f"{reprlib.repr(str(error))}\n{''.join(traceback.format_tb(error.__traceback__))}"
    finally:
        faulthandler.cancel_dump_traceback_later()
        seen, watch.seen = watch.seen, None
    if canary.exists():
        return "code of the input ran", "\n".join(seen)
    if seen:
        return f"did what no reader should: {seen[0].split()[0]}", "\n".join(seen)
    if sorted(os.listdir(around)) != ["here", "tmp", "victim.txt"] or victim.read_text() != "as it was":
        return "wrote outside", f"{sorted(os.listdir(around))}"
    return outcome


def _put(path: Path, content: "bytes | Link | None") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Link):
        path.symlink_to(content.to)
    elif content is None:
        path.mkdir(exist_ok=True)
    else:
        path.write_bytes(content)


def complaint(message: str, case: Case) -> tuple[str, str] | None:
    """What is wrong with the message of a UserError, if anything."""
    if len(message) > LINE:
        return "message too long", f"{len(message)} letters: {message[:300]!r}"
    if not message.isprintable():
        return "message of several lines, or with what cannot be shown", f"{message!r}"
    if case.names and not any(str(UserError(name[:40])) in message for name in case.names):
        return "message names neither file nor key", f"{message!r}"
    return None


# -- batches of cases


def draw(reader: Reader, each: Callable[[Any], None], size: int, seed: str) -> None:
    """Call `each` with so many values, the same for the same seed."""

    @hypothesis.seed(int(hashlib.sha256(seed.encode()).hexdigest()[:12], 16))
    @settings(
        max_examples=size, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    @hypothesis.given(reader.values)
    def drawn(values: Any) -> None:
        each(values)

    drawn()


class _Yes(io.StringIO):
    """Somebody who says yes to every question."""

    def readline(self, *_) -> str:
        return "y\n"


def _batch(reader: Reader, seed: int, number: int, size: int, skip: int, around: Path, pipe) -> None:
    """Read the cases of a batch from `skip` on, in a process of its own; tells (its number, outcome) of each."""
    log = os.open(around.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    faulthandler.enable(sys.stderr)
    sys.stdin = _Yes()
    os.environ.pop(progress.FILE, None)  # what a notebook's runner set: readers write there
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MEMORY,) * 2)  # threads reserve much, use little
    watch, count, before = Watch(), 0, _peak()

    def each(values) -> None:
        nonlocal count
        count += 1
        if not skip < count <= size:
            return
        case = reader.build(values, Random(f"{seed} {reader.name} {number} {count}"))
        (around.parent / "about").write_text(reprlib.repr(case.about), "utf-8", "backslashreplace")
        pipe.send((count, "begun"))
        outcome = judge(reader, case, around, watch)
        grown = _peak() - before
        pipe.send((count, ("takes too much memory", f"{grown >> 20} MiB") if grown > MEMORY else outcome))
        pipe.recv()  # a failed case is being kept
        if grown > MEMORY:
            os._exit(0)  # the peak stays: the next case wants a process of its own

    try:
        draw(reader, each, size, f"{seed} {reader.name} {number}")
        pipe.send((count, "end"))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(2)
    os._exit(0)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fuzz(reader: Reader, cases: int, seed: int, keep: Path) -> Tally:
    """Read so many cases (fewer for a slow reader); the first case of every kind of failure is kept under `keep`."""
    tally, started, fork = Tally(), time.monotonic(), multiprocessing.get_context("fork")
    cases = -(-cases // reader.share)
    with tempfile.TemporaryDirectory(prefix="kdlib-fuzz-") as sandbox:
        around = Path(sandbox).resolve() / "around"
        for number, first in enumerate(range(0, cases, BATCH)):
            done, size = 0, min(BATCH, cases - first)
            while done < size:
                ours, theirs = fork.Pipe()
                child = fork.Process(target=_batch, args=(reader, seed, number, size, done, around, theirs))
                child.start()
                theirs.close()
                begun, ended = False, False
                while True:
                    try:
                        at, said = ours.recv()
                    except EOFError:
                        break
                    begun, ended = said == "begun", said == "end"
                    if not begun and not ended:
                        done = at
                        _note(tally, said, around, keep / f"{reader.name}-{seed}-{number}-{at}")
                        ours.send(None)
                child.join()
                log = (around.parent / "log").read_text("utf-8", "replace")
                if begun:
                    done += 1
                    kind = "hangs" if "Timeout (" in log else f"the process dies ({child.exitcode})"
                    _note(tally, (kind, log[-4000:]), around, keep / f"{reader.name}-{seed}-{number}-{done}")
                elif child.exitcode:
                    raise RuntimeError(f"fuzzing {reader.name} failed itself: {log[-4000:]}")
                elif ended and done < size:
                    break  # there are no more values
    tally.seconds = time.monotonic() - started
    return tally


def _named(name: str, *arguments) -> Tally:
    """`fuzz` for a reader by its name: what a reader is made of cannot be sent to another process."""
    return fuzz(next(reader for reader in hostile.READERS if reader.name == name), *arguments)


def _note(tally: Tally, outcome: str | tuple[str, str], around: Path, kept: Path) -> None:
    tally.cases += 1
    if isinstance(outcome, str):
        tally.refused += outcome == "refused"
        return
    kind, text = outcome
    tally.failed += 1
    if kind not in tally.kinds:
        shutil.copytree(around / "here", kept / "here", symlinks=True)
        about = (around.parent / "about").read_text("utf-8")
        (kept / "case.txt").write_text(f"{kind}\n{text}\nread with: {about}\n", "utf-8", "backslashreplace")
    count, first, place = tally.kinds.get(kind, (0, text, kept))
    tally.kinds[kind] = count + 1, first, place


def main(arguments: list[str] | None = None) -> int:
    """Fuzz all readers, or those that are named, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="for every reader; slow ones read a share of them")
    parser.add_argument("--seed", type=int, default=0)
    names = [reader.name for reader in hostile.READERS]
    parser.add_argument("--reader", action="append", choices=names, help="only this one; repeatable")
    given = parser.parse_args(arguments)
    keep = Path(tempfile.mkdtemp(prefix="kdlib-fuzz-failures-"))
    hostile.prepare()
    for reader in hostile.READERS:  # hypothesis, too, gets its tables ready only once
        draw(reader, lambda values: None, 2, "")
    chosen, tallies = [name for name in names if name in (given.reader or names)], []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        runs = {pool.submit(_named, name, given.cases, given.seed, keep): name for name in chosen}
        for run in as_completed(runs):
            tally = run.result()
            tallies.append(tally)
            print(f"{runs[run]:>10} {tally.cases:>7,} cases {tally.seconds:>8.1f} s  seed {given.seed}  "
                  f"{tally.refused:>6,} refused {tally.failed:>4} failed", flush=True)  # fmt: skip
            for kind, (count, text, place) in tally.kinds.items():
                print(f"{'':>10} {count} x {kind}: {text.partition(chr(10))[0][:200]} [{place}]", flush=True)
    failed = sum(tally.failed for tally in tallies)
    if not failed:
        keep.rmdir()
    print(f"{sum(tally.cases for tally in tallies) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
