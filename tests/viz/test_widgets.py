"""Widgets: what they show is right, moving a control shows it anew, and without a front end a still view is there."""

import html
import os
import re
import signal
import time
from pathlib import Path

import ipywidgets
import nbformat
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from ipywidgets.widgets import widget as widget_module
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from scipy.special import softmax
from tiny import WORDS, encoder, texts

from kdlib.data.tasks import Split, Task
from kdlib.errors import UserError
from kdlib.evaluation.probing import segmentation
from kdlib.models.encoder import text_vectors
from kdlib.models.mlm_head import MaskedHead
from kdlib.models.tokenizer_files import token_list
from kdlib.pruning import selection as vocabulary
from kdlib.pruning.model import prune_model
from kdlib.pruning.tokenizer import prune_tokenizer
from kdlib.study.run import COLUMNS
from kdlib.viz import display, examples, explore, results, training_panel, widgets
from kdlib.viz import panel as panels
from kdlib.viz.html import escape
from kdlib.viz.panel import VIEW
from kdlib.viz.training_panel import TrainingPanel

SENTENCE = "ang bata ay kumain"


@pytest.fixture(scope="module")
def pair():
    """A teacher and a student with the same tokenizer."""
    return {"teacher": encoder(layers=4), "student": encoder(layers=2, seed=1)}


def with_head():
    made = encoder()
    torch.manual_seed(3)
    rows = made.model.config.vocab_size
    made.head = MaskedHead(made.hidden, made.hidden, rows).eval()
    return made


def table(rows):
    """A table of results with these rows."""
    return pd.DataFrame(rows).reindex(columns=COLUMNS).astype({"seed": "Int64", "layer": "Int64"})


def score(model, task, value, stage="benchmark", method="probe", **more):
    row = dict(stage=stage, method=method, model=model, task=task, metric="accuracy", language="tgl", value=value)
    return row | dict(low=value - 0.05, high=value + 0.05, n=100) | more


def study_table():
    rows = [
        dict(stage="probe", model="teacher", task="topic", metric="accuracy", method="layer probe", layer=layer,
             value=0.5 + layer / 20, low=0.4, high=0.9, n=80, language="tgl")
        for layer in range(5)
    ]  # fmt: skip
    rows += [
        dict(stage="probe", model="teacher", metric="retrieval", method=method, language="eng", layer=layer,
             value=0.9 - layer / 10, low=0.1, high=0.95, n=50)
        for method in ("plain", "centred") for layer in range(5)
    ]  # fmt: skip
    rows += [score("teacher", "topic", 0.7, seed=0), score("teacher", "topic", 0.9, seed=1)]
    rows += [score("teacher", "topic", 0.8), score("student", "topic", 0.72), score("random weights", "topic", 0.3)]
    rows += [score(model, "average", 0.6, metric="score") for model in ("teacher", "student")]
    sizes = {"teacher": 117e6, "student": 15e6}
    rows += [dict(stage="benchmark", model=m, metric="parameters", value=v, language="tgl") for m, v in sizes.items()]
    rows += [score(m, None, 9.0, metric="latency_ms", method="cpu", low=8.0, high=12.0) for m in sizes]
    rows += [dict(stage="distill", model="student", metric="texts", value=100, language="tgl")]
    rows += [score("student", "topic", 0.5 + i / 10, "ablations", "init", arm=arm) for i, arm in enumerate("ab")]
    rows += [score("teacher", "topic", 0.9, "ablations", "reference")]
    return table(rows)


def body(text):
    """HTML as a reader without styles sees it."""
    return html.unescape(re.sub(r"<[^>]+>", "", text))


# --- what is shown


@given(st.text())
def test_escaped_text_holds_no_element_and_loses_nothing(text):
    escaped = escape(text)
    assert not re.search(r"<(?!/?span>)", escaped) and "$$" not in escaped
    assert html.unescape(escaped.replace("<span>", "").replace("</span>", "")) == text


def test_pieces_have_the_tokenizer_s_ids_words_and_unknown_tokens_with_their_letters(pair):
    tokenizer = pair["teacher"].tokenizer
    text = "ang bataxa  ΩΩ tubig"
    tokens = explore.cut(tokenizer, text)
    assert list(tokens["id"]) == tokenizer(text, add_special_tokens=False).input_ids
    assert list(tokens["word"]) == [0, *[1] * (len(tokens) - 3), 2, 3]
    assert list(tokens.loc[tokens["unknown"], "source"]) == ["ΩΩ"]
    assert list(tokens.loc[tokens["unknown"], "token"]) == ["[UNK]"]
    assert explore.cut(tokenizer, "").empty


def test_tokeniser_shows_fertility_unknown_words_and_what_differs(pair):
    teacher = pair["teacher"]
    ids = [i for i, token in enumerate(token_list(teacher.tokenizer)) if token != "bata"]
    other = encoder()
    other.tokenizer = prune_tokenizer(teacher.tokenizer, ids)
    text = "ang bata ΩΩ kumain"
    shown = explore.tokens_html({"teacher": teacher, "pruned teacher": other}, text)
    for tokenizer in (teacher.tokenizer, other.tokenizer):
        assert f"{segmentation(tokenizer, [text])['fertility']:.2f} tokens per word" in shown
    assert "unknown: ΩΩ" in body(shown) and "1 unknown token<" in shown
    assert "+3 tokens" in shown and "<code>bata</code>" in shown
    assert "splits it as" in explore.tokens_html({"teacher": teacher, "pruned teacher": other}, "ang aso")
    assert "<b>unknown: &lt;</b>" in explore.tokens_html({"teacher": teacher}, "<script>")
    assert "and 700 more" in explore.tokens_html({"teacher": teacher}, "ang " * 1000)


def test_size_table_agrees_with_coverage_with_a_pruned_model_and_with_the_whole_one(pair):
    teacher = pair["teacher"]
    selection = vocabulary.select_tokens(teacher.tokenizer, texts(5), WORDS[:12], characters="all")
    held = texts(40, seed=9)
    sizes = explore.size_table(teacher, selection, held, points=6)
    counts = vocabulary.count_tokens(teacher.tokenizer, held)
    curve = dict(vocabulary.coverage_curve(selection, counts, points=200))
    for row in sizes.iloc[:-1].itertuples():
        assert row.coverage == pytest.approx(curve[row.rows])
    small = prune_tokenizer(teacher.tokenizer, selection.ids)
    model = prune_model(teacher.model, teacher.tokenizer, selection.ids)
    kept, whole = sizes.iloc[-2], sizes.iloc[-1]
    assert kept["rows"] == len(selection.ids) and kept["parameters"] == model.num_parameters()
    assert kept["fertility"] == segmentation(small, held)["fertility"] > whole["fertility"]
    assert whole["coverage"] == 1 and whole["parameters"] == teacher.parameters
    assert sizes["coverage"].is_monotonic_increasing
    shown = body(explore.size_html(sizes, int(kept["rows"])))
    assert f"{kept['coverage']:.1%}" in shown and f"{kept['fertility']:.2f} tokens" in shown


def test_layer_curves_take_probes_and_retrieval_and_nothing_else():
    curves = explore.layer_curves(study_table())
    assert set(curves["curve"]) == {"topic (accuracy)", "eng, plain", "eng, centred"} and len(curves) == 15
    shown = body(explore.layer_html(curves, ["topic (accuracy)", "eng, plain"], 2))
    assert "60.0%" in shown and "40.0 to 90.0%" in shown and "layer 4 (70.0%)" in shown and "70.0%" in shown
    with pytest.raises(UserError, match="probe"):
        explore.layer_curves(study_table(), "nobody")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_are_a_distribution_in_the_logits_order(temperature):
    logits = np.random.default_rng(0).normal(0, 3, 50)
    soft = explore.soft_targets(logits, temperature)
    assert soft.sum() == pytest.approx(1) and list(np.argsort(soft)) == list(np.argsort(logits))
    assert soft == pytest.approx(softmax(logits / temperature))
    assert explore.entropy(logits, temperature) == pytest.approx(-(soft * np.log2(soft)).sum())
    assert explore.entropy(logits, 1e6) == pytest.approx(np.log2(50))


def test_masked_logits_are_the_head_s_on_the_gap():
    made = with_head()
    tokens, logits = explore.masked_logits(made, "ang ___ ay kumain")
    batch = made.tokenizer("ang [MASK] ay kumain", return_tensors="pt")
    with torch.no_grad():
        state = made.model(**batch).last_hidden_state[0, 2]
        expected = made.head(state, made.model.get_input_embeddings().weight)
    assert logits == pytest.approx(expected.numpy(), abs=1e-5) and tokens[5] == "ang" and len(tokens) == len(logits)
    shown = explore.targets_html(tokens, logits, 2.0)
    assert all(f"<code>{tokens[i]}</code>" in shown for i in np.argsort(-logits)[:10])


@pytest.mark.parametrize("text, word", [("ang bata", "___"), ("ang " * 40 + "___", "32 tokens")])
def test_a_gap_that_is_not_there_is_told(text, word):
    with pytest.raises(UserError, match=word):
        explore.masked_logits(with_head(), text)


def test_the_gap_takes_the_longest_word():
    assert explore.with_gap("ang bata ay kumain ng tubig") == "ang bata ay ___ ng tubig" and explore.with_gap("") == ""


def test_attentions_are_those_of_an_eager_model_and_leave_the_model_as_it_was():
    fast, eager = encoder(attn="sdpa"), encoder(attn="eager")
    tokens, states = explore.attentions(fast, SENTENCE)
    batch = eager.tokenizer(SENTENCE, return_tensors="pt")
    expected = torch.stack(eager.model(**batch, output_attentions=True).attentions)[:, 0].detach().numpy()
    assert tokens == ["[CLS]", *SENTENCE.split(), "[SEP]"] and states == pytest.approx(expected, abs=1e-6)
    assert states.sum(-1) == pytest.approx(np.ones(states.shape[:3]))
    assert fast.model.config._attn_implementation == "sdpa"
    with pytest.raises(TypeError):
        fast.model.forward = None
        explore.attentions(fast, SENTENCE)
    assert fast.model.config._attn_implementation == "sdpa"


def test_shared_attention_is_one_for_the_same_head_and_nothing_for_heads_apart():
    a = np.eye(4)
    assert explore.shared_attention(a, a) == 1 and explore.shared_attention(a, np.roll(a, 1, axis=1)) == 0


def test_training_facts_are_speed_and_time_left():
    curve = pd.DataFrame([dict(split="heldout", step=0, seconds=0.0, loss=1.0)])
    assert np.isnan(explore.training_facts(curve, 100, 5000)["left"])
    assert "left" not in explore.training_html(explore.training_facts(curve, 100, 5000), curve)
    curve.loc[1] = ("train", 25, 50.0, 0.5)
    facts = explore.training_facts(curve, 100, 5000)
    assert facts["left"] == 150 and facts["tokens_per_second"] == 25 and facts["step"] == 25
    assert "2 min 30 s left" in body(explore.training_html(facts, curve))
    stopped = body(explore.training_html(facts, curve, stopped=True))
    assert "left" not in stopped and "Stopped" in stopped


def test_comparable_numbers_prefer_the_row_of_all_seeds_and_bring_references_to_arms():
    rows = results.comparable(study_table())
    probe = rows[(rows["what"] == "benchmark: probe") & (rows["task"] == "topic")].set_index("name")["value"]
    assert dict(probe) == {"teacher": 0.8, "student": 0.72, "random weights": 0.3}
    assert list(rows[rows["what"] == "ablations: init"]["name"]) == ["a", "b", "teacher"]
    sizes = rows[rows["metric"] == "parameters"]
    assert list(sizes["name"]) == ["teacher", "student"] and set(sizes["what"] + sizes["task"]) == {"benchmark"}
    assert not rows["what"].str.startswith("probe").any() and "texts" not in set(rows["metric"])
    with pytest.raises(UserError, match="benchmark"):
        results.comparable(study_table().query("stage == 'probe' or stage == 'distill'"))
    with pytest.raises(UserError, match="benchmark"):
        results.comparable(table([]))


def test_the_results_name_the_best_and_do_not_judge_by_intervals():
    rows = results.comparable(study_table()).query("what == 'benchmark: probe' and task == 'topic'")
    shown = body(results.results_html(rows))
    assert "80.0%" in shown and "75.0 to 85.0%" in shown
    assert "teacher is highest. Intervals do not say whether two differ" in shown
    timed = results.comparable(study_table()).query("metric == 'latency_ms'")
    assert "quartiles" in results.results_html(timed) and "8.0 to 12.0" in results.results_html(timed)


def test_nearest_are_those_of_brute_force_without_the_query_itself(pair):
    pool, made = texts(30, length=8), pair["teacher"]
    index = examples.build_index(made, pool)
    vectors = text_vectors(made, pool)[:, 0]
    centred = vectors - vectors.mean(0)
    cosine = [float(np.dot(x, centred[4]) / np.linalg.norm(x) / np.linalg.norm(centred[4])) for x in centred]
    expected = [pool[i] for i in np.argsort(cosine)[::-1] if pool[i] != pool[4]][:6]
    found = examples.nearest(index, pool[4], 6)
    assert list(found["text"]) == expected and found["cosine"].is_monotonic_decreasing
    assert examples.text_vector(made, pool[4]) == pytest.approx(vectors[4], abs=1e-5)
    given_vectors = examples.build_index(made, pool, vectors)
    assert list(examples.nearest(given_vectors, pool[4], 6)["text"]) == expected
    with pytest.raises(UserError, match="vectors"):
        examples.build_index(made, pool, vectors[:, :3])


def toy_task(kind="classify"):
    """Texts about dogs and texts about water; a third label has no training row."""
    rows = [" ".join([word] * 3 + [filler]) for word in ("aso", "tubig") for filler in WORDS]
    targets = [0] * len(WORDS) + [1] * len(WORDS)
    targets = [[1 - t, t, t] for t in targets] if kind == "multilabel" else targets
    return Task("toy", kind, ["dog", "water", "none"], Split(rows, targets), Split(rows[:2], targets[:2]))


def test_probe_classifier_learns_and_gives_every_label_a_probability(pair):
    classify = examples.probe_classifier(pair["teacher"], toy_task())
    dog, water = classify("aso aso aso"), classify("tubig tubig tubig")
    assert dog["dog"] > 0.6 and water["water"] > 0.6 and dog["none"] == 0
    assert sum(dog.values()) == pytest.approx(1) and list(dog) == ["dog", "water", "none"]
    many = examples.probe_classifier(pair["student"], toy_task("multilabel"))("tubig tubig tubig")
    assert many["water"] > 0.5 and many["none"] > 0.5 > many["dog"]
    with pytest.raises(UserError, match="pair"):
        examples.probe_classifier(pair["teacher"], Task("p", "pair", ["a", "b"], Split([], []), Split([], [])))


def test_labels_come_with_the_time_they_took():
    def slow(text):
        time.sleep(0.01)
        return {"a": 0.25, "b": 0.75}

    answer, milliseconds = examples.timed(slow, "x")
    assert answer["b"] == 0.75 and 10 <= milliseconds < 1000
    shown = examples.labels_html({"teacher": (answer, 12.34), "student": ({"a": 0.6, "b": 0.4}, 3.21)})
    assert body(shown).index("b") < body(shown).index("25.0%") and "12.3 ms" in shown and "3.2 ms" in shown


# --- panels


@pytest.fixture
def shown(monkeypatch):
    """What panels display, with somebody in front of the notebook."""
    calls = []
    for module in (panels, training_panel):
        monkeypatch.setattr(module, "display", lambda *a, **k: calls.append(a[0]))
    monkeypatch.setattr(display, "headless", lambda: False)
    return calls


def test_a_front_end_gets_one_output_of_widget_and_still_view(pair, shown):
    widgets.tokeniser(pair, SENTENCE)._ipython_display_()
    (bundle,) = shown
    assert VIEW in bundle and "tokens per word" in bundle["text/html"]
    widgets.layer_map_editor(4, [2, 4])._ipython_display_()
    assert set(shown[1]) == {VIEW, "image/png", "text/plain"}


def test_without_a_front_end_no_widget_is_made(pair, monkeypatch):
    calls = []
    for module in (panels, training_panel):
        monkeypatch.setattr(module, "display", calls.append)
    before = set(widget_module._instances)
    widgets.layer_map_editor(4, [2, 4])._ipython_display_()
    assert [type(call).__name__ for call in calls] == ["Image", "HTML"] and calls[0].data.startswith(b"\x89PNG")
    assert "you can change: depth, start, layer 1 from, layer 2 from." in calls[1].data
    assert display.headless() and set(widget_module._instances) == before


def test_typing_a_sentence_shows_its_tokens_and_an_empty_one_a_hint(pair):
    panel = widgets.tokeniser(pair, SENTENCE)
    assert isinstance(panel.widget, ipywidgets.VBox) and "kumain" in panel.text.value
    panel.controls["sentence"].value = "aso ΩΩ"
    assert "unknown: ΩΩ" in body(panel.text.value) and "kumain" not in panel.text.value
    panel.controls["sentence"].value = "  "
    assert "Type a sentence" in panel.text.value


def test_a_prediction_stands_beside_the_result_and_follows_the_box(shown):
    guess = widgets.prediction("How many?")
    guess._ipython_display_()
    assert "How many?" in shown[0]["text/html"]
    guess.controls["prediction"].value = "three < four"
    guess.beside("five")
    assert "three &lt; four" in shown[1]["text/html"] and "five" in shown[1]["text/html"]
    guess.controls["prediction"].value = "six"
    texts = [str(getattr(widget, "value", "")) for widget in widget_module._instances.values()]
    assert any("six" in text and "five" in text for text in texts)


def test_without_a_front_end_nothing_noted_is_said_beside_the_result(monkeypatch):
    calls = []
    monkeypatch.setattr(panels, "display", calls.append)
    guess = widgets.prediction("How many?")
    guess.beside("five")
    assert "(nothing noted)" in calls[0].data and "five" in calls[0].data and "controls" not in vars(guess)


def test_task_rows_are_those_of_the_chosen_task_label_and_text():
    names = Task(
        "names", "tokens", ["O", "B-PER", "I-PER", "B-LOC"],
        Split([["si", "Ana", "Cruz"], ["sa", "Ilog"], ["wala"]], [[0, 1, 2], [0, 3], [0]]), Split([], []),
    )  # fmt: skip
    pairs = Task("pairs", "pair", ["no", "yes"], Split([("a", "b"), ("c", "d")], [1, 0]), Split([], []))
    both = Task("both", "multilabel", ["x", "y"], Split(["u", "v"], [[1, 1], [0, 0]]), Split([], []))
    panel = widgets.task_rows([names, pairs, both])
    assert panel.widget and "si Ana [B-PER] Cruz [I-PER]" in body(panel.text.value)
    assert panel.controls["label"].options == ("any", "LOC", "PER", "none")
    panel.controls["label"].value = "LOC"
    assert "1 of 3" in body(panel.text.value) and "Ilog" in panel.text.value and "Ana" not in panel.text.value
    panel.controls["task"].value = "pairs"
    assert "2 of 2" in body(panel.text.value) and "a / b" in body(panel.text.value)
    panel.controls["contains"].value = "D"
    assert "1 of 2" in body(panel.text.value) and "c / d" in body(panel.text.value)
    panel.controls["task"].value, panel.controls["contains"].value = "both", ""
    assert "x, y" in body(panel.text.value) and "none" in body(panel.text.value)


def test_a_view_that_fails_says_so_where_the_reader_looks():
    def view(depth):
        return panels.View(f"depth {1 / depth:.0f}")

    slider = widgets.partial(ipywidgets.IntSlider, min=0, max=2, value=1)
    panel = panels.Panel(view, depth=slider)
    panel.widget.layout.visibility = "visible"
    panel.controls["depth"].value = 0
    assert "ZeroDivisionError" in panel.text.value
    panel.controls["depth"].value = 2
    assert panel.text.value == "depth 0"


@pytest.mark.filterwarnings("error")
def test_letters_without_a_font_are_no_warning(pair):
    maps = {"a": (["\ue000", "b"], np.eye(2)), "b": (["\ue000", "b"], np.eye(2))}
    panel = panels.Panel(lambda: panels.View("", explore.attention_figure(maps)))
    assert panel.first.png.startswith(b"\x89PNG")


@pytest.mark.slow
def test_vocabulary_slider_moves_between_measured_sizes(pair):
    selection = vocabulary.select_tokens(pair["teacher"].tokenizer, texts(5), WORDS[:12], characters="all")
    panel = widgets.vocabulary_size(pair["teacher"], selection, texts(20))
    panel.widget.layout.visibility = "visible"
    slider, before = panel.controls["rows"], bytes(panel.image.value)
    assert slider.value == len(selection.ids)
    slider.index = 0
    assert f"{slider.value:,} rows" in panel.text.value and bytes(panel.image.value) != before


@pytest.mark.slow
def test_layer_explorer_shows_the_chosen_curves_at_the_chosen_layer():
    panel = widgets.layer_explorer(study_table())
    assert panel.widget and panel.controls["languages"].value == ("eng, centred",)
    panel.controls["layer"].value = 1
    assert "at layer 1" in panel.text.value and "55.0%" in panel.text.value and "eng, centred" in panel.text.value
    panel.controls["languages"].value = ()
    assert "eng" not in panel.text.value and panel.image.layout.display is None
    panel.controls["tasks"].value = ()
    assert "Choose a task" in panel.text.value and panel.image.layout.display == "none"


@pytest.mark.slow
def test_layer_map_editor_gives_the_list_for_the_profile():
    editor = widgets.layer_map_editor(12, [3, 6, 9, 12])
    assert editor.value == [3, 6, 9, 12] and editor.state["start"] == "alternate"
    controls = editor.widget and editor.controls
    controls["depth"].value = 3
    assert editor.value == [4, 8, 12]
    controls["start"].value = "last"
    assert editor.value == [10, 11, 12] and "student.init=[10,11,12]" in body(editor.text.value)
    controls["layer_1"].value = 1
    assert editor.value == [1, 11, 12] and controls["start"].value == "own choice"
    controls["depth"].value = 2
    assert editor.value == [1, 11] and controls["layer_3"].layout.display == "none"
    assert "student.layers=2" in editor.text.value
    controls["start"].value = "late"
    assert editor.value == [6, 12]
    assert widgets.layer_map_editor(12, [3, 7, 11, 12], "late").state["start"] == "late"


@pytest.mark.slow
def test_attention_panel_follows_layer_and_head(pair):
    panel = widgets.attention_heads(pair, SENTENCE)
    assert panel.widget and "teacher, layer 4, head 1" in panel.text.value and "on the same tokens" in panel.text.value
    before = bytes(panel.image.value)
    panel.controls["layer_1"].value, panel.controls["head_1"].value = 1, 3
    assert "student, layer 1, head 3" in panel.text.value and bytes(panel.image.value) != before


def test_temperature_panel_softens_and_says_where_there_is_no_head(pair):
    panel = widgets.temperature(with_head(), "ang ___ ay kumain")
    assert panel.widget and "temperature 2" in panel.text.value
    panel.controls["temperature"].value = 8.0
    assert "temperature 8" in panel.text.value
    panel.controls["sentence"].value = "walang puwang"
    assert "Write ___ where" in panel.text.value
    made = widgets.temperature(lambda text: (["a", "b"], np.array([1.0, 0.0])), "___")
    assert "<code>a</code>" in made.first.html
    without = widgets.temperature(pair["teacher"], "ang ___")
    assert without.widget and "has no masked-language head" in without.text.value and not without.controls


@pytest.mark.slow
def test_results_explorer_offers_only_what_is_there():
    panel = widgets.results_explorer(study_table())
    controls = panel.widget and panel.controls
    assert controls["what"].value == "benchmark: probe" and controls["task"].value == "average"
    controls["task"].value = "topic"
    assert controls["metric"].value == "accuracy" and set(controls["names"].value) == {
        "teacher",
        "student",
        "random weights",
    }
    controls["names"].value = ("student",)
    assert "72.0%" in panel.text.value and "80.0%" not in panel.text.value
    controls["what"].value = "ablations: init"
    assert controls["names"].options == ("a", "b", "teacher") and "60.0%" in panel.text.value
    controls["what"].value = "benchmark"
    assert controls["metric"].value == "parameters" and "parameters (millions)" in panel.text.value
    assert "<b>117.0</b>" in panel.text.value and "<b>15.0</b>" in panel.text.value


def test_neighbours_panel_computes_vectors_once(pair, monkeypatch):
    calls = []
    monkeypatch.setattr(examples, "text_vectors", lambda *a: calls.append(a) or text_vectors(*a))
    pool = texts(12, length=8)
    panel = widgets.neighbours(pair, pool, pool[0])
    assert panel.widget and "cosine" in panel.text.value
    panel.controls["sentence"].value = pool[3]
    panel.controls["neighbours"].value = 2
    assert len(calls) == 2 and "Of 2 neighbours" in body(panel.text.value)


def test_labels_panel_asks_every_classifier():
    panel = widgets.labels({"teacher": lambda t: {t: 1.0}, "student": lambda t: {t: 1.0}}, "aso")
    assert panel.widget and "aso" in panel.text.value
    panel.controls["sentence"].value = "pusa"
    assert "pusa" in panel.text.value and panel.text.value.count("100.0%") == 2


# --- training


def curve_of(steps):
    rows = [dict(split="heldout", step=0, seconds=0.0, loss=1.0)]
    rows += [dict(split="train", step=s, seconds=2.0 * s, loss=1 / (1 + s)) for s in range(1, steps + 1)]
    return pd.DataFrame(rows)


def test_training_panel_shows_the_curve_and_leaves_it_in_the_output(shown, monkeypatch):
    updates = []
    handle = type("Handle", (), {"update": lambda self, bundle, raw: updates.append(bundle)})()
    for module in (panels, training_panel):
        monkeypatch.setattr(module, "display", lambda *a, **k: shown.append(a[0]) or handle)
    with TrainingPanel(10, 1000) as panel:
        assert VIEW in shown[0] and not panel.should_stop()
        panel.on_point(curve_of(5))
        assert "10 s left" in body(panel.panel.text.value)
        drawn = bytes(panel.panel.image.value)
        panel.on_point(curve_of(6))  # too soon for another picture
        assert "8 s left" in body(panel.panel.text.value) and bytes(panel.panel.image.value) == drawn
        panel.button.click()
        assert panel.should_stop() and panel.button.disabled
    assert "Stopped" in panel.panel.text.value and panel.button.description == "Stopped"
    assert set(updates[0]) == {VIEW, "image/png", "text/plain"} and bytes(panel.panel.image.value) != drawn


def test_interrupt_asks_for_a_stop_and_a_second_one_interrupts(monkeypatch):
    for module in (panels, training_panel):
        monkeypatch.setattr(module, "display", lambda *a, **k: None)
    started = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under `nohup`
    try:
        with pytest.raises(KeyboardInterrupt):
            with TrainingPanel(10, 1000) as panel:
                signal.raise_signal(signal.SIGINT)
                assert panel.should_stop()
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, started)


TRAINING = """
import time
from kdlib.viz import display as notebook
from kdlib.viz.training_panel import TrainingPanel
assert not notebook.headless()
panel = TrainingPanel(100, 1000)
end = time.time() + 20
with panel:
    print("ready")
    while not panel.should_stop() and time.time() < end:
        time.sleep(0.02)
print("stopped" if panel.should_stop() else "never asked")
"""


def run_until(client, code, act):
    """Run a cell as a front end does; `act` is called with the id of the button's comm when the cell prints "ready"."""
    request, comm, printed = client.execute(code), None, ""
    while True:
        message = client.get_iopub_msg(timeout=60)
        content, kind = message["content"], message["msg_type"]
        if kind == "comm_open" and content["data"]["state"].get("_model_name") == "ButtonModel":
            comm = content["comm_id"]
        elif kind == "stream":
            printed += content["text"]
            if "ready" in content["text"]:
                act(comm)
        elif kind == "error":
            raise AssertionError("\n".join(content["traceback"]))
        elif kind == "status" and content["execution_state"] == "idle":
            if message["parent_header"].get("msg_id") == request:
                return printed


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel of its own and a client of it."""
    progress = tmp_path_factory.mktemp("kernel") / "progress.json"  # as the runner sets it
    manager, client = start_new_kernel(env=os.environ | {"KDLIB_PROGRESS": str(progress)})
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_stop_button_and_interrupt_arrive_while_the_cell_runs(kernel):
    manager, client = kernel

    def press(comm):
        """As JupyterLab sends a press while a cell runs: over a subshell."""
        client.control_channel.send(client.session.msg("create_subshell_request"))
        subshell = client.get_control_msg(timeout=20)["content"]["subshell_id"]
        click = {"method": "custom", "content": {"event": "click"}}
        message = client.session.msg("comm_msg", {"comm_id": comm, "data": click})
        message["header"]["subshell_id"] = subshell
        client.shell_channel.send(message)

    assert "stopped" in run_until(client, TRAINING, press)
    assert "stopped" in run_until(client, TRAINING, lambda comm: manager.interrupt_kernel())


# --- headless

HEADLESS = [
    "widgets.tokeniser(pair, sentence)",
    "selection = select_tokens(teacher.tokenizer, tiny.texts(5), tiny.WORDS[:12], characters='all')\n"
    "widgets.vocabulary_size(teacher, selection, tiny.texts(20))",
    "widgets.layer_explorer(test_widgets.study_table())",
    "widgets.layer_map_editor(4, [2, 4])",
    "widgets.attention_heads(pair, '東京 ' + sentence)",
    "widgets.temperature(test_widgets.with_head(), explore.with_gap(sentence))",
    "widgets.temperature(teacher, explore.with_gap(sentence))",
    "widgets.results_explorer(test_widgets.study_table())",
    "widgets.neighbours(pair, tiny.texts(10), sentence)",
    "task = test_widgets.toy_task()\n"
    "widgets.labels({name: examples.probe_classifier(encoder, task) for name, encoder in pair.items()}, sentence)",
    "with TrainingPanel(4, 100) as panel:\n"
    "    for step in range(1, 5):\n"
    "        panel.on_point(test_widgets.curve_of(step))\n"
    "        assert not panel.should_stop()",
]
PICTURED = (1, 2, 3, 4, 7, 10)


@pytest.mark.slow
def test_headless_every_widget_leaves_a_still_view_and_no_widget(kernel):
    start = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import tiny\nfrom viz import test_widgets\nfrom kdlib.pruning.selection import select_tokens\n"
        "from kdlib.viz import examples, explore, widgets\nfrom kdlib.viz.training_panel import TrainingPanel\n"
        "teacher = tiny.encoder()\npair = {'teacher': teacher, 'student': tiny.encoder(layers=2)}\n"
        f"sentence = {SENTENCE!r}"
    )
    cells = [nbformat.v4.new_code_cell(source) for source in [start, *HEADLESS]]
    made = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(made, km=kernel[0], timeout=120).execute()
    nbformat.validate(made)
    assert "widgets" not in made.metadata and VIEW not in nbformat.writes(made)
    for i, cell in enumerate(made.cells[1:]):
        kinds = [output.output_type for output in cell.outputs]
        data = {kind: value for output in cell.outputs for kind, value in output.get("data", {}).items()}
        assert set(kinds) == {"display_data"}, cell.outputs
        assert ("image/png" in data) == (i in PICTURED) and len(body(data["text/html"])) > 40, cell.source
    assert "has no masked-language head" in made.cells[7].outputs[0].data["text/html"]
    assert "step 4 of 4" in body(made.cells[-1].outputs[1].data["text/html"])


def test_models_are_tried_on_a_sentence_side_by_side():
    encoders = {"teacher": tiny.encoder(layers=2), "student": tiny.encoder(layers=1, seed=1)}
    tasks = [tiny.task("classify"), tiny.task("multilabel"), tiny.task("pair")]
    panel = widgets.try_models(encoders, tasks, tiny.texts(12), "ang bata")
    assert all(word in panel.first.html for word in ("classify task", "multilabel task", "short", "ang bata", " ms"))
    assert "pair task" not in panel.first.html
    panel.controls["sentence"].value = "  "
    assert "Type a sentence." in panel.text.value
