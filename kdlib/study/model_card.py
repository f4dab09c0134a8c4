"""The model card in a student's folder."""

from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kdlib.config import Init
from kdlib.errors import UserError
from kdlib.evaluation.metrics import headline
from kdlib.files import new_file, read_json
from kdlib.models import embedded_teacher
from kdlib.models.safetensors_files import HEAD_FILE
from kdlib.models.sentence import SentenceVector, read_sentence
from kdlib.study.stage import Settings

TEMPLATE = Path(__file__).with_suffix(".md")
OWN_CORPUS = (
    "the kit's own Tagalog corpus: CC0, machine-written, reread in part, not reviewed as a whole by a native speaker"
)


class CardFacts(Settings):
    """How a student was made; teacher and corpus are the sources in the profile."""

    language: str | list[str]
    teacher: str
    prefix: str
    max_length: int
    corpus: str
    characters: str
    layers: int
    init: Init
    epochs: float
    objectives: list[str]


def write_card(
    folder: Path, facts: CardFacts, run: Path, results: pd.DataFrame | None = None, model: str = "student"
) -> None:
    """Write README.md into a student's folder.

    Args:
        folder: a Hugging Face folder.
        facts: how the student was made.
        run: the run folder, whose `sources.json` says what was read.
        results: the run's table of results; None: nothing is measured yet.
        model: what the results call this student.

    Raises:
        UserError: where the folder cannot be written. An older card stays then.
    """
    embedded = facts.teacher == "embedded"
    teacher, licence = (embedded_teacher.NAME, "mit") if embedded else (facts.teacher, "other")
    measured = [] if results is None else card_results(results, model)
    about = ModelCardData(
        **(dict(model_name=f"{teacher.split('/')[-1]}-{facts.language}", eval_results=measured) if measured else {}),
        language=facts.language, license=licence, base_model=teacher, library_name="transformers",
        pipeline_tag="feature-extraction", tags=["distillation", "vocabulary-pruning"],
    )  # fmt: skip
    card = ModelCard.from_template(
        about, str(TEMPLATE), facts=facts, teacher=teacher, license=licence,
        language=facts.language if isinstance(facts.language, str) else " and ".join(facts.language),
        corpus=OWN_CORPUS if facts.corpus == "embedded" else facts.corpus,
        layers=_counted(facts.layers, "layer"), passes=_counted(facts.epochs, "pass", "passes"),
        head_file=HEAD_FILE if (folder / HEAD_FILE).is_file() else "",
        sentence=read_sentence(lambda name: path if (path := folder / name).is_file() else None, folder)
        or SentenceVector(),
        data=_data(run), numbers=_numbers(results, model),
    )  # fmt: skip
    with new_file(folder / "README.md") as path:
        path.write_text(card.content, "utf-8")


def card_results(results: pd.DataFrame, model: str) -> list[EvalResult]:
    """The rows of stage "mteb" as metadata of a model card (model-index), which the hub shows."""
    rows = results[(results["stage"] == "mteb") & (results["model"] == model)]
    return [
        EvalResult(
            task_type="feature-extraction", dataset_type=f"mteb/{row['task']}", dataset_name=f"MTEB {row['task']}",
            dataset_config=row["language"], dataset_split=row["method"], metric_type=row["metric"],
            metric_value=round(float(row["value"]), 4),
        )
        for _, row in rows.iterrows()
    ]  # fmt: skip


def _data(run: Path) -> str:
    """A line for the corpus and each task: source, commit, sizes, sha256 of the content."""
    try:
        read = read_json(run / "sources.json")
    except UserError:
        return "No text was read yet."
    lines = ["| what | source | commit | sizes | sha256 |", "| --- | --- | --- | --- | --- |"]
    for name, origin in {"corpus (documents)": read["corpus"], **read.get("corpora", {}), **read["tasks"]}.items():
        sizes = ", ".join(f"{split} {count:,}" for split, count in origin["rows"].items())
        commit = (origin["revision"] or "")[:12]
        lines.append(f"| {name} | {origin['source']} | {commit} | {sizes} | {origin['sha256'][:12]} |")
    return "\n".join(lines)


def _numbers(results: pd.DataFrame | None, model: str) -> str:
    """The scores of teacher and student with their intervals."""
    best = {"score"} | {headline(kind) for kind in ("classify", "multilabel", "tokens")}
    rows: Any = pd.DataFrame(columns=["method"]) if results is None else results.query("stage == 'benchmark'")
    if len(rows):
        rows = rows[rows["model"].isin(["teacher", model]) & rows["seed"].isna() & rows["metric"].isin(best)]
        rows = rows[rows["method"].isin(["probe", "finetune"])].drop_duplicates(["model", "method", "task"])
    if rows.empty:
        return "Not measured yet: run the benchmark (notebook 04)."
    lines = ["| how | task | metric | teacher | student | test items |", "| --- | --- | --- | --- | --- | --- |"]
    for (method, task), group in rows.groupby(["method", "task"], sort=False):
        by = {row.model: f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in group.itertuples()}
        first, scores = group.iloc[0], f"{by.get('teacher', '')} | {by.get(model, '')}"
        lines.append(f"| {method} | {task} | {first['metric']} | {scores} | {first['n']} |")
    kept = results[(results["metric"] == "retention") & (results["method"] == "probe") & (results["model"] == model)]
    shares = [
        f"{row['value']:.0%} [{row['low']:.0%}, {row['high']:.0%}] of {what}"
        for what, mean in (("the tasks with room", "with room"), ("all tasks", "average"))
        for _, row in kept[kept["task"] == mean].iterrows()
    ]
    text = "\n".join(lines) + "\n\nBrackets: 95% bootstrap intervals over seeds and test items."
    if shares:
        text += (
            f"\nOf the teacher's probe score above chance the student keeps, averaged over tasks: {'; '.join(shares)}. "
            "A task has room if the teacher is surely better than TF-IDF, static token vectors and random weights."
        )
    return text


def _counted(number: float, one: str, more: str = "") -> str:
    return f"{number:g} {one if number == 1 else more or one + 's'}"
