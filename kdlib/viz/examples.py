"""Models on single texts: nearest neighbours and predicted labels."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.pipeline import Pipeline

from kdlib.data.tasks import Task
from kdlib.errors import UserError
from kdlib.evaluation.probing import classifier
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.viz.explore import token_states
from kdlib.viz.html import bar, escape, html_table, mark, page, paragraph, tint
from kdlib.viz.style import LOOKS, PALETTE


@dataclass
class Index:
    """Texts and an encoder's unit vectors of them [texts, hidden], centred on `mean` [hidden]."""

    encoder: Encoder
    texts: list[str]
    mean: np.ndarray
    units: np.ndarray


def build_index(encoder: Encoder, texts: Sequence[str], vectors: np.ndarray | None = None) -> Index:
    """Index texts for `nearest`. `vectors`: float [texts, hidden]; computed if not given."""
    vectors = text_vectors(encoder, list(texts))[:, 0] if vectors is None else np.asarray(vectors, np.float32)
    need = (len(texts), *text_vector(encoder, "").shape)
    if vectors.shape != need:
        raise UserError(f"vectors are {vectors.shape}; {len(texts)} texts of {encoder.name} need {need}")
    mean = vectors.mean(0)
    return Index(encoder, list(texts), mean, _unit_rows(vectors - mean))


def _unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def nearest(index: Index, query: str, count: int = 5) -> pd.DataFrame:
    """The texts most similar to the query, best first: text, cosine (of centred vectors). Without the query."""
    cosine = index.units @ _unit_rows(text_vector(index.encoder, query) - index.mean)
    best = [i for i in np.argsort(-cosine, kind="stable") if index.texts[i] != query][:count]
    return pd.DataFrame({"text": [index.texts[i] for i in best], "cosine": cosine[best].astype(float)})


def text_vector(encoder: Encoder, text: str) -> np.ndarray:
    """The vector of one text: float32 [width]; as `text_vectors`, without its progress bar."""
    states = token_states(encoder, encoder.tokenize([text])[0].ids).unsqueeze(0)
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    return encoder.sentence.to(states.device)(states, mask)[0].cpu().numpy()


def neighbours_html(found: Mapping[str, pd.DataFrame], query: str) -> str:
    """Neighbours by each model side by side. Texts that all models found are marked."""
    both = set.intersection(*(set(table["text"]) for table in found.values()))
    count = max(map(len, found.values()))
    rows = []
    for i in range(count):
        row = [f"{i + 1}"]
        for table in found.values():
            text, cosine = table.iloc[i] if i < len(table) else ("", np.nan)
            look = f"background:{tint(PALETTE[0], 0.2)};color:#222"
            shown = f'<span style="{look}">✓ {escape(text)}</span>' if text in both else escape(text)
            row.append(f"{shown} <small>({cosine:.2f})</small>" if text else "")
        rows.append(row)
    said = f"Of {count} neighbours <b>{len(both)}</b> are found by all (✓). In brackets the cosine."
    return page(
        paragraph(f"Nearest to: <i>{escape(query)}</i>"), html_table(["", *map(escape, found)], rows), paragraph(said)
    )


Classify = Callable[[str], dict[str, float]]


def probe_classifier(encoder: Encoder, task: Task, rows: int | None = 1000) -> Classify:
    """A function from a text to the probability of each label: a linear probe on frozen vectors.

    Args:
        encoder: the model.
        task: of kind classify or multilabel.
        rows: training rows at most; None: all.

    Raises:
        UserError: for tasks on pairs or words.
    """
    if task.kind not in ("classify", "multilabel"):
        raise UserError(
            f"task {task.name} is of kind {task.kind}; a sentence alone has labels in classify and multilabel"
        )
    train = task.train.take(rows)
    pipeline: Pipeline = classifier(task.kind)
    pipeline.fit(
        text_vectors(encoder, train.texts, label=f"{encoder.name}: {task.name}")[:, 0], np.asarray(train.targets)
    )
    # A class without a training row has no column.
    classes = range(len(task.labels)) if task.kind == "multilabel" else pipeline.classes_

    def classify(text: str) -> dict[str, float]:
        shares = pipeline.predict_proba(text_vector(encoder, text)[None])[0]
        return dict.fromkeys(task.labels, 0.0) | {task.labels[c]: float(p) for c, p in zip(classes, shares)}

    return classify


def timed(classify: Classify, text: str, repeats: int = 3) -> tuple[dict[str, float], float]:
    """The labels of a text and the median time in milliseconds, after one call to warm up."""
    answer, spent = classify(text), []
    for _ in range(repeats):
        start = time.perf_counter()
        classify(text)
        spent.append(1000 * (time.perf_counter() - start))
    return answer, float(np.median(spent))


def labels_html(answers: Mapping[str, tuple[dict[str, float], float]]) -> str:
    """Labels with probabilities by each model side by side, most probable first, and the time each took."""
    first = next(iter(answers.values()))[0]
    labels = sorted(first, key=lambda label: -first[label])
    rows = []
    for label in labels:
        row = [escape(label)]
        for name, (shares, _) in answers.items():
            percent = f"{shares[label]:.1%}"
            top = label == max(shares, key=shares.get)
            colour = LOOKS[name].colour if name in LOOKS else PALETTE[2]
            row.append(bar(shares[label], colour, mark(percent) if top else percent))
        rows.append(row)
    rows.append(["<i>time for this text</i>", *(f"<i>{ms:.1f} ms</i>" for _, ms in answers.values())])
    return page(html_table(["", *map(escape, answers)], rows))


def written(task: Task, text: str | tuple[str, str] | list[str], target: int | list[int]) -> str:
    """The text of a task's row as a reader sees it: a pair with a slash, words each followed by their tag if any."""
    if isinstance(text, tuple):
        return " / ".join(text)
    if isinstance(text, str):
        return text
    tags = [task.labels[tag] for tag in target]
    return " ".join(word if tag == "O" else f"{word} [{tag}]" for word, tag in zip(text, tags))
