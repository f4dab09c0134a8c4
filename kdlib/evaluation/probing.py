"""Probing: what an encoder knows of a language, measured without training the encoder."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedTokenizerFast

from kdlib.data.lazy import parts
from kdlib.data.tasks import Task
from kdlib.evaluation.baselines import majority, word_overlap_retrieval
from kdlib.evaluation.metrics import Metric, score, share_interval, summary
from kdlib.models.encoder import Encoder, first_tokens, text_vectors, word_vectors
from kdlib.models.tokenizer_files import token_ids

PENALTY = 0.05  # C of the logistic regression: strong regularisation, since there are as many features as texts


def segmentation(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> dict[str, float]:
    """How many tokens a tokenizer needs for texts.

    Returns:
        fertility: tokens per word (words are runs of non-space); tokens_per_character; unknown_rate: share of tokens
        that are the unknown token; split_words: share of words that are split into several tokens.

    References:
        Rust et al. (2021), *How Good is Your Tokenizer?*, section 3.
    """
    words: Counter[str] = Counter()
    characters = tokens = unknown = 0
    for some in parts(texts):
        words.update(word for text in some for word in text.split())
        characters += sum(map(len, some))
        for ids in token_ids(tokenizer, some):
            tokens, unknown = tokens + len(ids), unknown + ids.count(tokenizer.unk_token_id)  # pyright: ignore[reportArgumentType] - an int
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
    """Frozen features of a task.

    Args:
        encoder: any; it is not trained.
        task: classify and multilabel take the mean-pooled states of the text; pair takes those of both texts u and v
            as ``[u, v, |u - v|, u * v]``; tokens takes the state of each word's first token, so that items are words.
        layers: which layers, 0 = embeddings; default the last one.

    Returns:
        train [items, layers, features], test alike, and places: int [words, 2], the text and word that each test item
        of a tokens task is (empty for the other kinds).

    References:
        Conneau et al. (2017), *Supervised Learning of Universal Sentence Representations*, for the features of pairs.
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
    """Targets of the training features of `task_vectors`; both leave out words beyond max_length."""
    if task.kind != "tokens":
        return np.asarray(task.train.targets)
    skip = len(encoder.prefix.split())
    kept = [first_tokens(encoding.word_ids, skip) for encoding in encoder.tokenize(task.train.texts)]
    return np.array([task.train.targets[t][word] for t, words in enumerate(kept) for word, _ in words])


def linear_probe(
    task: Task,
    train: np.ndarray,
    targets: np.ndarray,
    test: np.ndarray,
    places: np.ndarray,
    seed: int = 0,
    share: float = 1.0,
    probe: BaseEstimator | None = None,
) -> list[Metric]:
    """Fit a logistic regression on frozen features; the task's metrics on its test rows.

    Args:
        task: says what the labels are, and holds the gold answers.
        train: [items, features].
        targets: of the training items.
        test: [items, features].
        places: of the test words, see `task_vectors`. A word that was truncated counts as the first label.
        seed: draws the share. The regression itself has no randomness.
        share: train on so large a random share of the items.
        probe: the regression, not fitted; default `classifier`, on standardised features.
    """
    if share < 1:
        rows = train.shape[0]  # a sparse matrix has no length
        count = max(2, round(rows * share))
        chosen = np.random.default_rng(seed).permutation(rows)[:count]
        train, targets = train[chosen], targets[chosen]
    if targets.ndim == 1 and len(np.unique(targets)) < 2:  # a small sample can hold one class only
        predicted = np.full(test.shape[0], targets[0])
    else:
        fitted = clone(probe or classifier(task.kind)).fit(train, targets)
        predicted = np.asarray(fitted.predict(test))
    if task.kind == "tokens":
        rows = [[0] * len(words) for words in task.test.texts]
        for (text, word), label in zip(places, predicted, strict=True):
            rows[text][word] = int(label)
        return score(task, rows)
    return score(task, predicted)


def best_layer(task: Task, train: np.ndarray, targets: np.ndarray, seed: int = 0) -> int:
    """The layer whose probe does best on a quarter of the training rows, which it is not trained on.

    Args:
        task: its kind says what the probe is.
        train: [items, layers, features].
        targets: of the training items.
        seed: draws the quarter.
    """
    order = np.random.default_rng(seed).permutation(len(train))
    held, fitted = np.split(order, [max(1, len(order) // 4)])
    if targets.ndim == 1 and len(np.unique(targets[fitted])) < 2:
        return train.shape[1] - 1
    average = "accuracy" if task.kind in ("classify", "pair") else "f1_macro"
    scorer = get_scorer(average)
    scores = [
        scorer(classifier(task.kind).fit(train[fitted, k], targets[fitted]), train[held, k], targets[held])
        for k in range(train.shape[1])
    ]
    return int(np.argmax(scores))


def classifier(kind: str) -> Pipeline:
    """The linear probe for a kind of task, not fitted yet: standardised features, then logistic regression."""
    regression = LogisticRegression(C=PENALTY, max_iter=300, tol=1e-3)
    return make_pipeline(StandardScaler(), OneVsRestClassifier(regression) if kind == "multilabel" else regression)


def probe_weights(fitted: Pipeline, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """A fitted `classifier` as one linear map of vectors as they are, without its scaler.

    Args:
        fitted: of kind classify or multilabel.
        labels: number of the task's labels.

    Returns:
        Weights [labels, features] and biases [labels]. With scores = vectors @ weights.T + biases the probabilities are
        the softmax of the scores for kind classify, and their logistic function for multilabel.
    """
    scaler, model = fitted[0], fitted[-1]
    weights = np.zeros((labels, len(scaler.mean_)))
    biases = np.full(labels, -1e4)  # a class without training rows has probability 0
    if isinstance(model, OneVsRestClassifier):
        for i, one in enumerate(model.estimators_):
            if isinstance(one, LogisticRegression):
                weights[i], biases[i] = one.coef_[0], np.ravel(one.intercept_)[0]
            elif one.predict(np.zeros((1, 1)))[0]:  # every row has this label
                biases[i] = 1e4
    elif len(model.classes_) == 2:  # scikit-learn has one row for two classes
        weights[model.classes_[1:]], biases[model.classes_] = model.coef_, [0, *np.ravel(model.intercept_)]
    else:
        weights[model.classes_], biases[model.classes_] = model.coef_, model.intercept_
    weights /= scaler.scale_
    return weights, biases - weights @ scaler.mean_


def layer_probe(encoder: Encoder, task: Task, train_rows: int, test_rows: int, seed: int = 0) -> list[dict]:
    """Rows of a linear probe at every layer (0 = embeddings), and a row of the majority baseline."""
    task, layers = task.small(train_rows, test_rows, seed), range(encoder.layers + 1)
    train, test, places = task_vectors(encoder, task, layers)
    targets = train_targets(encoder, task)
    shared = dict(task=task.name, method="layer probe")
    rows = []
    for k, layer in enumerate(layers):
        metrics = linear_probe(task, train[:, k], targets, test[:, k], places)
        rows.append(dict(model="teacher", layer=layer) | shared | summary(metrics[:1]))
    base = majority(task)[0]
    return [*rows, dict(model="majority", metric=base.name, value=base.value, n=len(task.test)) | shared]


def retrieval(queries: np.ndarray, targets: np.ndarray, centred: bool = False) -> np.ndarray:
    """Whether each query's nearest target by cosine is its translation: bool [rows].

    Args:
        queries: [rows, hidden].
        targets: [rows, hidden]; row i translates row i of the queries.
        centred: subtract each side's mean vector first, which removes the direction that tells languages apart.

    References:
        Libovický et al. (2020), *On the Language Neutrality of Pre-trained Multilingual Representations*.
    """

    def unit(x: np.ndarray) -> np.ndarray:
        x = x - x.mean(0) if centred else x
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)

    nearest = (unit(queries) @ unit(targets).T).argmax(1)
    return nearest == np.arange(len(queries))


def retrieval_rows(encoder: Encoder, parallel: dict[str, list[str]], language: str) -> list[dict]:
    """Translation retrieval from `language` to each other language, at every layer, plain and centred, and by words."""
    layers = range(encoder.layers + 1)
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
    """Linear centred kernel alignment of two sets of states [rows, features] of the same rows, between 0 and 1.

    References:
        Kornblith et al. (2019), *Similarity of Neural Network Representations Revisited*, eq. 5 with linear kernels.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / max(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y), 1e-12))


def cka_rows(encoder: Encoder, texts: Sequence[str]) -> list[dict]:
    """Linear CKA of the mean-pooled states of every pair of layers: rows of layer and x.

    The row "cka_floor" is that of layers with themselves on shuffled texts, averaged: with few texts it is far above 0.
    """
    count = encoder.layers + 1
    states = text_vectors(encoder, texts, range(count), f"{encoder.name}: layers")
    table = np.eye(count)
    for i, j in itertools.combinations(range(count), 2):
        table[i, j] = table[j, i] = linear_cka(states[:, j], states[:, i])
    shared = dict(model="teacher", metric="cka", n=len(texts))
    rows = [shared | dict(layer=i, x=j, value=value) for (i, j), value in np.ndenumerate(table)]
    shuffled = np.random.default_rng(0).permutation(len(texts))
    floor = np.mean([linear_cka(states[:, k], states[shuffled, k]) for k in range(count)])
    return [*rows, shared | dict(metric="cka_floor", value=float(floor))]


def similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of two encoders' vectors of each text, [texts, hidden] each, centred on their means: float [texts]."""
    x, y = (torch.from_numpy(vectors - vectors.mean(0)) for vectors in (a, b))
    return torch.cosine_similarity(x, y).numpy()


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The mean of `similarities`: 1 is a perfect copy."""
    return float(similarities(a, b).mean())
