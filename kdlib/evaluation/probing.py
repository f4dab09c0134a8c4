"""Probing: what an encoder knows of a language, measured without training the encoder."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedTokenizerFast

from kdlib.data.lazy import parts
from kdlib.data.tasks import Task
from kdlib.evaluation.baselines import majority, word_overlap_retrieval
from kdlib.evaluation.metrics import Metric, interval, score, share_interval
from kdlib.models.encoder import Encoder, text_vectors, word_vectors
from kdlib.models.tokenizer_files import token_ids

PENALTY = 0.05  # C of the logistic regression: strong, since there are as many features as texts


def segmentation(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> dict[str, float]:
    """How finely a tokenizer cuts texts.

    fertility: tokens per word (words are runs of non-space); tokens_per_character; unknown_rate: share of tokens that
    are the unknown token; split_words: share of words cut into several tokens. Source: Rust et al. 2021, section 3.
    """
    words: Counter[str] = Counter()
    characters = tokens = unknown = 0
    for some in parts(texts):
        words.update(word for text in some for word in text.split())
        characters += sum(map(len, some))
        for ids in token_ids(tokenizer, some):
            tokens, unknown = tokens + len(ids), unknown + ids.count(tokenizer.unk_token_id)
    split = sum(count for ids, count in zip(token_ids(tokenizer, words), words.values()) if len(ids) > 1)
    return {
        "fertility": tokens / max(1, words.total()),
        "tokens_per_character": tokens / max(1, characters),
        "unknown_rate": unknown / max(1, tokens),
        "split_words": split / max(1, words.total()),
    }


def task_vectors(
    encoder: Encoder, task: Task, layers: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frozen features of a task: train [items, layers, features], test alike, and the places of the test words.

    classify and multilabel: the mean-pooled states of the text. pair: of both texts u and v, [u, v, |u - v|, u * v]
    (Conneau et al. 2017). tokens: the state of each word's first token; items are words then, and places int
    [words, 2] says which text and word each is (empty for the other kinds).
    """
    label = f"{encoder.name}: {task.name}"
    if task.kind == "tokens":
        train, _ = word_vectors(encoder, task.train.texts, layers, label)
        test, places = word_vectors(encoder, task.test.texts, layers, label)
        return train, test, places

    def vectors(texts: list) -> np.ndarray:
        if task.kind != "pair":
            return text_vectors(encoder, texts, layers, label)
        unique = list(dict.fromkeys(part for pair in texts for part in pair))
        place = {text: i for i, text in enumerate(unique)}
        states = text_vectors(encoder, unique, layers, label)
        u, v = (states[[place[pair[side]] for pair in texts]] for side in (0, 1))
        return np.concatenate([u, v, np.abs(u - v), u * v], -1)

    return vectors(task.train.texts), vectors(task.test.texts), np.empty((0, 2), int)


def train_targets(encoder: Encoder, task: Task) -> np.ndarray:
    """Targets in the order of the training features of `task_vectors`.

    Words beyond max_length are left out there too.
    """
    if task.kind != "tokens":
        return np.asarray(task.train.targets)
    kept = encoder.tokenize(task.train.texts)
    skip = len(encoder.prefix.split())
    seen = [sorted({w - skip for w in e.word_ids if w is not None and w >= skip}) for e in kept]
    return np.array([task.train.targets[t][w] for t, words in enumerate(seen) for w in words])


def linear_probe(
    task: Task,
    train: np.ndarray,
    targets: np.ndarray,
    test: np.ndarray,
    places: np.ndarray,
    seed: int = 0,
    share: float = 1.0,
) -> list[Metric]:
    """Logistic regression on standardised frozen features; the task's metrics on its test rows.

    train, test: [items, features]. share: train on so large a random share of the items, drawn with `seed`; this is
    where the seeds of a probe differ, for the regression itself has no randomness. A test word that was cut off counts
    as the first label.
    """
    if share < 1:
        count = max(2, round(len(train) * share))
        chosen = np.random.default_rng(seed).permutation(len(train))[:count]
        train, targets = train[chosen], targets[chosen]
    if targets.ndim == 1 and len(np.unique(targets)) < 2:  # so few items that one class is all there is
        predicted = np.full(len(test), targets[0])
    else:
        predicted = classifier(task.kind).fit(train, targets).predict(test)
    if task.kind == "tokens":
        rows = [[0] * len(words) for words in task.test.texts]
        for (text, word), label in zip(places, predicted):
            rows[text][word] = int(label)
        return score(task, rows)
    return score(task, predicted)


def classifier(kind: str) -> Pipeline:
    regression = LogisticRegression(C=PENALTY, max_iter=300, tol=1e-3)
    return make_pipeline(StandardScaler(), OneVsRestClassifier(regression) if kind == "multilabel" else regression)


def layer_probe(encoder: Encoder, task: Task, train_rows: int, test_rows: int, seed: int = 0) -> list[dict]:
    """A linear probe at every layer (0 = embeddings); with the majority's.

    Rows of layer, metric, value, low, high, n.
    """
    small = task.small(train_rows, test_rows, seed)
    layers = range(encoder.layers + 1)
    train, test, places = task_vectors(encoder, small, layers)
    targets = train_targets(encoder, small)
    rows = []
    for k, layer in enumerate(layers):
        metric = linear_probe(small, train[:, k], targets, test[:, k], places)[0]
        low, high = interval([metric])
        rows.append(
            dict(
                model="teacher",
                task=task.name,
                method="layer probe",
                metric=metric.name,
                layer=layer,
                value=metric.value,
                low=low,
                high=high,
                n=len(small.test),
            )
        )
    base = majority(small)[0]
    return rows + [
        dict(
            model="majority",
            task=task.name,
            method="layer probe",
            metric=base.name,
            value=base.value,
            n=len(small.test),
        )
    ]


def retrieval(queries: np.ndarray, targets: np.ndarray, centred: bool = False) -> np.ndarray:
    """Whether each query's nearest target by cosine is its translation: bool [rows].

    queries, targets: [rows, hidden], row i of one translates row i of the other. centred: subtract each side's mean
    vector first, which takes out the direction that says which language a text is in (Libovický et al. 2020).
    """

    def unit(x: np.ndarray) -> np.ndarray:
        x = x - x.mean(0) if centred else x
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)

    nearest = (unit(queries) @ unit(targets).T).argmax(1)
    return nearest == np.arange(len(queries))


def retrieval_rows(encoder: Encoder, parallel: dict[str, list[str]], language: str) -> list[dict]:
    """Translation retrieval from `language` to each other language, at every layer, plain and centred, and by words."""
    layers = list(range(encoder.layers + 1))
    states = {code: text_vectors(encoder, texts, layers, f"{encoder.name}: {code}") for code, texts in parallel.items()}
    rows = []
    for other in parallel:
        if other == language:
            continue
        base = dict(metric="retrieval", language=other, n=len(parallel[other]))
        for method, centred in (("plain", False), ("centred", True)):
            for k, layer in enumerate(layers):
                hits = retrieval(states[language][:, k], states[other][:, k], centred)
                rows.append(base | dict(model="teacher", method=method, layer=layer) | share_interval(hits))
        hits = word_overlap_retrieval(parallel[language], parallel[other])
        rows.append(base | dict(model="word overlap", method="baseline") | share_interval(hits))
    return rows


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of states [rows, features] of the same rows, in 0..1
    (Kornblith et al. 2019, eq. 5 with linear kernels)."""
    x, y = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / max(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y), 1e-12))


def cka_rows(encoder: Encoder, texts: Sequence[str]) -> list[dict]:
    """Linear CKA of the mean-pooled states of every pair of layers."""
    states = text_vectors(encoder, texts, range(encoder.layers + 1), f"{encoder.name}: layers")
    count = encoder.layers + 1
    table = np.eye(count)
    for i in range(count):
        for j in range(i):
            table[i, j] = table[j, i] = linear_cka(states[:, i], states[:, j])
    return [
        dict(model="teacher", metric="cka", layer=i, x=j, value=table[i, j], n=len(texts))
        for i in range(count)
        for j in range(count)
    ]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of two encoders' vectors of the same texts, each centred on its mean: 1 is a perfect copy."""
    a, b = (torch.from_numpy(x - x.mean(0)) for x in (a, b))
    return float(torch.cosine_similarity(a, b).mean())
