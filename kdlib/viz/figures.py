"""Figures: each function takes the tidy table of results and returns a matplotlib Figure.

The table decides which models, tasks, languages and arms are drawn. The five models of a study always look the same.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from fontTools.unicodedata import script_name
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from kdlib.errors import UserError
from kdlib.files import new_file
from kdlib.viz import style
from kdlib.viz.comparisons import (
    ablation,
    ablation_families,
    benchmark_finetune,
    benchmark_probe,
    differences,
    efficiency,
    fewshot,
    retention,
    task_students,
)
from kdlib.viz.style import GREY, INK, LINES, MARKERS, PALE, PALETTE
from kdlib.viz.tables import check, headline_rows, language_name, need, select, tasks_of

LOSSES = {
    "loss": "loss (weighted sum, no unit)",
    "hidden": "hidden (MSE / teacher's variance)",
    "sentence": "sentence (1 − cosine)",
    "attention": "attention (MSE of scores)",
}
NEUTRAL = "digits and punctuation"  # letters of no script
SMOOTH = 5  # points that a smoothed curve averages, about
SPLITS = {"train": "training texts", "heldout": "held-out texts"}


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.pdf, whole or not at all. The same figure gives the same bytes."""
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Producer": "kdlib", "Creator": "kdlib"}}
    paths = [Path(folder) / f"{name}{suffix}" for suffix in metadata]
    with style.context():
        for path in paths:
            with new_file(path) as work:
                figure.savefig(work, dpi=150, metadata=metadata[path.suffix])
    return paths


def draw_all(table: pd.DataFrame, folder: str | Path) -> tuple[dict[str, list[Path]], list[tuple[str, str]]]:
    """Draw and save each figure that the table has rows for. Returns files by name, and (name, reason) of the rest."""
    check(table)
    files, missing = {}, []
    for name, draw in drawers(table).items():
        try:
            figure = draw(table)
        except UserError as error:
            missing.append((name, str(error)))
        else:
            files[name] = save(figure, folder, name)
    return files, missing


def drawers(table: pd.DataFrame) -> dict[str, Callable[[pd.DataFrame], Figure]]:
    """Every figure of a table by name: those of FIGURES, and one for each family of ablation arms."""
    unfit = re.compile(r"[^\w+.-]")  # a family's name must not become a path
    families = {f"ablation_{unfit.sub('_', family)[:60]}": family for family in ablation_families(table)}
    return FIGURES | {name: functools.partial(ablation, family=family) for name, family in families.items()}


@style.styled
def fertility(table: pd.DataFrame) -> Figure:
    """How finely the teacher's tokenizer splits each language: tokens per word, split words, unknown tokens."""
    panels = {
        "fertility": ("tokens per word", 1, "{:.2f}"),
        "split_words": ("words split (%)", 100, "{:.3g}"),
        "unknown_rate": ("unknown tokens (%)", 100, "{:.3g}"),
    }
    select(table, "probe", "tokens per word", metric="fertility")
    rows = select(table, "probe", "tokens per word", metric=list(panels)).drop_duplicates(["metric", "language"])
    values = rows.pivot(index="language", columns="metric", values="value").sort_values("fertility", ascending=False)
    found = [metric for metric in panels if metric in values and values[metric].any()]
    own, least = table["language"].mode().iloc[0], values["fertility"].idxmin()
    title = "How many tokens does the teacher's tokenizer need for a word?"
    if own in values.index:
        title = f"A word of {language_name(own)} takes {values.loc[own, 'fertility']:.2f} tokens"
        title += f", of {language_name(least)} {values.loc[least, 'fertility']:.2f}" if least != own else ""
    title += "" if "unknown_rate" in found else "\nno token is unknown"
    figure = style.new_figure(title, 2.2 + 0.5 * len(values))
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, metric in zip(axes, found):
        label, scale, number = panels[metric]
        colours = [PALETTE[0] if language == own else PALE for language in values.index]
        names = [style.wrap(language_name(language), 14) for language in values.index]
        bars = ax.barh(names, values[metric] * scale, color=colours)
        for bar, language in zip(bars, values.index):
            bar.set(edgecolor=INK, linewidth=0.8, hatch="" if language == own else "//")
        ax.bar_label(bars, fmt=number, padding=4)
        ax.set_xlim(0, (values[metric].max() * scale or 1) * 1.3)
        ax.set_xlabel(label)
        ax.yaxis.grid(False)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].set_ylabel("language")
    handles = [Patch(facecolor=PALETTE[0], edgecolor=INK, label="language of the study")]
    handles.append(Patch(facecolor=PALE, edgecolor=INK, hatch="//", label="other languages"))
    style.legend(figure, handles)
    return figure


@style.styled
def layer_probe(table: pd.DataFrame) -> Figure:
    """What a linear probe finds in each of the teacher's layers, task by task."""
    rows = select(table, "probe", "layer probe", method="layer probe")
    states, guess = rows[rows["layer"].notna()], rows[rows["model"] == "majority"]
    tasks = tasks_of(need(states, "probe", "layer probe"))
    lines = {"chance": (table["metric"] == "chance", ":", "best guess without reading")}
    lines["random"] = (table["model"] == "random weights", "--", "random weights")
    scores = headline_rows(table, table[table["method"] == "probe"])
    best = {task: states[states["task"] == task].set_index("layer")["value"].astype(float).idxmax() for task in tasks}
    figure, axes, _ = style.panels(_best_layers(best), len(tasks), 3, 3.0, sharex=True)
    drawn = set()
    for ax, task in zip(axes, tasks):
        mine = states[states["task"] == task]
        style.band(ax, mine, "layer", PALETTE[0], marker="o", markersize=4)
        top = mine[mine["layer"] == best[task]].iloc[0]
        ax.plot(float(top["layer"]), top["value"], "o", markersize=13, markerfacecolor="none", color=INK)
        for name, (where, line, _) in lines.items():
            found = table[where & (table["task"] == task) & (table["method"] == "probe") & table["seed"].isna()]
            found = found if name == "chance" else found.loc[found.index.intersection(scores.index)]
            if name == "chance" and found.empty:
                found = guess[guess["task"] == task]
            for value in found["value"].iloc[:1]:
                ax.axhline(value, color=GREY, linestyle=line, linewidth=1.5)
                drawn.add(name)
        ax.set_title(style.panel_title(task, mine))
        style.percent(ax.yaxis, style.score_label(mine))
        style.layer_axis(ax)
    handles = [
        Line2D([], [], color=PALETTE[0], marker="o", markersize=4, label="linear probe"),
        Patch(color=PALETTE[0], alpha=0.18, label="95% interval"),
        Line2D([], [], color=INK, marker="o", markersize=13, markerfacecolor="none", linestyle="", label="best layer"),
    ]
    handles += [
        Line2D([], [], color=GREY, linestyle=line, linewidth=1.5, label=label)
        for name, (_, line, label) in lines.items()
        if name in drawn
    ]
    style.legend(figure, handles)
    return figure


def _best_layers(best: dict[str, float]) -> str:
    """The layer where each task is known best."""
    tasks: dict[float, list[str]] = {}
    for task, layer in sorted(best.items(), key=lambda item: item[1]):
        tasks.setdefault(layer, []).append(task)
    parts = [f"layer {layer:g}: {', '.join(names)}" for layer, names in tasks.items()]
    return "Where the teacher knows most about each task\n" + style.wrap("; ".join(parts), 90)


@style.styled
def retrieval(table: pd.DataFrame) -> Figure:
    """How often a sentence's nearest neighbour in another language is its translation, layer by layer."""
    panels = {"plain": "states as they are", "centred": "each language's mean subtracted"}
    rows = select(table, "probe", "sentence retrieval", metric="retrieval")
    states, overlap = rows[rows["layer"].notna()], rows[rows["method"] == "baseline"]
    states = select(states, "probe", "sentence retrieval by layer", method=list(panels))
    languages = list(states["language"].unique())
    colours = [colour for colour in PALETTE if colour != GREY]
    looks = {language: (colours[i % 9], MARKERS[i % 10]) for i, language in enumerate(languages)}
    methods = [method for method in panels if method in set(states["method"])]
    means = states.astype({"value": float}).pivot_table(index="layer", columns="method", values="value")
    title = "In which layer is a sentence closest to its translation?\non average over languages: " + "; ".join(
        f"layer {means[method].idxmax():g}, {means[method].max():.0%} ({panels[method]})" for method in methods
    )
    figure, axes, _ = style.panels(title, len(methods), 2, 3.9, sharey=True)
    for ax, method in zip(axes, methods):
        mine = states[states["method"] == method]
        for language, (colour, marker) in looks.items():
            style.band(ax, mine[mine["language"] == language], "layer", colour, marker=marker, markersize=6)
            for value in overlap.loc[overlap["language"] == language, "value"]:  # at the side: it has no layer
                ax.plot(
                    1.02,
                    value,
                    transform=ax.get_yaxis_transform(),
                    color=colour,
                    marker=marker,
                    clip_on=False,
                    markerfacecolor="white",
                    linestyle="",
                )
        ax.set_title(f"{panels[method]}\n{style.count(mine['n'])}".strip())
        style.percent(ax.yaxis, "translation found first (%)")
        style.layer_axis(ax)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, label=style.wrap(language_name(language)))
        for language, (colour, marker) in looks.items()
    ]
    handles.append(Patch(color=GREY, alpha=0.3, label="95% interval"))
    if not overlap.empty:
        label = "hollow, at the right: by shared words alone"
        handles.append(Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="", label=label))
    style.legend(figure, handles)
    return figure


@style.styled
def cka(table: pd.DataFrame) -> Figure:
    """How similar the representations of every two layers are."""
    rows = select(table, "probe", "comparison of layers (CKA)", metric="cka").astype({"layer": int, "x": int})
    values = rows.pivot_table(index="layer", columns="x", values="value")
    apart = values.where(np.abs(np.subtract.outer(values.index, values.columns)) == 1)
    layer = int(apart.min().idxmin())
    pair = sorted((layer, int(apart[layer].idxmin())))
    title = "Neighbouring layers of the teacher differ most between {} and {}".format(*pair)
    figure = style.new_figure(title, 6.8, 8)
    ax = figure.subplots()
    lowest = min(
        np.floor(values.min().min() * 10) / 10, 0.9
    )  # most pairs are close to 1; the scale must show their differences
    sns.heatmap(
        values, vmin=lowest, vmax=1, cmap="cividis", square=True, ax=ax, cbar_kws={"label": "linear CKA (1 = the same)"}
    )
    floor = table[(table["stage"] == "probe") & (table["metric"] == "cka_floor")]["value"]
    if len(floor):
        ax.set_title(f"floor, with the sentences in another order: {floor.iloc[0]:.2f}")
    copied = table[(table["stage"] == "distill") & (table["metric"] == "copied_layer")]["value"]
    places = [list(values.index).index(layer) + 0.5 for layer in copied.astype(int) if layer in values.index]
    if places:
        ax.plot(places, places, "D", color="white", markeredgecolor=INK, label="copied into the student")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12))
    ax.invert_yaxis()
    ax.set(xlabel="layer (0 = embeddings)", ylabel="layer (0 = embeddings)")
    ax.tick_params(rotation=0)
    return figure


@style.styled
def vocabulary(table: pd.DataFrame) -> Figure:
    """How many vocabulary rows the language needs, and which scripts were removed."""
    coverage = select(table, "prune", "coverage of the vocabulary", metric="coverage")
    kept = select(table, "prune", "kept rows by script", metric=["rows_kept", "rows_cut"])
    rows = select(table, "prune", "size of the pruned vocabulary", model="pruned teacher", metric="rows")
    size = rows["value"].iloc[0]
    whole = kept["value"].sum()
    held = coverage[coverage["method"] == "heldout"].sort_values("x")
    title = f"{size / whole:.0%} of the vocabulary covers the language"
    if len(held):
        title += f", but for {1 - held['value'].iloc[-1]:.2%} of new text"
    figure = style.new_figure(title, 5.2)
    left, right = figure.subplots(1, 2)
    left.axvline(size, color=INK, linewidth=1.2, linestyle=":", label=f"after pruning: {size:,.0f} rows")
    several = coverage["language"].nunique() > 1
    for i, ((method, code), mine) in enumerate(coverage.groupby(["method", "language"], sort=False, dropna=False)):
        mine = mine.sort_values("x")
        look = {"color": PALETTE[i], "linestyle": LINES[i % 4], "marker": MARKERS[i]}
        label = {"heldout": "held-out texts"}.get(method, style.wrap(method))
        label += f", {code}" if several and method == "heldout" else ""
        missed = 1 - mine["value"]
        left.plot(mine["x"], missed.where(missed > 0), **look | {"marker": ""}, label=label)
        if (rest := 1 - np.interp(size, mine["x"], mine["value"])) > 0:
            left.plot(size, rest, **look, markeredgecolor="white")
            left.annotate(f"{rest:.2%}", (size, rest), xytext=(-10, 8), textcoords="offset points", ha="right")
    left.set_xscale("log")
    left.set_yscale("log")
    wide = coverage["x"].max() > 30 * coverage["x"].min()
    left.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    left.set_xlabel("rows: single characters, then the most frequent tokens")
    left.yaxis.set_major_formatter(lambda value, _: f"{value * 100:g}")
    left.set_ylabel("running tokens that are not covered (%)")

    rows = kept.pivot_table(index="arm", columns="metric", values="value", aggfunc="sum", fill_value=0)
    rows = rows.reindex(columns=["rows_kept", "rows_cut"], fill_value=0)
    rows = rows.loc[rows.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    if len(rows) > 9:
        rest = rows.iloc[8:].sum().to_frame(f"{len(rows) - 8} others").T
        rows = pd.concat([rows.iloc[:8], rest])
    names = [style.wrap(NEUTRAL if arm == "neutral" else script_name(arm, arm), 14) for arm in rows.index]
    right.barh(names, rows["rows_kept"] / 1000, color=PALETTE[3], edgecolor=INK, linewidth=0.8, label="kept")
    cut = right.barh(
        names, rows["rows_cut"] / 1000, left=rows["rows_kept"] / 1000, color=PALE, edgecolor=INK, linewidth=0.8,
        hatch="//", label="cut",
    )  # fmt: skip
    shares = rows["rows_kept"] / rows.sum(axis=1).clip(lower=1)
    right.bar_label(cut, [f"{share:.1%} kept" for share in shares], padding=4)
    right.set(xlabel="vocabulary rows (thousands)", ylabel="script")
    right.set_xlim(0, rows.sum(axis=1).max() / 1000 * 1.5)
    right.invert_yaxis()
    right.yaxis.grid(False)
    style.legend(figure, [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]])
    return figure


@style.styled
def learning_curve(table: pd.DataFrame) -> Figure:
    """Training and held-out loss of the student over time."""
    rows = select(table, "distill", "learning curve", model="student", method=list(SPLITS))
    select(rows, "distill", "learning curve", metric="loss")
    curve = rows.pivot_table(index=["method", "n", "x"], columns="metric", values="value").reset_index()
    curve = curve.rename(columns={"method": "split", "n": "step", "x": "seconds"}).sort_values("seconds")
    constant = table[(table["stage"] == "distill") & (table["model"] == "constant")]["value"]
    shown = "hidden" if "hidden" in curve else "loss"
    last = curve[curve["split"] == "heldout"][shown].iloc[-1:]
    title = "How closely does the student follow the teacher?"
    if shown == "hidden" and len(last):
        title = f"The student misses {last.iloc[0]:.0%} of the variance of the teacher's states"
        title += f"; always answering the mean misses {constant.iloc[0]:.0%}" if len(constant) else ""
    return _curves(curve, [shown], title, float(constant.iloc[0]) if len(constant) else None)


@style.styled
def live_curve(curve: pd.DataFrame, constant: float | None = None) -> Figure:
    """Loss and objectives against time, also during training.

    Args:
        curve: a row per point: split ("train" or "heldout"), step, seconds, loss, and one column per objective.
        constant: the objective "hidden" of a student that always answers the mean.
    """
    if curve.empty:
        raise UserError("no learning curve yet; the stage 'distill' has not evaluated the student")
    objectives = [name for name in curve.columns if name not in ("split", "step", "seconds", "loss")]
    # A single objective is the loss itself.
    names = ["loss", *objectives] if len(objectives) > 1 else ["loss"]
    return _curves(curve, names, "How closely does the student follow the teacher?", constant)


def _curves(curve: pd.DataFrame, names: list[str], title: str, constant: float | None) -> Figure:
    """A panel for each of these columns of a curve."""
    figure, axes, _ = style.panels(title, len(names), 3, 3.6 if len(names) > 1 else 4.2)
    for ax, name in zip(axes, names):
        points = curve[["split", "seconds", name]].dropna()
        for split, mine in points.groupby("split", sort=False):
            look = {"color": PALETTE[0], "linewidth": 1.5} if split == "train" else {"color": PALETTE[3], "marker": "D"}
            ax.plot(mine["seconds"] / 60, mine[name], **look)
        if constant is not None and name == "hidden":
            ax.axhline(constant, color=GREY, linestyle=":", label="always answering the mean")
            ax.legend(loc="best")
        lowest, highest = points[name].min(), points[name].max()
        if 0 < lowest and highest > 10 * lowest:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.set(xlabel="training time (minutes)", ylabel=LOSSES.get(name, name))
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    handles = [
        Line2D([], [], color=PALETTE[0], linewidth=1.5, label=SPLITS["train"]),
        Line2D([], [], color=PALETTE[3], marker="D", label=SPLITS["heldout"]),
    ]
    style.legend(figure, handles)
    return figure


@style.styled
def conditioning_curve(curve: pd.DataFrame, unigram: float | None = None) -> Figure:
    """Perplexity against steps, also during training.

    Args:
        curve: split ("warm-up" of a new head, "train" or "heldout"), step, perplexity; of held-out points low and high.
        unigram: perplexity of guessing by the frequency of tokens.
    """
    parts = [part for part in ("warm-up", "train") if part in set(curve["split"])] or ["train"]
    held = curve[curve["split"] == "heldout"].rename(columns={"perplexity": "value"}).sort_values("step")
    title = "How well does the teacher guess hidden words?"
    if unigram is not None and len(held):
        last = held.iloc[-1]
        clear = last["high"] < unigram, last["low"] > unigram
        verdict = "better than" if clear[0] else "worse than" if clear[1] else "not told apart from"
        title = (
            f"The conditioned teacher's perplexity is {last['value']:,.0f}:\n"
            f"{verdict} guessing by word frequency ({unigram:,.0f})"
        )
    figure, axes, _ = style.panels(title, len(parts), 2, 3.6)
    for ax, part in zip(axes, parts):
        mine = curve[curve["split"] == part].sort_values("step")
        ax.plot(mine["step"], mine["perplexity"], color=PALETTE[0], linewidth=0.8, alpha=0.4)
        ax.plot(mine["step"], np.exp(np.log(mine["perplexity"]).ewm(span=SMOOTH).mean()), color=PALETTE[0])
        if part == "train":
            ax.errorbar(held["step"], held["value"], yerr=style.whiskers(held), color=PALETTE[3], marker="D", capsize=3)
        if unigram is not None:
            ax.axhline(unigram, color=GREY, linestyle=":")
        ax.set_title({"warm-up": "a new head, the encoder frozen", "train": "the whole teacher"}[part])
        ax.set(xlabel="steps", ylabel="perplexity per hidden token")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles = [
        Line2D([], [], color=PALETTE[0], label=f"{SPLITS['train']}, smoothed"),
        Line2D([], [], color=PALETTE[3], marker="D", label=f"{SPLITS['heldout']}, with 95% interval"),
    ]
    if unigram is not None:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="guessing by word frequency"))
    style.legend(figure, handles)
    return figure


@style.styled
def conditioning(table: pd.DataFrame) -> Figure:
    """Perplexity of the teacher while it is conditioned."""
    rows = select(table, "condition", "perplexity", metric="perplexity")
    unigram = table[(table["stage"] == "condition") & (table["metric"] == "perplexity_unigram")]["value"]
    curve = rows.rename(columns={"method": "split", "n": "step", "value": "perplexity"})
    return conditioning_curve(curve, float(unigram.iloc[0]) if len(unigram) else None)


@style.styled
def layer_map_figure(teacher_layers: int, student_layers: int, copied: list[int], matched: list[int]) -> Figure:
    """Which teacher layers the student is copied from, and which it is compared with.

    Args:
        teacher_layers: number of layers.
        student_layers: number of layers.
        copied: for each student layer, lowest first, a teacher layer (1 = first); empty for a random start.
        matched: as `copied`, the layers compared.
    """
    figure = style.new_figure("Where does each layer of the student come from?", 4.6)
    ax = figure.subplots()
    height = 0.7  # of a box; teacher boxes are centred on y = 3, the student's on y = 0
    # Student layers are spread so that evenly spaced teacher layers stand right above them.
    places = [(i + 1) * teacher_layers / student_layers for i in range(student_layers)]
    look = {"ha": "center", "va": "center", "fontsize": 12, "color": "white", "fontweight": "bold"}
    for y, columns, colour in ((3, range(1, teacher_layers + 1), PALETTE[0]), (0, places, PALETTE[3])):
        for i, x in enumerate(columns, 1):
            ax.bar(x, height, 0.8, bottom=y - height / 2, color=colour, edgecolor=INK)
            ax.text(x, y, str(i), **look)
    side = 0.16 if sum(copied) > sum(matched) else -0.16  # arrows start on the side of their source
    for layers, shift, line, tip in ((copied, side, "-", "-|>"), (matched, -side if copied else 0, ":", "-")):
        for x, layer in zip(places, layers, strict=True) if layers else ():
            arrow = {"arrowstyle": tip, "linestyle": line, "color": INK, "linewidth": 2, "shrinkA": 2, "shrinkB": 2}
            ax.annotate("", (x + shift, height / 2), (layer + shift, 3 - height / 2), arrowprops=arrow)
    for y, label in ((3, "teacher's\nlayers"), (0, "student's\nlayers")):
        ax.text(0.2, y, label, ha="right", va="center")
    ax.set(xlim=(-1 - 0.05 * teacher_layers, teacher_layers + 0.6), ylim=(-0.6, 3.6))
    ax.axis("off")
    start = ("-", "copied from") if copied else ("", "nothing copied: a random start")
    lines = (start, (":", "compared with while training"))
    style.legend(figure, [Line2D([], [], color=INK, linestyle=line, label=label) for line, label in lines])
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    draw.__name__: draw
    for draw in (
        fertility, layer_probe, retrieval, cka, vocabulary, conditioning, learning_curve, benchmark_probe,
        benchmark_finetune, fewshot, task_students, retention, differences, efficiency,
    )
}  # fmt: skip
