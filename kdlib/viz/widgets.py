"""Widgets that teach: controls for the pictures of `kdlib.viz.explore`.

Each function returns a `Panel`; the last line of a cell shows it. A headless run (papermill, nbconvert) shows a still
view instead. A running notebook also saves that view, for viewers without widgets.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import ipywidgets as W
import numpy as np
import pandas as pd

from kdlib.data.tasks import Task
from kdlib.distillation.student_init import RULES, layer_map
from kdlib.errors import UserError
from kdlib.models.encoder import Encoder
from kdlib.pruning.selection import Selection
from kdlib.viz import figures
from kdlib.viz.examples import (
    Classify,
    Index,
    build_index,
    labels_html,
    nearest,
    neighbours_html,
    probe_classifier,
    timed,
    written,
)
from kdlib.viz.explore import (
    attention_figure,
    attention_html,
    attentions,
    layer_choice_html,
    layer_curves,
    layer_figure,
    layer_html,
    masked_logits,
    size_figure,
    size_html,
    size_table,
    targets_html,
    tokens_html,
)
from kdlib.viz.html import escape, html_table, page, paragraph
from kdlib.viz.panel import Build, Panel, View
from kdlib.viz.results import comparable, results_figure, results_html

text_box = partial(W.Text, continuous_update=False, layout={"width": "98%"}, placeholder="type a sentence, then Enter")


def _several(names: Sequence[str], value: Sequence[str] | None = None) -> partial:
    """A list to choose several from; all at first."""
    names = list(names)
    chosen = tuple(names if value is None else value)
    return partial(W.SelectMultiple, options=names, value=chosen, rows=min(7, max(2, len(names))))


def _needs_text(text: str) -> str:
    if not text.strip():
        raise UserError("Type a sentence.")
    return text


class Prediction(Panel):
    """A box for what the reader expects; see `prediction`."""

    def beside(self, found: str) -> None:
        """Show the prediction and what the run found. The table follows the box when the reader changes it."""

        def table() -> str:
            noted = escape(self.state["prediction"]) or "(nothing noted)"
            return page(html_table(["you predicted", "this run found"], [[noted, escape(found)]]))

        shown = Panel(lambda: View(table()))
        if "controls" in vars(self):  # the box is on the page
            self.controls["prediction"].observe(lambda _: shown.put(View(table())), "value")
        shown._ipython_display_()


def prediction(question: str) -> Prediction:
    """A box in which the reader answers a question before the cell that answers it; show both by `beside`."""

    def view(prediction: str) -> View:
        return View(page(paragraph(f"<b>{escape(question)}</b>")))

    return Prediction(view, prediction=partial(text_box, value="", placeholder="your prediction, then Enter"))


def task_rows(tasks: Sequence[Task], rows: int = 8) -> Panel:
    """The labelled rows of the tasks, by task, label and a part of the text; at most `rows` are shown."""
    named = {task.name: task for task in tasks}

    def options(name: str) -> list[str]:
        task = named[name]
        return ["any", *sorted(set().union(*map(task.classes, task.train.targets)))]

    def view(task: str, label: str, contains: str) -> View:
        chosen, found = named[task], []
        for text, target in zip(chosen.train.texts, chosen.train.targets):
            words, classes = written(chosen, text, target), chosen.classes(target)
            if label in ("any", *classes) and contains.lower() in words.lower():
                found.append([escape(words), escape(", ".join(sorted(classes)))])
        count = f"{len(found):,} of {len(chosen.train):,} training rows; {min(rows, len(found))} are shown."
        return View(page(paragraph(count), html_table(["text", "label"], found[:rows])))

    def adapt(name: str, controls: dict[str, W.ValueWidget]) -> None:
        if name == "task":
            controls["label"].options = options(controls["task"].value)

    first = tasks[0].name
    return Panel(
        view, adapt,
        task=partial(W.Dropdown, options=list(named), value=first),
        label=partial(W.Dropdown, options=options(first), value="any"),
        contains=partial(text_box, value="", placeholder="a part of the text, then Enter"),
    )  # fmt: skip


def tokeniser(encoders: Mapping[str, Encoder], sentence: str) -> Panel:
    """How each encoder's tokenizer splits any sentence, as the reader types."""

    def view(sentence: str) -> View:
        return View(tokens_html(encoders, _needs_text(sentence)))

    return Panel(view, sentence=partial(text_box, value=sentence, continuous_update=True))


def vocabulary_size(teacher: Encoder, selection: Selection, texts: Sequence[str], rows: int | None = None) -> Panel:
    """Rows of the vocabulary against coverage, unknown tokens and parameters.

    Args:
        teacher: the encoder whose vocabulary is pruned.
        selection: the rows to keep.
        texts: texts to measure on, best held-out ones.
        rows: the size first shown, rounded to a measured one; default the selection's.
    """
    table = size_table(teacher, selection, texts)
    sizes = table["rows"].tolist()
    wanted = len(selection.ids) if rows is None else rows

    def view(rows: int) -> View:
        return View(size_html(table, rows), size_figure(table, rows))

    slider = partial(
        W.SelectionSlider, options=[(f"{size:,}", size) for size in sizes], continuous_update=False,
        value=min(sizes, key=lambda size: abs(size - wanted)), layout={"width": "98%"},
    )  # fmt: skip
    return Panel(view, rows=slider)


def layer_explorer(table: pd.DataFrame, model: str = "teacher") -> Panel:
    """What each layer of a model knows: probes by task and retrieval by language, from the table of results."""
    curves = layer_curves(table, model)
    names = {kind: list(part["curve"].unique()) for kind, part in curves.groupby("kind")}
    last = int(curves["layer"].max())

    def view(layer: int, tasks: Sequence[str] = (), languages: Sequence[str] = ()) -> View:
        shown = [*tasks, *languages]
        if not shown:
            raise UserError("Choose a task or a language.")
        return View(layer_html(curves, shown, layer), layer_figure(curves, shown, layer))

    slider = partial(W.IntSlider, min=0, max=last, value=last, continuous_update=False, layout={"width": "98%"})
    lists = {}
    if "task" in names:
        lists["tasks"] = _several(names["task"])
    if "language" in names:
        centred = [name for name in names["language"] if name.endswith(", centred")]
        lists["languages"] = _several(names["language"], centred or None)
    return Panel(view, layer=slider, **lists)


class LayerMapEditor(Panel):
    """An editor for the teacher layer that each student layer copies; see `layer_map_editor`."""

    @property
    def value(self) -> list[int]:
        """The list for `student.init`."""
        state = self.state
        return [state[f"layer_{i + 1}"] for i in range(state["depth"])]


def layer_map_editor(
    teacher_layers: int, layers: Sequence[int], compared: str | list[int] = "alternate"
) -> LayerMapEditor:
    """Choose depth and copied layers of a student; `.value` is the list for `student.init`.

    Dotted lines show what distillation compares.

    Args:
        teacher_layers: number of layers.
        layers: the layers first shown, one teacher layer (1 = first) per student layer.
        compared: the profile's `distill.layers`. A list holds for its own depth only; other depths show "alternate".
    """
    presets = {rule: partial(layer_map, rule, teacher_layers=teacher_layers) for rule in RULES}

    def matched(depth: int) -> list[int]:
        fits = isinstance(compared, str) or len(compared) == depth
        return layer_map(compared if fits else "alternate", depth, teacher_layers)

    def view(depth: int, start: str, **chosen: int) -> View:
        copied = [chosen[f"layer_{i + 1}"] for i in range(depth)]
        picture = figures.layer_map_figure(teacher_layers, depth, copied, matched(depth))
        return View(layer_choice_html(copied), picture)

    def adapt(name: str, controls: dict[str, W.ValueWidget]) -> None:
        depth, start = controls["depth"].value, controls["start"]
        if name.startswith("layer_"):
            start.value = "own choice"
        for i in range(teacher_layers):
            control = controls[f"layer_{i + 1}"]
            control.layout.display = None if i < depth else "none"
            if start.value in presets and i < depth:
                control.value = presets[start.value](depth)[i]

    depth, layers = len(layers), list(layers)
    start = next((name for name, preset in presets.items() if preset(depth) == layers), "own choice")
    rows = layers + [teacher_layers] * (teacher_layers - depth)
    selectors = {
        f"layer_{i + 1}": partial(
            W.Dropdown,
            options=range(1, teacher_layers + 1),
            value=layer,
            description=f"layer {i + 1} from",
            layout={"width": "150px", "display": None if i < depth else "none"},
        )
        for i, layer in enumerate(rows)
    }
    return LayerMapEditor(
        view, adapt,
        depth=partial(W.IntSlider, min=1, max=teacher_layers, value=depth, continuous_update=False),
        start=partial(W.ToggleButtons, options=[*presets, "own choice"], value=start),
        **selectors,
    )  # fmt: skip


def attention_heads(encoders: Mapping[str, Encoder], sentence: str) -> Panel:
    """The attention of one head of each encoder in a sentence; at first the last layers' first heads."""

    @lru_cache(maxsize=4)
    def probabilities(text: str) -> dict[str, tuple[list[str], np.ndarray]]:
        return {name: attentions(encoder, text) for name, encoder in encoders.items()}

    def view(sentence: str, **place: int) -> View:
        maps = {}
        for i, (name, (tokens, states)) in enumerate(probabilities(_needs_text(sentence)).items()):
            layer, head = place[f"layer_{i}"], place[f"head_{i}"]
            maps[f"{name}, layer {layer}, head {head}"] = (tokens, states[layer - 1, head - 1])
        return View(attention_html(maps), attention_figure(maps))

    sliders: dict[str, Build] = {}
    for i, (name, encoder) in enumerate(encoders.items()):
        for part, count, value in (
            ("layer", encoder.layers, encoder.layers),
            ("head", encoder.model.config.num_attention_heads, 1),
        ):
            sliders[f"{part}_{i}"] = partial(
                W.IntSlider, min=1, max=count, value=value, description=f"{name}: {part}", continuous_update=False,
                layout={"width": "48%"},
            )  # fmt: skip
    return Panel(view, sentence=partial(text_box, value=sentence), **sliders)


def temperature(source: Encoder | Callable[[str], tuple[Sequence[str], np.ndarray]], sentence: str) -> Panel:
    """The soft targets for a hidden word at a chosen temperature.

    Args:
        source: an encoder with a masked-language head, or a function from a text with a gap (___) to tokens and logits.
            For an encoder without a head a sentence says so.
        sentence: the first text.
    """
    if isinstance(source, Encoder) and (source.head is None or source.tokenizer.mask_token is None):
        try:
            masked_logits(source, sentence)
        except UserError as error:
            told = View(page(paragraph(escape(error))))
            return Panel(lambda: told)
    logits = lru_cache(maxsize=8)(partial(masked_logits, source) if isinstance(source, Encoder) else source)

    def view(sentence: str, temperature: float) -> View:
        return View(targets_html(*logits(_needs_text(sentence)), temperature))

    slider = partial(
        W.SelectionSlider, options=[0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0], value=2.0,
        layout={"width": "60%"},
    )  # fmt: skip
    return Panel(view, sentence=partial(text_box, value=sentence), temperature=slider)


def results_explorer(table: pd.DataFrame) -> Panel:
    """Comparable numbers of a study with their intervals, from the table of results."""
    rows = comparable(table)

    def options(what: str, task: str | None = None, metric: str | None = None) -> dict[str, list[str]]:
        """What can be chosen beside these; a task or metric that does not occur there gives way to the first."""
        part = rows[rows["what"] == what]
        tasks = list(part["task"].unique())
        part = part[part["task"] == (task if task in tasks else _preferred(tasks))]
        metrics = list(part["metric"].unique())
        part = part[part["metric"] == (metric if metric in metrics else metrics[0])]
        return {"task": tasks, "metric": metrics, "names": list(part["name"].unique())}

    def view(what: str, task: str, metric: str, names: Sequence[str]) -> View:
        part = rows[(rows["what"] == what) & (rows["task"] == task) & (rows["metric"] == metric)]
        part = part[part["name"].isin(names)]
        if part.empty:
            raise UserError("Choose a model or an arm.")
        return View(results_html(part), results_figure(part))

    def adapt(name: str, controls: dict[str, W.ValueWidget]) -> None:
        if name == "names":
            return
        found = options(controls["what"].value, controls["task"].value, controls["metric"].value)
        for key in ("task", "metric"):
            value = controls[key].value
            controls[key].options = _labelled(found[key])
            controls[key].value = value if value in found[key] else _preferred(found[key])
        controls["names"].options = found["names"]
        controls["names"].value = tuple(found["names"])

    whats = list(rows["what"].unique())
    what = next((name for name in whats if name.startswith("benchmark: ")), whats[0])
    found = options(what)
    return Panel(
        view, adapt,
        what=partial(W.Dropdown, options=whats, value=what),
        task=partial(W.Dropdown, options=_labelled(found["task"]), value=_preferred(found["task"])),
        metric=partial(W.Dropdown, options=_labelled(found["metric"]), value=found["metric"][0]),
        names=_several(found["names"]),
    )  # fmt: skip


def _preferred(names: Sequence[str]) -> str:
    return "average" if "average" in names else names[0]


def _labelled(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name.replace("_", " ") or "(no task)", name) for name in names]


def neighbours(
    encoders: Mapping[str, Encoder],
    texts: Sequence[str],
    sentence: str,
    vectors: Mapping[str, np.ndarray] | None = None,
) -> Panel:
    """The texts nearest to any sentence, by each encoder side by side.

    Args:
        encoders: by display name.
        texts: the texts to search.
        sentence: the first query.
        vectors: by encoder, float [texts, hidden]; computed when the panel is shown if not given.
    """

    @lru_cache(maxsize=1)
    def indexes() -> dict[str, Index]:
        known = vectors or {}
        return {name: build_index(encoder, texts, known.get(name)) for name, encoder in encoders.items()}

    def view(sentence: str, neighbours: int) -> View:
        query = _needs_text(sentence)
        found = {name: nearest(index, query, neighbours) for name, index in indexes().items()}
        return View(neighbours_html(found, query))

    return Panel(
        view,
        sentence=partial(text_box, value=sentence),
        neighbours=partial(W.IntSlider, min=1, max=min(10, len(texts)), value=min(5, len(texts))),
    )


def labels(classifiers: Mapping[str, Classify], sentence: str) -> Panel:
    """The labels that each classifier gives any sentence, with probabilities and time.

    Args:
        classifiers: by model, a function from a text to label -> probability, such as `examples.probe_classifier`
            makes.
        sentence: the first text.
    """

    def view(sentence: str) -> View:
        text = _needs_text(sentence)
        return View(labels_html({name: timed(c, text) for name, c in classifiers.items()}))

    return Panel(view, sentence=partial(text_box, value=sentence))


def try_models(
    encoders: Mapping[str, Encoder], tasks: Sequence[Task], texts: Sequence[str], sentence: str, rows: int | None = 1000
) -> Panel:
    """Labels, times and nearest texts of any sentence, by each encoder side by side.

    Args:
        encoders: by display name.
        tasks: a linear probe is fitted for each of kind classify or multilabel; others are left out.
        texts: the texts to search.
        sentence: the first sentence.
        rows: training rows of a probe at most; None: all.
    """
    tasks = [task for task in tasks if task.kind in ("classify", "multilabel")]

    @lru_cache(maxsize=1)
    def made() -> tuple[dict[str, Index], dict[str, dict[str, Classify]]]:
        probes = {t.name: {name: probe_classifier(e, t, rows) for name, e in encoders.items()} for t in tasks}
        return {name: build_index(encoder, texts) for name, encoder in encoders.items()}, probes

    def view(sentence: str) -> View:
        text = _needs_text(sentence)
        indexes, probes = made()
        parts = []
        for task, classifiers in probes.items():
            answers = {name: timed(classify, text) for name, classify in classifiers.items()}
            parts.append(page(paragraph(f"<b>{escape(task.replace('_', ' '))}</b>")) + labels_html(answers))
        found = {name: nearest(index, text) for name, index in indexes.items()}
        return View("".join([*parts, neighbours_html(found, text)]))

    return Panel(view, sentence=partial(text_box, value=sentence))
