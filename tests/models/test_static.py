"""Static token vectors: the mean of rows of a table, called like any encoder."""

import numpy as np
import tiny

from kdlib.evaluation.benchmark import run_trials
from kdlib.evaluation.speed import size_rows, speed_rows
from kdlib.models.encoder import text_vectors, word_vectors
from kdlib.models.static import WIDTH, static_encoder


def test_a_text_is_the_mean_of_the_rows_of_its_tokens():
    encoder = tiny.encoder(prefix="ang ")
    static = static_encoder(encoder)
    ids = encoder.tokenizer("bata aso").input_ids
    table = encoder.model.get_input_embeddings().weight.detach().numpy().copy()
    table[encoder.tokenizer.all_special_ids] = 0
    np.testing.assert_allclose(text_vectors(static, ["bata aso"])[0, 0], table[ids].mean(0), rtol=1e-5)
    assert static.layers == 0 and encoder.model.config.num_hidden_layers == 4


def test_word_order_is_lost_and_a_word_is_the_same_in_every_text():
    static = static_encoder(tiny.encoder())
    one, other = text_vectors(static, ["bata aso pusa", "pusa aso bata"])[:, 0]
    np.testing.assert_allclose(one, other, rtol=1e-5)
    vectors, _ = word_vectors(static, [["bata", "aso"], ["pusa", "bata"]])
    np.testing.assert_array_equal(vectors[0], vectors[3])


def test_frequent_tokens_weigh_less():
    encoder = tiny.encoder()
    counts = np.ones(len(encoder.tokenizer), int)
    common = encoder.tokenizer("ang").input_ids[1]
    counts[common] = 10**6
    even, weighed = (static_encoder(encoder, c).model.table.weight for c in (np.ones_like(counts), counts))
    rare = encoder.tokenizer("bata").input_ids[1]
    norms = [[float(table[i].norm()) for i in (common, rare)] for table in (even, weighed)]
    assert norms[1][0] / norms[1][1] < 0.01 * norms[0][0] / norms[0][1]
    assert static_encoder(encoder, counts).hidden == min(WIDTH, encoder.hidden)


def test_it_is_probed_measured_and_timed_like_an_encoder():
    static = static_encoder(tiny.encoder())
    tasks = [tiny.task(kind) for kind in ("classify", "multilabel", "pair", "tokens")]
    trials = run_trials({"static": static}, tasks, tiny.SPEC, "probe")
    scores = {trial.task: trial.metrics[0].value for trial in trials}
    assert scores["tokens task"] > 0.95
    sizes = {row["metric"]: row["value"] for row in size_rows(static, "static")}
    assert sizes["parameters"] == static.model.table.weight.numel()
    assert len(speed_rows({"static": static}, tiny.texts(40), runs=3)) == 2
