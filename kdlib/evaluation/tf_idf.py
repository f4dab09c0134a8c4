"""The control that reads no language model: a linear classifier on weighted counts of letters and words (TF-IDF)."""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion

from kdlib.data.tasks import Task
from kdlib.evaluation.metrics import Metric
from kdlib.evaluation.probing import linear_probe

STRENGTHS = (1.0, 10.0, 100.0)  # C of the regression, chosen on the training rows
FOLDS = 3


class TfIdf:
    """A contestant of the benchmark that is no encoder."""

    name = "tf-idf"


def tf_idf(task: Task, share: float = 1.0) -> Callable[[int], list[Metric]]:
    """A logistic regression on TF-IDF features, tested like a linear probe.

    Features are runs of 2 to 5 characters within words, single words and pairs of words. Of a pair of texts they are
    those of both texts and of the words they share; of a word (kind tokens) those of the word and its neighbours.

    Args:
        task: what is trained and tested on.
        share: each seed trains on so large a random share of the rows, the same rows as in `linear_probe`.

    Returns:
        A function from a seed to the metrics on the test rows. The strength of the regularisation is chosen once, by
        cross-validation on the training rows.
    """
    train, test = _features(*(_parts(task.kind, split.texts) for split in (task.train, task.test)), task.kind)
    targets, places = np.asarray(task.train.targets) if task.kind != "tokens" else None, np.empty((0, 2), int)
    if targets is None:
        targets = np.array([tag for tags in task.train.targets for tag in tags])
        places = np.array([(t, w) for t, words in enumerate(task.test.texts) for w in range(len(words))], int)
    regression = _regression(task.kind, _strength(task.kind, train, targets))
    return lambda seed: linear_probe(task, train, targets, test, places, seed, share, regression)


def _parts(kind: str, texts: list) -> list[list[str]]:
    """The strings that features are taken of: a list for each part of an item."""
    if kind == "pair":
        shared = [" ".join(sorted(set(a.lower().split()) & set(b.lower().split()))) for a, b in texts]
        return [[a for a, _ in texts], [b for _, b in texts], shared]
    if kind == "tokens":
        rows = [["", *words, ""] for words in texts]
        return [[word for row in rows for word in row[k : len(row) - 2 + k]] for k in (1, 0, 2)]
    return [texts]


def _features(train: list[list[str]], test: list[list[str]], kind: str) -> tuple[csr_matrix, csr_matrix]:
    """Sparse features of the parts, side by side, weighted by the training texts."""
    found = []
    for known, new in zip(train, test, strict=True):
        counts = [("letters", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True))]
        if kind != "tokens":
            counts.append(("words", TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), sublinear_tf=True)))
        union = FeatureUnion(counts)
        # A vectoriser refuses texts that have no word at all.
        found.append((union.fit_transform([t.strip() or "-" for t in known]), union.transform(new)))
    trained, tested = zip(*found, strict=True)
    return hstack(trained, "csr"), hstack(tested, "csr")


def _regression(kind: str, strength: float) -> LogisticRegression | OneVsRestClassifier:
    """Logistic regression. The features have unit length, so they are not standardised."""
    regression = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
    return OneVsRestClassifier(regression) if kind == "multilabel" else regression


def _strength(kind: str, train: csr_matrix, targets: np.ndarray) -> float:
    """The C with the best cross-validated score; the middle one where a class has too few rows for that."""
    counts = np.concatenate([targets.sum(0), (1 - targets).sum(0)]) if kind == "multilabel" else np.bincount(targets)
    if counts[counts > 0].min() < FOLDS or (counts > 0).sum() < 2:
        return STRENGTHS[1]
    scoring = "accuracy" if kind in ("classify", "pair") else "f1_macro"
    scores = [
        cross_val_score(_regression(kind, c), train, targets, cv=FOLDS, scoring=scoring).mean() for c in STRENGTHS
    ]
    return STRENGTHS[int(np.argmax(scores))]
