"""Probing measures: direct formulas, toy vectors with a known answer, and tiny models."""

import numpy as np
import pytest
import tiny
from scipy.special import expit, softmax

from kdlib.data.tasks import Split, Task
from kdlib.evaluation.baselines import majority, word_overlap_retrieval
from kdlib.evaluation.probing import (
    cka_rows,
    classifier,
    layer_probe,
    linear_cka,
    linear_probe,
    probe_weights,
    retrieval,
    retrieval_rows,
    segmentation,
    similarity,
    task_vectors,
    train_targets,
)
from kdlib.models.encoder import text_vectors

NO_PLACES = np.empty((0, 2), int)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def encoder():
    return tiny.encoder(layers=2, prefix="si ")


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def separable(rng, classes, count=60):
    targets = rng.integers(0, classes, count)
    return np.eye(classes)[targets] * 5 + rng.normal(size=(count, classes)) * 0.1, targets


def task_of(kind, labels, train, test, texts=None):
    def split(targets):
        return Split(texts or [f"t{i}" for i in range(len(targets))], list(targets))

    return Task("mine", kind, labels, split(train), split(test))


# -- CKA and similarity


def hsic(k, m):
    n = len(k)
    centring = np.eye(n) - 1 / n
    return np.trace(k @ centring @ m @ centring) / (n - 1) ** 2


def test_cka_equals_the_kernel_formula(rng):
    for _ in range(5):
        x, y = rng.normal(size=(30, 7)) + 3, rng.normal(size=(30, 12)) @ rng.normal(size=(12, 12))
        k, m = x @ x.T, y @ y.T
        assert linear_cka(x, y) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))


def test_cka_ignores_rotation_scale_and_shift_only(rng):
    x = rng.normal(size=(50, 8)) * np.arange(1, 9)
    assert linear_cka(x, x @ rotation(rng, 8) * 7 + 3) == pytest.approx(1)
    assert linear_cka(x, x @ rng.normal(size=(8, 8))) < 0.99
    assert linear_cka(x, rng.normal(size=(50, 8))) < 0.5
    y = rng.normal(size=(50, 5))
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))


def test_cka_of_constant_states_is_zero():
    assert linear_cka(np.ones((5, 3)), np.ones((5, 3))) == 0


def test_cka_rows_are_a_symmetric_table_with_ones_on_the_diagonal(encoder):
    rows = cka_rows(encoder, tiny.texts(30))
    table = {(row["layer"], row["x"]): row["value"] for row in rows if row["metric"] == "cka"}
    floor = next(row["value"] for row in rows if row["metric"] == "cka_floor")
    assert 0 < floor < min(table.values())
    assert len(table) == 9 and all(row["n"] == 30 and 0 <= row["value"] <= 1 + 1e-6 for row in rows)
    assert all(table[i, j] == table[j, i] for i, j in table) and all(table[i, i] == 1 for i in range(3))


def test_similarity_of_a_copy_is_one(rng):
    x = rng.normal(size=(20, 6)).astype(np.float32)
    assert similarity(x, x) == pytest.approx(1) and similarity(x, x * 3 + 5) == pytest.approx(1, abs=1e-5)
    assert similarity(x, -x) == pytest.approx(-1)
    assert abs(similarity(x, rng.normal(size=(20, 6)).astype(np.float32))) < 0.3


# -- retrieval


def test_retrieval_finds_the_nearest_by_angle():
    queries = np.array([[1.0, 0], [0, 1.0], [1, 1]])
    targets = np.array([[9.0, 1], [0, 0.1], [-1, -1]])
    assert retrieval(queries, targets).tolist() == [True, True, False]


def test_centring_removes_the_direction_of_a_language(rng):
    meaning = rng.normal(size=(40, 16))
    near = 8 * np.eye(16)[0]
    queries, targets = meaning + near, meaning * rng.uniform(0.5, 2, size=(40, 1)) - near
    assert retrieval(queries, targets, centred=True).mean() > 0.9 > retrieval(queries, targets).mean()


def test_retrieval_of_zero_vectors_does_not_fail():
    assert retrieval(np.zeros((2, 3)), np.zeros((2, 3))).tolist() == [True, False]


def test_retrieval_by_shared_words():
    queries = ["ang Aso sa bahay", "isa dalawa tatlo", "wala"]
    targets = ["the aso at bahay", "dalawa isa", "tatlo isa dalawa apat lima anim"]
    assert word_overlap_retrieval(queries, targets).tolist() == [True, True, False]
    assert word_overlap_retrieval(["", "x"], ["", "x"]).tolist() == [True, True]


def test_retrieval_has_rows_for_every_layer_method_and_language(encoder):
    texts = tiny.texts(20)
    rows = retrieval_rows(encoder, {"a": texts, "b": texts, "c": tiny.texts(20, 9)}, "a")
    assert {row["language"] for row in rows} == {"b", "c"} and all(row["n"] == 20 for row in rows)
    unique = len(set(texts)) == len(texts)
    assert unique and all(row["value"] == 1 for row in rows if row["language"] == "b")
    methods = [row["method"] for row in rows if row["language"] == "b"]
    assert len(set(methods)) == 3 and len(methods) == 2 * 3 + 1


# -- segmentation


def test_segmentation_equals_a_count_by_hand():
    tokenizer = tiny.tokenizer()  # whole words of a short list, letters otherwise
    found = segmentation(tokenizer, ["ang aso abc", "ñ na"])
    assert found["fertility"] == pytest.approx(7 / 5)  # ang, aso, a ##b ##c, unknown, na
    assert found["tokens_per_character"] == pytest.approx(7 / 15)
    assert found["unknown_rate"] == pytest.approx(1 / 7)
    assert found["split_words"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("texts", [[], [""], ["  "]])
def test_segmentation_of_no_text_is_zero(texts):
    assert set(segmentation(tiny.tokenizer(), texts).values()) == {0.0}


# -- linear probes


@pytest.mark.parametrize("kind", ["classify", "pair"])
def test_probe_separates_classes(rng, kind):
    train, targets = separable(rng, 3)
    test, gold = separable(rng, 3)
    metrics = linear_probe(task_of(kind, list("abc"), targets, gold), train, targets, test, NO_PLACES)
    assert [metric.value for metric in metrics] == [1, 1]


def test_probe_separates_several_labels(rng):
    targets, gold = rng.integers(0, 2, (2, 80, 3))

    def features(flags):
        return flags * 4.0 + rng.normal(size=flags.shape) * 0.1

    task = task_of("multilabel", list("abc"), targets.tolist(), gold.tolist())
    assert linear_probe(task, features(targets), targets, features(gold), NO_PLACES)[0].value == 1


def test_probe_separates_words_and_gives_truncated_ones_the_first_label(rng):
    labels = ["O", "B-PER", "I-PER"]
    gold = [[0, 1, 2], [1, 0], [2, 0, 0, 1]]
    words = [[f"w{i}" for i in row] for row in gold]
    places = np.array([(t, w) for t, row in enumerate(gold) for w in range(len(row))])
    flat = np.array([tag for row in gold for tag in row])

    def features(tags):
        return np.eye(3)[tags] * 5 + rng.normal(size=(len(tags), 3)) * 0.1

    train = np.tile(flat, 10)
    task = task_of("tokens", labels, gold, gold, words)
    f1, right = linear_probe(task, features(train), train, features(flat), places)
    assert f1.value == right.value == 1
    f1, right = linear_probe(task, features(train), train, features(flat[:-1]), places[:-1])
    assert right.value == pytest.approx(8 / 9) and f1.value < 1


def test_probe_of_random_features_is_near_chance(rng):
    targets, gold = rng.integers(0, 2, (2, 400))
    train, test = rng.normal(size=(2, 400, 5))
    assert linear_probe(task_of("classify", list("ab"), targets, gold), train, targets, test, NO_PLACES)[0].value < 0.6


def test_probe_is_independent_of_the_scale_of_features(rng):
    train, targets = separable(rng, 3)
    test, gold = separable(rng, 3)
    scale = np.array([1e-4, 1, 1e4])
    task = task_of("classify", list("abc"), targets, gold)
    assert linear_probe(task, train * scale + 7, targets, test * scale + 7, NO_PLACES)[0].value == 1


def test_seeds_of_a_probe_draw_reproducible_shares(rng):
    targets, gold = rng.integers(0, 2, (2, 60))
    train, test = rng.normal(size=(2, 60, 30))
    task = task_of("classify", list("ab"), targets, gold)

    def score(seed, share):
        return linear_probe(task, train, targets, test, NO_PLACES, seed, share)[0].items.tolist()

    assert score(0, 0.5) == score(0, 0.5) != score(1, 0.5)
    assert score(0, 1.0) == score(1, 1.0)


def test_probe_on_one_class_answers_that_class(rng):
    task = task_of("classify", list("ab"), [1] * 10, [0, 1, 1, 1])
    assert (
        linear_probe(task, rng.normal(size=(10, 3)), np.ones(10, int), rng.normal(size=(4, 3)), NO_PLACES)[0].value
        == 0.75
    )


@pytest.mark.parametrize(
    "kind, labels, train, test, value",
    [
        ("classify", list("abc"), [2, 2, 0, 1], [2, 0, 2, 2], 0.75),
        ("pair", list("ab"), [0, 0, 1], [1, 1], 0.0),
        ("multilabel", list("ab"), [[1, 0], [1, 0], [0, 0]], [[1, 0], [1, 1]], 0.5),
        ("tokens", ["O", "B-X"], [[0, 1]], [[0, 1]], 0.0),
    ],
)
def test_majority_gives_the_most_frequent_answer(kind, labels, train, test, value):
    task = Task("mine", kind, labels, Split([[]] * len(train), train), Split([["w"] * 2] * len(test), test))
    assert majority(task)[0].value == value


# -- features of tasks


def split_of(kind, count, seed):
    texts = tiny.texts(count, seed)
    rng = np.random.default_rng(seed)
    if kind == "pair":
        return Split(list(zip(texts, reversed(texts))), rng.integers(0, 2, count).tolist())
    if kind == "tokens":
        words = [text.split() for text in texts]
        return Split(words, [rng.integers(0, 3, len(row)).tolist() for row in words])
    targets = rng.integers(0, 2, (count, 3) if kind == "multilabel" else count)
    return Split(texts, targets.tolist())


def tiny_task(kind):
    labels = ["O", "B-X", "I-X"] if kind == "tokens" else list("abc") if kind == "multilabel" else list("ab")
    return Task("mine", kind, labels, split_of(kind, 30, 1), split_of(kind, 20, 2))


def test_features_of_texts_are_their_vectors(encoder):
    task = tiny_task("classify")
    train, test, places = task_vectors(encoder, task, [0, 2])
    assert train.shape == (30, 2, 32) and test.shape == (20, 2, 32) and places.shape == (0, 2)
    np.testing.assert_allclose(train, text_vectors(encoder, task.train.texts, [0, 2]), atol=1e-6)


def test_features_of_pairs_compare_both_texts(encoder):
    task = tiny_task("pair")
    _, test, _ = task_vectors(encoder, task)
    u, v = (text_vectors(encoder, [pair[side] for pair in task.test.texts]) for side in (0, 1))
    np.testing.assert_allclose(test, np.concatenate([u, v, np.abs(u - v), u * v], -1), atol=1e-5)


def test_features_of_words_match_their_targets(encoder):
    task = tiny_task("tokens")
    train, test, places = task_vectors(encoder, task)
    targets = train_targets(encoder, task)
    assert targets.tolist() == [tag for row in task.train.targets for tag in row] and len(train) == len(targets)
    assert places.tolist() == [[t, w] for t, words in enumerate(task.test.texts) for w in range(len(words))]


def test_targets_of_truncated_words_are_left_out_too():
    short = tiny.encoder(layers=1, prefix="si ")
    short.max_length = 6
    task = tiny_task("tokens")
    train, _, _ = task_vectors(short, task)
    targets = train_targets(short, task)
    assert len(train) == len(targets) < sum(map(len, task.train.targets))
    kept = [tag for row in task.train.targets for tag in row[:3]]  # six tokens less [CLS], prefix and [SEP]
    assert targets.tolist() == kept


@pytest.mark.parametrize("kind", ["classify", "pair", "multilabel", "tokens"])
def test_layer_probe_has_a_row_for_each_layer_and_the_majority(encoder, kind):
    rows = layer_probe(encoder, tiny_task(kind), 25, 15)
    assert [row.get("layer") for row in rows] == [0, 1, 2, None]
    assert [row["model"] for row in rows] == ["teacher"] * 3 + ["majority"]
    for row in rows[:3]:
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1 and row["n"] == 15
    assert rows == layer_probe(encoder, tiny_task(kind), 25, 15)


@pytest.mark.parametrize("kind", ["classify", "multilabel"])
@pytest.mark.parametrize("present", [[0, 1], [0, 1, 2], [1, 3]])
def test_weights_of_a_probe_give_its_probabilities(rng, kind, present):
    x = rng.normal(3, 2, (60, 5))
    y = np.array(present)[rng.integers(len(present), size=60)]
    if kind == "multilabel":
        y = np.eye(4, dtype=int)[y]
        y[:, 3] = 1  # in every row
    fitted = classifier(kind).fit(x, y)
    weights, biases = probe_weights(fitted, 4)
    scores = x @ weights.T + biases
    if kind == "multilabel":
        np.testing.assert_allclose(expit(scores), fitted.predict_proba(x), atol=1e-9)
    else:
        np.testing.assert_allclose(softmax(scores, 1)[:, present], fitted.predict_proba(x), atol=1e-9)
        assert softmax(scores, 1).sum(1) == pytest.approx(1)
