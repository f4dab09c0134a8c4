"""Two processes under torchrun make the student that one makes, and leave one set of files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from kdlib import config, distributed
from kdlib.distillation.distill import distill
from kdlib.distillation.objectives import OBJECTIVES
from kdlib.distillation.student_init import build_student
from kdlib.distillation.tokenized_corpus import Pairs, prepare
from kdlib.models.mlm_head import new_head
from kdlib.study.study import distill_run

pytestmark = pytest.mark.slow

STATES = {
    "hidden": 1.0, "sentence": 0.5, "cosine": 0.5, "tinybert_hidden": 0.1, "similarity": 1.0, "alignment": 0.5,
    "crosslingual": 1.0, "transport": 1.0,
}  # fmt: skip
CASES = {  # objectives, tokens a batch: few enough for batches of one text, which leave a process without any
    "cached": (STATES, 20),
    "live": (dict.fromkeys(OBJECTIVES, 1.0) | {"tinybert_attention": 0.1}, 64),
}


def curves(folder: Path) -> dict[str, pd.DataFrame]:
    """The curve of each case's training."""
    found = {}
    for name, (objectives, budget) in CASES.items():
        teacher = tiny.encoder()
        teacher.head = new_head(teacher.model, seed=4)
        spec = config.Distill(objectives=objectives, epochs=1.0, learning_rate=2e-3, evaluations=2, compile=False)
        spec = spec.model_copy(
            update={"batch_tokens": budget, "relation_heads": 4}
        )  # smaller than a profile may have it
        with distributed.main_process_first():
            pairs = Pairs(tiny.texts(12, 5), tiny.texts(12, 6), teacher)
            sets = [prepare(teacher, tiny.texts(*size), spec, folder / "cache", 2, pairs) for size in ((41, 0), (9, 1))]
        student = build_student(teacher.model, config.Student(layers=2))
        found[name] = distill(teacher, student, *sets, spec, folder / name).curve
    return found


def study(folder: Path) -> dict:
    """Sources of a small study, and what names them."""
    tiny.encoder().save(folder / "teacher")
    (folder / "corpus.txt").write_text("\n\n".join("\n".join(tiny.texts(4, seed)) for seed in range(20)))
    rows = [f"{text},{len(text.split()) > 3}" for text in dict.fromkeys(tiny.texts(60, 99, 7))]
    (folder / "labels.csv").write_text("text,label\n" + "\n".join(rows))
    return {
        "language": "ceb", "parallel": None, "teacher.source": str(folder / "teacher"), "teacher.max_length": 32,
        "corpus.source": str(folder / "corpus.txt"),
        "tasks": [{"name": "length", "source": str(folder / "labels.csv")}],
        "vocabulary.prune": False, "student.layers": 2, "distill.batch_tokens": 128, "distill.precision": "fp32",
        "ablations.arms": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The folder in which two processes have done `main`."""
    folder = tmp_path_factory.mktemp("twins")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out loss") == 1
    return folder


@pytest.mark.parametrize("name", CASES)
def test_curves_are_those_of_one_process(name, twins, tmp_path_factory):
    alone = curves(tmp_path_factory.mktemp("alone"))[name]
    both = [pd.read_csv(twins / f"{name}-{place}.csv") for place in (0, 1)]
    losses = [column for column in alone if column not in ("split", "step", "seconds")]
    assert len(alone) > 5 and list(alone["step"]) == list(both[0]["step"])
    assert alone[losses].notna().mean().min() > 0.5  # a point without translations has no loss of them
    for curve in both:  # what each process has summed up is of both
        assert np.allclose(alone[losses], curve[losses], rtol=2e-4, atol=1e-6, equal_nan=True)
    assert alone["loss"].iloc[-1] < 0.98 * alone["loss"].iloc[0]


def test_the_study_of_two_processes_is_that_of_one(twins, tmp_path):
    distill_run(tmp_path / "run", "smoke", study(tmp_path))
    runs = [pd.read_csv(run / "student" / "curve.csv") for run in (tmp_path / "run", twins / "run")]
    assert np.allclose(runs[0]["loss"], runs[1]["loss"], rtol=1e-4)
    both = (tmp_path / "run", twins / "run")
    files = [{re.sub("-[0-9a-f]{12}", "", str(file.relative_to(run))) for file in run.rglob("*")} for run in both]
    assert {file for file in files[0] if "cache" not in file} == {file for file in files[1] if "cache" not in file}
    assert "artefacts/student/model.safetensors" in files[1] and (twins / "run" / "student" / "README.md").is_file()
    assert not [name for name in files[1] if "checkpoint" in name]


def main(folder: Path) -> None:
    distributed.join(torch.device("cpu"))
    for name, curve in curves(folder).items():
        curve.to_csv(folder / f"{name}-{distributed.rank()}.csv")
    with distributed.main_process_first():
        sources = study(folder) if distributed.rank() == 0 else None
    if said := distill_run(folder / "run", "smoke", distributed.broadcast(sources)):
        print(said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
