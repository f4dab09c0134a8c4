"""Kill a study again and again and see that it ends as if nothing had happened: `make soak`.

A very small study (a teacher of four layers made on the spot, a corpus of 160 sentences) runs once without a stop. Then
it runs in fresh folders, is killed with SIGKILL, started again, killed again, until it is done; what it leaves has to
be what the first run left: the weights of the pruned and the conditioned teacher and of every student byte for byte,
every number of results.csv but those of time, every trial and every arm, and nothing besides.

Most kills go to a process that runs the stages of a `Study` one after another, as the notebooks do, forked off this one
so that a start costs no imports, with a checkpoint at every point of the curve instead of every minute. Two of three
hit it at a moment drawn from all that the first run counted: before it touches a file of the run folder, in the middle
of writing weights or a checkpoint, after a step of training. The others come from outside after a time drawn at random.
The rest, one in ten, go to a whole `kdlib run`, its kernel included, at any time. What the draw is depends on --seed
alone; where the clock decides, the outcome may still differ.

Not covered: a power cut (the system's caches outlive a killed process), GPUs (there, sums are not bitwise the same).
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules, when this file is run as a script
if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and a process that has threads had better not fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import psutil
import safetensors.numpy
import safetensors.torch
import tiny
import torch
import transformers.modeling_utils
from transformers.utils.logging import disable_progress_bar

from kdlib.evaluation import benchmark
from kdlib.study.run import read_results
from kdlib.study.stage import contents
from kdlib.study.study import NOTEBOOKS, Study
from kdlib.training import checkpoints

ROOT = Path(__file__).parents[2]
OVERRIDES = {
    "language": "ceb", "parallel": None, "teacher.max_length": 32, "device": "cpu",
    "vocabulary.max_rows": 100, "vocabulary.wordlist": False, "student.layers": 2, "students": {},
    "condition.use": True, "condition.epochs": 2, "condition.batch_tokens": 256,
    "distill.batch_tokens": 128, "distill.evaluations": 2, "distill.precision": "fp32", "distill.epochs": 1.5,
    "benchmark.seeds": [0], "benchmark.finetune_epochs": 1, "benchmark.bootstrap": 100, "benchmark.latency_runs": 3,
    "benchmark.fewshot": [4], "benchmark.fewshot_steps": 3, "benchmark.finetune_batch": 4,
    "ablations.epochs": 1, "ablations.max_texts": 50,
    "ablations.arms": {
        "objective": {"attention": {"distill.objectives": {"attention": 1.0}}},
        "conditioning": {"untouched teacher": {"condition.use": False}},
        "vocabulary": {"whole": {"vocabulary.prune": False}},
        "width": {"16 wide": {"student.hidden": 16}},
    },
    "probe.train_rows": 40, "probe.test_rows": 20, "probe.cloze_sentences": 5, "probe.cka_sentences": 20,
}  # fmt: skip
TIMES = ("seconds", "tokens_per_second", "sentences_per_second", "latency_ms")  # metrics that end so are of the clock
REMOVALS = ("os.remove", "os.rmdir")
CHANGES = (*REMOVALS, "os.rename", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree", "shutil.copyfile")
STAGES = ["prune", "condition", "distill", "benchmark", "ablations"]


def write_study(folder: Path) -> None:
    """A teacher, a corpus and a task."""
    disable_progress_bar()
    tiny.encoder().save(folder / "teacher")
    (folder / "corpus.txt").write_text("\n\n".join("\n".join(tiny.texts(4, seed)) for seed in range(40)))
    rows = [f"{text},{'long' if len(text.split()) > 3 else 'short'}" for text in dict.fromkeys(tiny.texts(100, 99, 7))]
    (folder / "labels.csv").write_text("text,label\n" + "\n".join(rows))


def own_overrides(folder: Path) -> dict:
    """A profile's parameters for a study of what `write_study` wrote."""
    task = {"name": "length", "source": str(folder / "labels.csv"), "text": "text", "label": "label"}
    own = {"teacher.source": str(folder / "teacher"), "corpus.source": str(folder / "corpus.txt"), "tasks": [task]}
    return OVERRIDES | own


# -- the process that is killed


class Moments:
    """Counts what happens in a stage, and dies at the moment it is told: (stage, number)."""

    def __init__(self, out: Path, end: tuple[str, int] | None):
        self.out, self.end, self.stage, self.counts = f"{out}{os.sep}", end, "", collections.Counter()
        sys.addaudithook(self.file)
        Checkpoints = checkpoints.Checkpoints
        step_end = Checkpoints.on_step_end
        Checkpoints.on_step_end = lambda *a, **k: (step_end(*a, **k), self.pass_by("a step"))[0]
        torch.save = self.writer(torch.save)
        for module, name in ((safetensors.torch, "save_file"), (transformers.modeling_utils, "safe_save_file")):
            setattr(module, name, self.writer(getattr(module, name)))

    def pass_by(self, what: str, torn: Path | None = None) -> None:
        self.counts[self.stage] += 1
        if self.end == (self.stage, self.counts[self.stage]):
            if torn:
                os.truncate(torn, torn.stat().st_size // 2)
            print(f"    at {what}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def file(self, event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and set(str(arguments[1])) & set("wax+")):
            inside = str(arguments[0]).startswith(self.out)
            if inside or (event in REMOVALS and arguments[1] != -1):  # as part of the removal of a whole folder
                self.pass_by(f"{event} {str(arguments[0]).removeprefix(self.out)}")

    def writer(self, save: Callable) -> Callable:
        def saved(value, path, *rest, **more):
            found = save(value, path, *rest, **more)
            if str(path).startswith(self.out):
                self.pass_by(f"half of {str(path)[len(self.out) :]}", Path(path))
            return found

        return saved


def run_stages(out: Path, overrides: dict, moments: Moments) -> None:
    """The stages of a study that are not done yet, as the notebooks do them."""
    study = Study(out, "smoke", overrides)
    spec = study.profile.benchmark

    def trials() -> list[dict]:
        report = study.report("benchmark")
        found = [trial for method in ("probe", "finetune", "fewshot") for trial in report.trials(method)]
        return benchmark.trial_rows(found, spec) + report.efficiency_rows() + report.paired_rows(found)

    rows = {
        "prune": lambda: study.report("prune").rows(),
        "condition": lambda: study.report("condition").rows() + study.report("condition").cloze_rows(),
        "distill": lambda: study.report("distill").rows(),
        "benchmark": trials,
        "ablations": study.ablation_rows,
    }
    with study.run.lock():
        for stage in STAGES:
            moments.stage, report = stage, study.report(stage)
            if not (study.run.done(stage, report.key) and report.intact()):
                study.run.record(stage, rows[stage]())
                study.run.mark(stage, report.key, 0.0, contents(report))


def start(out: Path, overrides: dict, end: tuple[str, int] | None = None, counts: Path | None = None) -> int:
    """Fork a process that runs the stages; its number. It dies at `end`; what it counted goes to a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        checkpoints.SECONDS, checkpoints.SHARE = 0.0, float("inf")
        torch.set_num_threads(1)
        moments = Moments(out, end)
        with (out.parent / f"{out.name}.log").open("a") as log:
            os.dup2(log.fileno(), 2)
            run_stages(out, overrides, moments)
        if counts:
            counts.write_text(json.dumps(moments.counts))
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(code)


def forked(work: Callable, *arguments) -> None:
    """Do some work in a process of its own, so that this one never computes."""
    process = os.fork()
    if process == 0:
        work(*arguments)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        raise SystemExit("the study could not be set up")


def ended(process: int, seconds: float) -> int:
    """The exit code of a process, -9 if it had to be killed after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# -- what the runs left


def differences(first: Path, second: Path) -> list[str]:
    """What of the second run is not as in the first; empty for equal runs."""
    found = []

    def names(pattern: str) -> set[str]:
        both = [{str(path.relative_to(run)) for path in run.glob(pattern)} for run in (first, second)]
        found.extend(f"{name} is in one run only" for name in sorted(both[0] ^ both[1]))
        return both[0] & both[1]

    for pattern in ("ablations/*/rows.json", "artefacts/*/*.npy"):
        found += [f"{n} differs" for n in names(pattern) if (first / n).read_bytes() != (second / n).read_bytes()]
    models = names("artefacts/*/*.safetensors")
    found += [f"{name} differs" for name in models if weights(first / name) != weights(second / name)]
    for name in names("benchmark/*.npz"):
        pairs = zip(*(benchmark.load_metrics(run / name) for run in (first, second)), strict=True)
        if any(a.name != b.name or not np.array_equal(a.items, b.items) for a, b in pairs):
            found.append(f"{name} differs")
    try:
        pd.testing.assert_frame_equal(*(timeless(run) for run in (first, second)))
    except AssertionError as error:
        found.append(f"results.csv: {str(error)[:300]}")
    left = [path for path in second.rglob("*") if "checkpoint" in path.name or path.name == "work"]
    left += [path for path in second.rglob(".*") if path.name != ".lock"]
    return found + [f"{path.relative_to(second)} was left behind" for path in left]


def weights(file: Path) -> dict[str, bytes]:
    """The tensors of a file, bit by bit; the file itself may say what it says about them in another order."""
    return {name: value.tobytes() for name, value in safetensors.numpy.load_file(file).items()}


def timeless(run: Path) -> pd.DataFrame:
    """The results without what depends on the clock: some metrics, and the seconds of curves."""
    table = read_results(run / "results.csv")
    table = table[~table["metric"].str.endswith(TIMES)]
    curves = table["stage"].isin(["condition", "distill"])
    return table.assign(x=table["x"].mask(curves)).reset_index(drop=True)


# -- rounds


class Tally:
    def __init__(self):
        self.kills = self.passed = self.failed = 0

    def settle(self, kills: int, wrong: list[str]) -> None:
        """A round is over: all of its kills have passed, or none."""
        self.kills += kills
        self.passed, self.failed = self.passed + (not wrong) * kills, self.failed + bool(wrong) * max(1, kills)
        for line in wrong:
            print(f"  FAILED {line}", flush=True)


def soak(kills: int, aim: list[str], overrides: dict, folder: Path, draw: random.Random, tally: Tally) -> None:
    """So many kills of the stages `aim`, drawn by their moments."""
    reference, counts = folder / "whole", folder / "counts.json"
    begun = time.monotonic()
    if code := ended(start(reference, overrides, counts=counts), 3600):
        raise SystemExit(f"the run without a stop ended with code {code}")
    whole, moments = time.monotonic() - begun, json.loads(counts.read_text())
    print(f"without a stop: {whole:.0f} s, moments: {moments}", flush=True)
    goal = tally.kills + kills
    for number in range(10 * kills):
        out, killed, code = folder / f"round-{number}", 0, None
        while code != 0 and tally.kills + killed < goal:
            left = [stage for stage in aim if not (out / "stages" / f"{stage}.json").exists()]
            if not left:
                break
            stage = draw.choices(left, [moments[stage] for stage in left])[0]
            moment, timed = draw.randint(1, moments[stage]), draw.random() < 1 / 3 and aim == STAGES
            seconds = draw.uniform(0, whole) if timed else 3600
            said = f"after {seconds:.2f} s" if timed else f"{stage}, moment {moment}"
            print(f"  round {number}, kill {tally.kills + killed + 1}: {said}", flush=True)
            code = ended(start(out, overrides, None if timed else (stage, moment)), seconds)
            killed += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                break
        code = ended(start(out, overrides), 3600)
        tally.settle(killed, differences(reference, out) if code == 0 else [f"round {number}: ended with code {code}"])
        shutil.rmtree(out, ignore_errors=True)
        if tally.kills >= goal:
            break


def soak_command(kills: int, overrides: dict, folder: Path, draw: random.Random, tally: Tally) -> None:
    """So many kills of whole `kdlib run`s, with their kernels."""

    def run(out: Path, seconds: float = 3600) -> tuple[int, str]:
        settings = [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        command = [sys.executable, "-m", "kdlib", "run", "--profile", "smoke", "--out", str(out), *settings]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                said = process.communicate(timeout=seconds)[0]
            except subprocess.TimeoutExpired:
                family = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for child in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                said = process.communicate()[0]
        return process.returncode, said

    reference, begun = folder / "whole-command", time.monotonic()
    code, said = run(reference)
    if code:
        raise SystemExit(f"kdlib run without a stop ended with code {code}: {said[-500:]}")
    whole, goal = time.monotonic() - begun, tally.kills + kills
    print(f"kdlib run without a stop: {whole:.0f} s", flush=True)
    for number in range(10 * kills):
        out, killed, code = folder / f"command-{number}", 0, None
        while code != 0 and tally.kills + killed < goal:
            seconds = draw.uniform(2, whole / 2)
            code, said = run(out, seconds)
            killed += code == -signal.SIGKILL
            done = sum((out / "stages" / f"{stage}.json").exists() for stage in NOTEBOOKS)
            print(f"  kdlib run {number}: {seconds:.1f} s, code {code}, {done} stages done", flush=True)
            if code not in (0, -signal.SIGKILL):
                break
        if code != 0:
            code, said = run(out)
        tally.settle(killed, differences(reference, out) if code == 0 else [f"command {number}: {said[-500:]}"])
        shutil.rmtree(out, ignore_errors=True)
        if tally.kills >= goal:
            break


@contextlib.contextmanager
def place(out: Path | None) -> Iterator[Path]:
    if out:
        out.mkdir(parents=True)
        yield out.resolve()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--aim", nargs="+", choices=STAGES, default=STAGES, help="stages to kill; then no `kdlib run`")
    parser.add_argument("--commands", type=int, help="kills of a whole `kdlib run` among them; default a tenth")
    parser.add_argument("--out", type=Path, help="a new folder for the runs; default a temporary one")
    arguments = parser.parse_args()
    commands = arguments.commands
    if commands is None:
        commands = arguments.kills // 10 if arguments.aim == STAGES else 0
    print(f"SEED={arguments.seed}", flush=True)
    draw, tally = random.Random(arguments.seed), Tally()
    with place(arguments.out) as folder:
        forked(write_study, folder)
        overrides = own_overrides(folder)
        if arguments.kills > commands:
            soak(arguments.kills - commands, arguments.aim, overrides, folder, draw, tally)
        if commands:
            soak_command(commands, overrides, folder, draw, tally)
    print(f"{tally.passed} passed, {tally.failed} failed")
    raise SystemExit(bool(tally.failed))


if __name__ == "__main__":
    main()
