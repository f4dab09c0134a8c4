"""What the benchmarks share: rows of results, timing in turns, the job that is measured, and peers' environments."""

import ctypes
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from kdlib import config
from kdlib.batching import BudgetSampler
from kdlib.data.corpus import windows
from kdlib.distillation.distill import distill
from kdlib.distillation.tokenized_corpus import TokenizedCorpus, tokenise
from kdlib.files import new_file, write_json
from kdlib.study.study import Study

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGES = (HERE.parent / "docs" / "benchmarks.md",)  # the table is there alone
MARKS = ("<!-- benchmarks: this table is written by the run -->", "<!-- end of benchmarks -->")
WORK = HERE / ".work"  # what is made once and used again: the pruned teacher, its states, the models to prune
VENVS = HERE / ".venvs"
# What is installed for each peer, pip call by pip call; torch is the kit's own version.
PEERS = {
    "textbrewer": [["torch==2.13.0", "transformers==5.23.0", "textbrewer==0.2.1.post1"]],
    "trimmers": [
        [
            "torch==2.13.0", "transformers==4.46.3", "huggingface_hub==0.36.2", "datasets==3.6.0", "pandas==3.1.1",
            "tabulate==0.10.0", "sentencepiece==0.2.3", "protobuf==7.36.2",
        ],
        ["--no-deps", "vocabtrimmer==0.0.2", "textpruner==1.1.post2"],
    ],
}  # fmt: skip


class PeerMissing(Exception):
    """A peer cannot be installed here, or does not run; the message says why."""


# -- results


def row(
    claim: str,
    ours: float | Sequence[float] | None,
    other: float | Sequence[float] | None = None,
    unit: str = "",
    lower: bool = False,
    at_least: float | None = None,
    at_most: float | None = None,
    note: str = "",
    peers: Sequence[str] = (),
    missing: object = None,
) -> dict:
    """One line of the results.

    ours, other: numbers, or one a round, of which the medians count; ratio: how many times better ours is, where lower
    says that less is better, and None where that is a number divided by 0. The goal is for the ratio where there is an
    other, else for ours: at_least or at_most.
    peers: packages whose versions belong to it. missing: why the other could not be run; then no goal is met.
    """
    mine, theirs = _median(ours), _median(other)
    better, worse = (theirs, mine) if lower else (mine, theirs)
    ratio = better / worse if better is not None and worse else None
    judged = mine if theirs is None else ratio
    known = missing is None and judged is not None
    goal, met = None, None
    if at_least is not None:
        goal, met = f">= {at_least:g}", known and judged >= at_least
    elif at_most is not None:
        goal, met = f"<= {at_most:g}", known and judged <= at_most
    return {
        "claim": claim,
        "ours": mine,
        "other": theirs,
        "ratio": ratio,
        "goal": goal,
        "met": met,
        "unit": unit,
        "note": note if missing is None else str(missing),
        "rounds": {"ours": _listed(ours), "other": _listed(other)},
        "versions": versions(peers),
    }


def _listed(values: float | Sequence[float] | None) -> list[float]:
    return [] if values is None else [float(v) for v in np.atleast_1d(values)]


def _median(values: float | Sequence[float] | None) -> float | None:
    return None if values is None else float(median(_listed(values)))


@cache
def machine() -> str:
    """The machine in a line: processor, cores in use, memory, system."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {torch.get_num_threads()} threads, {memory:.0f} GB, {platform.system()} {platform.machine()}"


def versions(peers: Sequence[str] = ()) -> dict[str, str]:
    """Versions of what is measured, and the machine. peers: packages of the peers' environments."""
    ours = {name: version(name) for name in ("kdlib", "torch", "transformers", "tokenizers", "safetensors")}
    pins = dict(pin.split("==") for calls in PEERS.values() for call in calls for pin in call if "==" in pin)
    facts = {"machine": machine(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    return facts | ours | {name: pins[name] for name in peers}


def show(rows: Sequence[dict], title: str = "") -> None:
    """The rows as a table."""
    table = Table("claim", "ours", "other", "unit", "ratio", "goal", "met", title=title, title_justify="left")
    for r in rows:
        table.add_row(
            r["claim"], _short(r["ours"]), _short(r["other"]), r["unit"], _short(r["ratio"]), r["goal"] or "",
            {True: "yes", False: "NO", None: ""}[r["met"]],
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for note in dict.fromkeys(r["note"] for r in rows if r["note"]):
        console.print(f"  {note}", markup=False, highlight=False)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(rows: Sequence[dict]) -> str:
    """The rows as a table in Markdown, with machine and versions below."""
    lines = [
        "| claim | ours | other | unit | times better | goal | met |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        met = {True: "yes", False: "**no**", None: ""}[r["met"]]
        cells = [r["claim"], _short(r["ours"]), _short(r["other"]), r["unit"], _short(r["ratio"]), r["goal"] or "", met]
        lines.append(f"| {' | '.join(cells)} |")
    facts = {name: value for r in rows for name, value in r["versions"].items()}
    place = facts.pop("machine"), facts.pop("date")
    below = ", ".join(f"{name} {value}" for name, value in facts.items())
    notes = [f"- {note}" for note in dict.fromkeys(r["note"] for r in rows if r["note"])]
    return "\n".join([*lines, "", f"{place[0]}; {place[1]}. {below}.", "", *notes]) + "\n"


def main(measure: Callable[[bool], list[dict]]) -> None:
    """What `python -m benchmarks.<claim>` does: measure, show, print the rows as JSON with --json. --quick: small."""
    quiet()
    rows = measure("--quick" in sys.argv)
    show(rows, measure.__module__)
    if "--json" in sys.argv:
        print(json.dumps(rows, indent=1))


def quiet() -> None:
    """Without what libraries tell their developers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("kdlib").setLevel(logging.ERROR)


# -- time


# Memory that is freed stays with the process (glibc's parameters 4 and 1, and as variables of a peer's environment). On
# some machines fresh pages take as long as the arithmetic, at times and by chance.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}


def keep_memory() -> None:
    """Set KEPT for this process, where its C library has such parameters."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own, which would be given back
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is not given back either


def in_turns(jobs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each job returns, round by round: all in turn, so that a noisy machine is noisy for all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            found[name].append(job())
    return found


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


# -- the job: what `kdlib run --profile workshop` distils


@dataclass
class Job:
    """The workshop's teacher and student, and texts of its corpus: runs of one to three sentences, drawn at random.

    train: their ids in the pruned vocabulary; spec: the workshop's settings.
    """

    study: Study
    texts: list[str]
    spec: config.Distill
    train: TokenizedCorpus = field(init=False)

    def __post_init__(self):
        self.train = tokenise(self.study.source, self.texts)

    def student(self) -> PreTrainedModel:
        """A new student, as the workshop begins with."""
        return self.study.undistilled().model

    def epoch(self, train: TokenizedCorpus, student: PreTrainedModel | None = None) -> float:
        """Seconds of one epoch of `distill`, its checkpoints included, on `student` or on a new one."""
        student = student or self.student()
        return seconds(lambda: self._distill(train, student))

    def rate(self, train: TokenizedCorpus) -> float:
        """Texts per second of an epoch's steps, but for the first and the last: what comes before and after, such as
        evaluations and a checkpoint, does not grow with the length of a training, and other loops have none of it."""
        ends: list[float] = []

        def stop() -> bool:
            ends.append(time.perf_counter())
            return False

        self._distill(train, self.student(), stop)
        between = [len(batch) for batch in BudgetSampler(train.lengths, self.spec.batch_tokens)][1:-1]
        if len(between) != len(ends) - 1:
            raise RuntimeError(f"{len(ends)} steps were timed, {len(between)} batches lie between the first and last")
        return sum(between) / (ends[-1] - ends[0])

    def _distill(
        self, train: TokenizedCorpus, student: PreTrainedModel, should_stop: Callable[[], bool] | None = None
    ) -> None:
        """One epoch, watched with a few of the texts."""
        spec, heldout = self.spec.model_copy(update={"epochs": 1.0, "evaluations": 1}), train.part(range(8))
        with tempfile.TemporaryDirectory() as work:
            distill(self.study.source, student, train, heldout, spec, Path(work), should_stop=should_stop)


def workshop(texts: int, lengths: list[int] | None = None) -> Job:
    """The job with so many texts. lengths: of their runs of sentences, by default as the workshop has them."""
    study = Study(WORK / "study", "workshop")
    spec = study.profile.distill
    every = windows(study.corpus.train, lengths or spec.windows)
    chosen = np.random.default_rng(0).permutation(len(every))[:texts]
    return Job(study, [every[i] for i in chosen], spec)


# -- peers


@cache
def peer(name: str) -> Path:
    """The Python of a peer's environment, made on the first call. Raises PeerMissing where it cannot be installed."""
    folder = VENVS / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done, wanted = folder / "installed.json", json.dumps(PEERS[name])
    if done.is_file() and done.read_text() == wanted:
        return python
    calls = [[sys.executable, "-m", "venv", "--clear", folder]]
    calls += [[python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins] for pins in PEERS[name]]
    for call in calls:
        found = subprocess.run(call, check=False, capture_output=True, text=True)
        if found.returncode:
            raise PeerMissing(f"{name} could not be installed: {_last_line(found.stderr)}")
    done.write_text(wanted)
    return python


def run_peer(
    python: Path | str, script: Path, *arguments: object, limit: float = 600, variables: Mapping[str, str] | None = None
) -> dict:
    """What a script printed as JSON in its last line, run with as many threads as this process has.

    Raises PeerMissing where it fails or takes longer than `limit` seconds.
    """
    threads = str(torch.get_num_threads())
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))  # the kit's script needs it
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment |= variables or {}
    command = [str(part) for part in (python, script, *arguments)]
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        raise PeerMissing(f"{script.stem} took longer than {limit:.0f} s") from None
    if found.returncode:
        raise PeerMissing(f"{script.stem} {arguments[0]}: {_last_line(found.stderr)}")
    return json.loads(found.stdout.strip().splitlines()[-1])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]


def write_results(rows: list[dict], target: Path = RESULTS, pages: Sequence[Path] = ()) -> None:
    """The rows as `target`, and as a table in each page that has the place for one, between its two marks."""
    write_json(target, rows)
    for page in pages:
        text = page.read_text("utf-8")
        if all(mark in text for mark in MARKS):
            before, rest = text.split(MARKS[0], 1)
            with new_file(page) as new:
                new.write_text(
                    before + MARKS[0] + "\n" + markdown(rows) + MARKS[1] + rest.split(MARKS[1], 1)[1], "utf-8"
                )
