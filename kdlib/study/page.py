"""A page that runs a run's student in the browser: a folder of files for any web server."""

import json
import shutil
import subprocess
import tempfile
from base64 import b64encode
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.data.corpus import draw, load_corpus, sentences
from kdlib.data.tasks import Task, load_task
from kdlib.errors import UserError
from kdlib.evaluation.metrics import METRICS, headline
from kdlib.evaluation.probing import classifier, probe_weights
from kdlib.files import cache_folder, fingerprint, new_folder
from kdlib.models import embedded_teacher
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.models.loading import load_encoder, prefix_of
from kdlib.models.onnx import FILES, FOLDER, export_student, load_exported
from kdlib.progress import track
from kdlib.study.export import student_folder
from kdlib.study.run import Run

SENTENCES = 400  # to search: a second of work for Python, a millisecond for a phone
EXAMPLES, SHORT = 4, 70  # sentences to start with, and their length in characters at most
SOURCE = resources.files("kdlib.study") / "page_files"
OWN = ("index.html", "page.css", "page.js", "offline.js")
VENDOR = {  # what the page loads, and the file of an npm package that it is
    "transformers.js": "@huggingface/transformers/dist/transformers.web.min.js",
    "ort.js": "onnxruntime-web/dist/ort.wasm.min.mjs",
    "ort-wasm.js": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
}


def make_page(run_dir: Path, target: Path) -> float:
    """Write the page of a run's student.

    The page loads its own files only: the student's 8-bit ONNX file, its tokenizer, a linear probe for each probed task
    of whole texts, `SENTENCES` held-out sentences with their vectors, and the packages that run the model.

    Args:
        run_dir: the folder of the run.
        target: the folder to write, or an older page to replace.

    Returns:
        Its size in megabytes.

    Raises:
        UserError: where there is no student, the optional packages or npm are missing, or `target` holds other files.
    """
    student = student_folder(run_dir)
    if target.exists() and not (target.is_dir() and ((target / "data.json").is_file() or not any(target.iterdir()))):
        raise UserError(f"{target}: holds other files; name a new folder for the page")
    vendored = vendor_folder()
    run = Run(run_dir)
    profile, teacher = run.profile, run.profile.teacher
    with run.lock():
        encoder = load_encoder(student, "student", prefix_of(teacher), teacher.max_length)
        if not (student / FOLDER / FILES["onnx int8"]).is_file():
            export_student(encoder, student)
        corpus = load_corpus(profile.corpus, profile.language, profile.seed, run.path / "cache")
        tasks = [load_task(spec, corpus) for spec in profile.tasks if spec.probe]
        heldout = draw(sentences(corpus.heldout), SENTENCES, 1.0, profile.seed)
    data = {
        "profile": profile.name, "code": profile.language, "layers": encoder.layers, "parameters": encoder.parameters,
        "teacher": embedded_teacher.NAME if teacher.source == "embedded" else Path(teacher.source).name,
        "megabytes": (student / FOLDER / FILES["onnx int8"]).stat().st_size / 1e6,
        "scores": score_table(run.results()),
        **page_data(load_exported(student), tasks, list(heldout), profile.benchmark.probe_rows),
    }  # fmt: skip
    with new_folder(target) as work:
        for name in OWN:
            (work / name).write_bytes((SOURCE / name).read_bytes())
        shutil.copytree(vendored, work / "vendor")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", f"onnx/{FILES['onnx int8']}"):
            file = work / "model" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(student / FOLDER / Path(name).name, file)
        data["bytes"] = _size(work / "model") + (work / "vendor" / "ort-wasm.wasm").stat().st_size
        (work / "data.json").write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    return _size(target) / 1e6


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def page_data(encoder: Encoder, tasks: Sequence[Task], texts: list[str], probe_rows: int | None) -> dict[str, Any]:
    """What the page computes with: probes, sentences and their vectors, as JSON-like values.

    Args:
        encoder: the student as the page runs it, with 8-bit weights.
        tasks: those of pairs and words are left out.
        texts: the sentences to search.
        probe_rows: training rows of a probe at most; None: all.
    """
    probes, examples = [], []
    for task in tasks:
        if task.kind not in ("classify", "multilabel"):
            continue
        train = task.train.take(probe_rows)
        vectors = _vectors(encoder, train.texts, task.name)
        fitted = classifier(task.kind).fit(vectors, np.asarray(train.targets))
        weights, bias = probe_weights(fitted, len(task.labels))
        probe = {"name": task.name, "kind": task.kind, "labels": task.labels}
        probes.append(probe | {"weights": _packed(weights), "bias": bias.tolist()})
        examples += [text for text in task.test.texts if len(text) <= SHORT][: EXAMPLES // 2]
    vectors = _vectors(encoder, texts, "sentences")
    mean = vectors.mean(0)
    units = vectors - mean
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-9)
    return {
        "prefix": encoder.prefix, "max_length": encoder.max_length, "probes": probes, "sentences": texts,
        "mean": _packed(mean), "units": _packed(units),
        "examples": (examples or [text for text in texts if len(text) <= SHORT])[:EXAMPLES],
    }  # fmt: skip


def _vectors(encoder: Encoder, texts: Sequence[str], label: str) -> np.ndarray:
    """Vectors [texts, hidden], one text at a time as in the page: the 8-bit activations of a batch share a scale."""
    return np.concatenate([text_vectors(encoder, [text], label="")[:, 0] for text in track(texts, f"{label}: vectors")])


def _packed(array: np.ndarray) -> str:
    return b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def score_table(results: pd.DataFrame) -> list[list[str]]:
    """Rows of task, metric, scores of teacher and student, and test items: the linear probes of a run."""
    names = {headline(kind) for kind in METRICS}
    rows = results.query("stage == 'benchmark' and method == 'probe' and seed.isna()")
    table = []
    for task, group in rows[rows["metric"].isin(names)].groupby("task", sort=False):
        group = group[group["metric"] == group["metric"].iloc[0]].set_index("model")  # the headline metric comes first
        both = group.loc[["teacher", "student"]].itertuples()
        shown = [f"{row.value:.1%} [{row.low:.1%}, {row.high:.1%}]" for row in both]
        texts = [str(name).replace("_", " ") for name in (task, group["metric"].iloc[0])]
        table.append([*texts, *shown, f"{group.loc['student', 'n']:,}"])
    return table


def vendor_folder() -> Path:
    """The folder of the npm packages' files that a page loads, with their licences. npm fetches them once a machine.

    Raises:
        UserError: where npm is missing or fails.
    """
    lock = (SOURCE / "package-lock.json").read_text("utf-8")
    folder = cache_folder() / f"page-{fingerprint(lock, VENDOR)}"
    if folder.is_dir():
        return folder
    if not (npm := shutil.which("npm")):
        raise UserError("a page needs npm, once: install Node.js 18 or later")
    with new_folder(folder) as work, tempfile.TemporaryDirectory() as place:
        for name in ("package.json", "package-lock.json"):
            Path(place, name).write_bytes((SOURCE / name).read_bytes())
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
            raise UserError(f"npm could not fetch the page's packages ({reason}); is there a network?")
        packages = Path(place, "node_modules")
        for name, file in VENDOR.items():
            shutil.copy(packages / file, work / name)
        (work / "LICENSES.txt").write_text("\n\n".join(_licences(packages)), "utf-8")
    return folder


def _licences(packages: Path) -> Iterator[str]:
    """The name, version, licence and, where it has one, the licence's text of every package."""
    for file in sorted(packages.rglob("package.json")):
        about = json.loads(file.read_text("utf-8"))
        if "name" in about and "version" in about:
            texts = [text.read_text("utf-8") for text in sorted(file.parent.glob("LICEN[CS]E*"))]
            yield "\n".join([f"{about['name']} {about['version']}: {about.get('license', '')}", *texts])
