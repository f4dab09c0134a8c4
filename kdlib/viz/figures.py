"""Figures: each takes the tidy table of results and gives a matplotlib Figure; and the headline table.

What the table holds decides what is drawn: models, tasks, languages and arms are never named here, but for the five
models of a study, which look the same in every figure.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from fontTools.unicodedata import script_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from kdlib.errors import UserError
from kdlib.files import new_file
from kdlib.viz import style
from kdlib.viz.style import GREY, INK, LINES, LOOKS, MARKERS, PALE, PALETTE, SCORES, Look

NUMBERS = ["x", "value", "low", "high", "n"]
LOSSES = {
    "loss": "loss (weighted sum, no unit)",
    "hidden": "hidden (MSE / teacher's variance)",
    "sentence": "sentence (1 − cosine)",
    "attention": "attention (MSE of scores)",
}
FAMILIES = {  # a family of ablation arms: title of its figure, label of its axis
    "fraction": ("How much text does the student need?", "corpus used (%)"),
    "epochs": ("How long should a student learn?", "passes over the corpus"),
    "init": ("From which of the teacher's layers should a student start?", "layers copied"),
    "objective": ("What should the student have in common with the teacher?", "objectives"),
    "conditioning": ("Does it help to condition the teacher first?", "distilled from"),
    "depth": ("How deep must a student be?", "layers of the student"),
    "width": ("How wide must a student be?", "width of the student"),
    "size": ("How large must a student be?", "student"),
    "start": ("How should a narrower student start?", "weights from the teacher"),
    "vocabulary": ("How many embedding rows does a student need?", "rows of the vocabulary"),
}
SPLITS = {"train": "training texts", "heldout": "held-out texts"}
TEACHER_SHARE = 95  # percent of the teacher's score that a student is hoped to keep


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.pdf, whole or not at all; the same figure gives the same bytes."""
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Producer": "kdlib", "Creator": "kdlib"}}
    paths = [Path(folder) / f"{name}{suffix}" for suffix in metadata]
    with style.context():
        for path in paths:
            with new_file(path) as work:
                figure.savefig(work, dpi=150, metadata=metadata[path.suffix])
    return paths


def draw_all(table: pd.DataFrame, folder: str | Path) -> tuple[dict[str, list[Path]], list[tuple[str, str]]]:
    """Draw and save every figure that the table has rows for: the files by name, and (name, why not) of the others."""
    _check(table)
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
    """Every figure of a table by name: those of FIGURES, and one for each family of ablation arms that it has."""
    unfit = re.compile(r"[^\w+.-]")  # anybody may have written the table: a family's name must not become a path
    families = {f"ablation_{unfit.sub('_', family)[:60]}": family for family in ablation_families(table)}
    return FIGURES | {name: functools.partial(ablation, family=family) for name, family in families.items()}


def _check(table: pd.DataFrame) -> None:
    if table.empty:
        raise UserError("the table of results is empty; run the stages of the study first")


def _select(table: pd.DataFrame, stage: str, what: str, **where: str | Sequence[str]) -> pd.DataFrame:
    """The rows of `stage` with a finite value and these column values; UserError if there are none."""
    _check(table)
    rows = table[(table["stage"] == stage) & np.isfinite(table["value"].astype(float))]
    for column, wanted in where.items():
        rows = rows[rows[column].isin([wanted] if isinstance(wanted, str) else wanted)]
    return _need(rows, stage, what)


def _need(rows: pd.DataFrame, stage: str, what: str) -> pd.DataFrame:
    if rows.empty:
        raise UserError(f"no {what} in the table of results; run the stage {stage!r} first")
    return rows


def _headline_rows(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Those of `rows` that hold their task's headline metric, or the average over tasks."""
    scores = table[table["task"].notna() & (table["task"] != "average")]
    # The layer probe names no other metric; the other stages name the headline first.
    scores = scores.sort_values("stage", key=lambda stage: stage != "probe", kind="stable")
    headline = scores.drop_duplicates("task").set_index("task")["metric"].to_dict() | {"average": "score"}
    return rows[rows["metric"] == rows["task"].map(headline)]


def summary(rows: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """One row per `keys`: the row without a seed where there is one, else means over the seeds."""
    places = rows.set_index(list(keys)).index
    summarised = places.isin(places[rows["seed"].isna()])
    chosen = rows[rows["seed"].isna() | ~summarised].astype(dict.fromkeys(NUMBERS, float))
    numbers = [column for column in NUMBERS if column not in keys]
    return chosen.groupby([*keys, "metric"], sort=False)[numbers].mean().reset_index()


def _tasks(rows: pd.DataFrame) -> list[str]:
    """Tasks in the table's order, the average last, where it is of several."""
    found = list(rows["task"].dropna().unique())
    tasks = [task for task in found if task != "average"]
    return tasks if len(tasks) == 1 else tasks + ["average"] * ("average" in found)


@style.styled
def fertility(table: pd.DataFrame) -> Figure:
    """How finely the teacher's tokenizer cuts each language: tokens per word, words split, unknown tokens."""
    panels = {
        "fertility": ("tokens per word", 1, "{:.2f}"),
        "split_words": ("words split (%)", 100, "{:.3g}"),
        "unknown_rate": ("unknown tokens (%)", 100, "{:.3g}"),
    }
    _select(table, "probe", "tokens per word", metric="fertility")
    rows = _select(table, "probe", "tokens per word", metric=list(panels)).drop_duplicates(["metric", "language"])
    values = rows.pivot(index="language", columns="metric", values="value").sort_values("fertility", ascending=False)
    found = [metric for metric in panels if metric in values]
    own = table["language"].mode().iloc[0]
    figure = style.new_figure("Into how many pieces does the teacher's tokenizer cut a word?", 2.2 + 0.5 * len(values))
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, metric in zip(axes, found):
        label, scale, number = panels[metric]
        colours = [PALETTE[0] if language == own else PALE for language in values.index]
        bars = ax.barh([style.wrap(language, 14) for language in values.index], values[metric] * scale, color=colours)
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
    """What a linear probe reads from each of the teacher's layers, task by task."""
    rows = _select(table, "probe", "layer probe", method="layer probe")
    states, chance = rows[rows["layer"].notna()], rows[rows["model"] == "majority"]
    tasks = _tasks(_need(states, "probe", "layer probe"))
    title = "In which layer does the teacher know most about each task?"
    figure, axes, _ = style.panels(title, len(tasks), 3, 3.0, sharex=True, sharey=True)
    for ax, task in zip(axes, tasks):
        mine = states[states["task"] == task]
        style.band(ax, mine, "layer", PALETTE[0], marker="o", markersize=4)
        best = mine.loc[mine["value"].idxmax()]
        ax.plot(float(best["layer"]), best["value"], "o", markersize=13, markerfacecolor="none", color=INK)
        for value in chance.loc[chance["task"] == task, "value"]:
            ax.axhline(value, color=GREY, linestyle="--", linewidth=1.3)
        ax.set_title(style.panel_title(task, mine))
        style.percent(ax.yaxis, style.score_label(mine))
        style.layer_axis(ax)
    handles = [
        Line2D([], [], color=PALETTE[0], marker="o", markersize=4, label="linear probe"),
        Patch(color=PALETTE[0], alpha=0.18, label="95% interval"),
        Line2D([], [], color=INK, marker="o", markersize=13, markerfacecolor="none", linestyle="", label="best layer"),
    ]
    if not chance.empty:
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1.3, label="always the commonest label"))
    style.legend(figure, handles)
    return figure


@style.styled
def retrieval(table: pd.DataFrame) -> Figure:
    """How often a sentence's nearest neighbour in another language is its translation, layer by layer."""
    panels = {"plain": "states as they are", "centred": "each language's mean subtracted"}
    rows = _select(table, "probe", "sentence retrieval", metric="retrieval")
    states, overlap = rows[rows["layer"].notna()], rows[rows["method"] == "baseline"]
    states = _select(states, "probe", "sentence retrieval by layer", method=list(panels))
    languages = list(states["language"].unique())
    colours = [colour for colour in PALETTE if colour != GREY]
    looks = {language: (colours[i % 9], MARKERS[i % 10]) for i, language in enumerate(languages)}
    methods = [method for method in panels if method in set(states["method"])]
    title = "In which layer does a sentence find its translation?"
    figure, axes, _ = style.panels(title, len(methods), 2, 3.9, sharey=True)
    for ax, method in zip(axes, methods):
        mine = states[states["method"] == method]
        for language, (colour, marker) in looks.items():
            style.band(ax, mine[mine["language"] == language], "layer", colour, marker=marker, markersize=6)
            for value in overlap.loc[overlap["language"] == language, "value"]:
                ax.axhline(value, color=colour, linewidth=1.3, linestyle="--")
        ax.set_title(f"{panels[method]}\n{style.count(mine['n'])}".strip())
        style.percent(ax.yaxis, "translation found first (%)")
        style.layer_axis(ax)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, label=style.wrap(language))
        for language, (colour, marker) in looks.items()
    ]
    handles.append(Patch(color=GREY, alpha=0.3, label="95% interval"))
    if not overlap.empty:
        handles.append(Line2D([], [], color=INK, linewidth=1.3, linestyle="--", label="by shared words alone"))
    style.legend(figure, handles)
    return figure


@style.styled
def cka(table: pd.DataFrame) -> Figure:
    """How alike the representations of every two layers are."""
    rows = _select(table, "probe", "comparison of layers (CKA)", metric="cka").astype({"layer": int, "x": int})
    values = rows.pivot_table(index="layer", columns="x", values="value")
    figure = style.new_figure("Which layers of the teacher hold alike representations?", 6.4, 8)
    ax = figure.subplots()
    lowest = min(np.floor(values.min().min() * 10) / 10, 0.9)  # most pairs are close to 1: their differences must show
    sns.heatmap(
        values, vmin=lowest, vmax=1, cmap="cividis", square=True, ax=ax, cbar_kws={"label": "linear CKA (1 = the same)"}
    )
    ax.invert_yaxis()
    ax.set(xlabel="layer (0 = embeddings)", ylabel="layer (0 = embeddings)")
    ax.tick_params(rotation=0)
    return figure


@style.styled
def vocabulary(table: pd.DataFrame) -> Figure:
    """How many vocabulary rows the language needs, and whose rows were cut."""
    coverage = _select(table, "prune", "coverage of the vocabulary", metric="coverage")
    kept = _select(table, "prune", "kept rows by script", metric=["rows_kept", "rows_cut"])
    rows = _select(table, "prune", "size of the pruned vocabulary", model="pruned teacher", metric="rows")
    size = rows["value"].iloc[0]
    figure = style.new_figure("How much of the vocabulary does the language need?", 5.2)
    left, right = figure.subplots(1, 2)
    left.axvline(size, color=INK, linewidth=1.2, linestyle=":", label=f"after pruning: {size:,.0f} rows")
    for i, (method, mine) in enumerate(coverage.groupby("method", sort=False)):
        mine = mine.sort_values("x")
        look = {"color": PALETTE[i], "linestyle": LINES[i % 4], "marker": MARKERS[i]}
        label = {"heldout": "held-out texts"}.get(method, style.wrap(method))
        left.plot(mine["x"], mine["value"], **look | {"marker": ""})
        left.plot(size, np.interp(size, mine["x"], mine["value"]), **look, markeredgecolor="white", label=label)
    left.set_xscale("log")
    wide = coverage["x"].max() > 30 * coverage["x"].min()
    left.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    left.set_xlabel("rows, the most frequent first (log scale)")
    style.percent(left.yaxis, "running tokens covered (%)")

    rows = kept.pivot_table(index="arm", columns="metric", values="value", aggfunc="sum", fill_value=0)
    rows = rows.reindex(columns=["rows_kept", "rows_cut"], fill_value=0)
    rows = rows.loc[rows.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    if len(rows) > 9:
        rest = rows.iloc[8:].sum().to_frame(f"{len(rows) - 8} others").T
        rows = pd.concat([rows.iloc[:8], rest])
    names = [style.wrap(script_name(arm, arm), 14) for arm in rows.index]
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
    rows = _select(table, "distill", "learning curve", model="student", method=list(SPLITS))
    _select(rows, "distill", "learning curve", metric="loss")
    curve = rows.pivot_table(index=["method", "n", "x"], columns="metric", values="value").reset_index()
    return live_curve(curve.rename(columns={"method": "split", "n": "step", "x": "seconds"}).sort_values("seconds"))


@style.styled
def live_curve(curve: pd.DataFrame) -> Figure:
    """Loss and objectives against time, also while training goes on.

    curve: one row per point; columns split ("train" or "heldout"), step, seconds, loss, and one per objective.
    """
    if curve.empty:
        raise UserError("no learning curve yet; the stage 'distill' has not evaluated the student")
    objectives = [name for name in curve.columns if name not in ("split", "step", "seconds", "loss")]
    # A single objective is the loss itself.
    names = ["loss", *objectives] if len(objectives) > 1 else ["loss"]
    figure, axes, _ = style.panels("How closely does the student follow the teacher?", len(names), 3, 3.6)
    for ax, name in zip(axes, names):
        points = curve[["split", "seconds", name]].dropna()
        for split, mine in points.groupby("split", sort=False):
            look = {"color": PALETTE[0], "linewidth": 1.5} if split == "train" else {"color": PALETTE[3], "marker": "D"}
            ax.plot(mine["seconds"] / 60, mine[name], **look)
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
def conditioning_curve(curve: pd.DataFrame) -> Figure:
    """Perplexity against time, also while training goes on.

    curve: split ("warm-up" of a new head, "train" or "heldout"), seconds, perplexity; of held-out ones low and high.
    """
    parts = [part for part in ("warm-up", "train") if part in set(curve["split"])] or ["train"]
    figure, axes, _ = style.panels("How well does the teacher guess hidden words?", len(parts), 2, 3.6)
    for ax, part in zip(axes, parts):
        mine = curve[curve["split"] == part]
        ax.plot(mine["seconds"] / 60, mine["perplexity"], color=PALETTE[0], linewidth=1.5)
        if part == "train":
            held = curve[curve["split"] == "heldout"].rename(columns={"perplexity": "value"})
            ax.errorbar(
                held["seconds"] / 60, held["value"], yerr=style.whiskers(held), color=PALETTE[3], marker="D", capsize=3
            )
        ax.set_title({"warm-up": "a new head, the encoder frozen", "train": "the whole teacher"}[part])
        ax.set(xlabel="training time (minutes)", ylabel="perplexity per hidden token")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    handles = [
        Line2D([], [], color=PALETTE[0], linewidth=1.5, label=SPLITS["train"]),
        Line2D([], [], color=PALETTE[3], marker="D", label=f"{SPLITS['heldout']}, with 95% interval"),
    ]
    style.legend(figure, handles)
    return figure


@style.styled
def conditioning(table: pd.DataFrame) -> Figure:
    """Perplexity of the teacher while it is conditioned."""
    rows = _select(table, "condition", "perplexity", metric="perplexity")
    return conditioning_curve(rows.rename(columns={"method": "split", "x": "seconds", "value": "perplexity"}))


@style.styled
def layer_map_figure(teacher_layers: int, student_layers: int, copied: list[int], matched: list[int]) -> Figure:
    """Which teacher layers the student is copied from, and which it is compared with.

    copied, matched: for each student layer, lowest first, a teacher layer (1 = first); nothing copied: a random start.
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
    side = 0.16 if sum(copied) > sum(matched) else -0.16  # copies come from the side where their source is
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


def _benchmark(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """The headline score of every model on every task, a row each."""
    what = {"probe": "probe score", "finetune": "fine-tuning score"}[method]
    rows = _headline_rows(table, _select(table, "benchmark", what, method=method))
    return summary(_need(rows, "benchmark", what), "task", "model")


def _task_labels(rows: pd.DataFrame) -> dict[str, str]:
    """Task -> its name with metric and n, for an axis."""
    labels = {}
    for task in _tasks(rows):
        mine = rows[rows["task"] == task]
        metric = mine["metric"].iloc[0]
        detail = ", ".join(filter(None, [SCORES.get(metric, metric), style.count(mine["n"])]))
        labels[task] = "average of tasks" if task == "average" else f"{style.wrap(task)}\n{detail}"
    return labels


def _benchmark_figure(table: pd.DataFrame, method: str, title: str) -> Figure:
    rows, looks = _benchmark(table, method), style.looks(table)
    labels = _task_labels(rows)
    rows = rows[rows["task"].isin(labels)]
    figure = style.new_figure(title, 1.7 + 0.85 * len(labels))
    ax = figure.subplots()
    style.dots(ax, rows, "task", labels, looks)
    style.percent(ax.xaxis, "score (%), with 95% intervals over seeds and test items")
    ax.set_ylabel("task")
    style.legend(figure, style.model_handles(rows["model"], looks))
    return figure


@style.styled
def benchmark_probe(table: pd.DataFrame) -> Figure:
    """Scores of a linear probe on each model's frozen sentence or token vectors."""
    return _benchmark_figure(table, "probe", "What can a linear probe read from each frozen model?")


@style.styled
def benchmark_finetune(table: pd.DataFrame) -> Figure:
    """Scores of each model fine-tuned on each task."""
    return _benchmark_figure(table, "finetune", "How far does each model get when it is fine-tuned?")


@style.styled
def retention(table: pd.DataFrame) -> Figure:
    """The student's probe scores in percent of the teacher's.

    The intervals are the student's, divided by the teacher's mean: the teacher's own uncertainty is left out.
    """
    rows = _benchmark(table, "probe")
    labels = _task_labels(rows)
    teacher = rows[rows["model"] == "teacher"].set_index("task")["value"]
    student = rows[rows["model"] == "student"].set_index("task")
    both = [task for task in labels if teacher.get(task, 0) > 0 and task in student.index]
    if not both:
        raise UserError("no probe score of student and teacher on the same task; run the stage 'benchmark' first")
    shares = student.loc[both, ["value", "low", "high"]].div(teacher[both], axis=0)
    shares = shares.assign(model="student").reset_index()
    figure = style.new_figure("How much of the teacher's probe score does the student keep?", 1.7 + 0.75 * len(both))
    ax = figure.subplots()
    style.dots(ax, shares, "task", {task: labels[task] for task in both}, LOOKS)
    for i, share in enumerate(shares["value"]):
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate(f"{share:.0%}", (share, i), (0, 9), textcoords="offset points", ha="center", bbox=ground)
    ax.axvline(1, color=LOOKS["teacher"].colour, linewidth=1.8)
    ax.axvline(TEACHER_SHARE / 100, color=INK, linewidth=1.5, linestyle="--")
    style.percent(ax.xaxis, "student's score in % of the teacher's mean, with the student's 95% interval")
    ax.set_ylabel("task")
    handles = [
        *style.model_handles(["student"], LOOKS),
        Line2D([], [], color=INK, linewidth=1.5, linestyle="--", label=f"{TEACHER_SHARE}% of the teacher"),
        Line2D([], [], color=LOOKS["teacher"].colour, linewidth=1.8, label="teacher"),
    ]
    style.legend(figure, handles)
    return figure


@style.styled
def fewshot(table: pd.DataFrame) -> Figure:
    """Score after fine-tuning on a few examples per class, against their number."""
    rows = _headline_rows(table, _select(table, "benchmark", "few-shot score", method="fewshot"))
    rows = summary(_need(rows, "benchmark", "few-shot score"), "task", "model", "x")
    tasks, looks = _tasks(rows), style.looks(table)
    figure, axes, _ = style.panels("How many labels does each model need?", len(tasks), 3, 3.4, sharex=True)
    for ax, task in zip(axes, tasks):
        mine = rows[rows["task"] == task]
        models = [model for model in looks if model in set(mine["model"])]
        for i, model in enumerate(models):
            points, look = mine[mine["model"] == model].sort_values("x"), looks[model]
            aside = 2 ** (0.12 * (i - (len(models) - 1) / 2))  # or the intervals hide each other
            ax.errorbar(
                points["x"] * aside, points["value"], yerr=style.whiskers(points), color=look.colour,
                marker=look.marker, markeredgecolor="white", capsize=3, elinewidth=1.5,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(mine["x"].unique()), [f"{x:g}" for x in sorted(mine["x"].unique())])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("training rows per class")
        ax.set_title(style.panel_title(task, mine))
        style.percent(ax.yaxis, style.score_label(mine))
    style.legend(figure, style.model_handles(rows["model"], looks))
    return figure


METHODS = {"probe": "linear probe", "finetune": "fine-tuned", "fewshot": "few-shot"}


@style.styled
def differences(table: pd.DataFrame) -> Figure:
    """How far the student is from every other model, averaged over tasks, and within which margin they are on par."""
    what = "paired comparison"
    rows = _select(table, "benchmark", what, metric="difference", task="average")
    rows = _need(rows[rows["x"].isna()], "benchmark", what)
    margin = _select(table, "benchmark", what, metric="margin")["value"].iloc[0]
    methods = [method for method in METHODS if method in set(rows["method"])]
    looks, others = style.looks(table), list(dict.fromkeys(rows["arm"]))
    title = "Is the student better or worse, beyond chance?"
    figure, axes, columns = style.panels(title, len(methods), 2, 1.4 + 0.5 * len(others), sharey=True, sharex=True)
    for i, (ax, method) in enumerate(zip(axes, methods)):
        mine = rows[rows["method"] == method].assign(model=lambda part: part["arm"])
        ax.axvspan(-margin, margin, color=PALE, alpha=0.7, linewidth=0, zorder=0)
        ax.axvline(0, color=INK, linewidth=1)
        for place, other in enumerate(others):
            one, look = mine[mine["model"] == other], looks[other]
            ax.errorbar(
                one["value"], [place] * len(one), xerr=style.whiskers(one), fmt=look.marker, color=look.colour,
                markeredgecolor="white", capsize=3, elinewidth=1.8,
            )  # fmt: skip
        ax.set_yticks(range(len(others)), [style.wrap(other, 20) for other in others])
        ax.set_ylim(len(others) - 0.5, -0.5)
        ax.yaxis.grid(False)
        ax.margins(x=0.08)
        ax.set_title(f"{METHODS[method]}\n{style.count(mine['n'])}")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value * 100:+.0f}" if value else "0")
        ax.set_xlabel("student − other (points)")
        if i % columns == 0:
            ax.set_ylabel("student against")
        else:
            ax.tick_params(labelleft=False)
    handles = [
        Line2D([], [], color=INK, marker="o", label="difference, with 95% interval"),
        Patch(color=PALE, alpha=0.7, label=f"on par: within {margin * 100:g} points"),
    ]
    style.legend(figure, handles)
    return figure


@style.styled
def efficiency(table: pd.DataFrame) -> Figure:
    """What each model costs: parameters against score, latency, throughput."""
    looks = style.looks(table)
    scores = _benchmark(table, "probe")
    scores = _need(scores[scores["task"] == "average"], "benchmark", "average probe score")
    sizes = _select(table, "benchmark", "parameters", metric="parameters").drop_duplicates("model")
    sizes = sizes.set_index("model")["value"] / 1e6
    panels = {"latency_ms": "latency (ms)\nof one sentence", "sentences_per_second": "sentences / s\nin batches of 32"}
    speeds = {metric: _select(table, "benchmark", metric, metric=metric) for metric in panels}
    devices = [d for d in ("cpu", "cuda") if all(d in set(rows["method"]) for rows in speeds.values())]
    if not devices:
        raise UserError("no latency and throughput on the same device; run the stage 'benchmark' first")
    height = max(3.4, 0.6 * len(looks))
    figure = style.new_figure("What does each model cost, and what is it worth?", 1.8 + height * len(devices))
    axes = figure.subplot_mosaic(
        [["size", *(f"{metric} {device}" for metric in panels)] for device in devices], width_ratios=[1.5, 1, 1]
    )
    ax = axes["size"]
    for model in looks:
        mine = scores[(scores["model"] == model) & scores["model"].isin(sizes.index)]
        ax.errorbar(
            mine["model"].map(sizes), mine["value"], yerr=style.whiskers(mine), fmt=looks[model].marker, markersize=10,
            color=looks[model].colour, markeredgecolor="white", capsize=3,
        )  # fmt: skip
    ax.set_xlabel("parameters (millions)")
    ax.set_xlim(0, sizes.max() * 1.1)
    ax.margins(y=0.1)
    style.percent(ax.yaxis, "average probe score (%)\nwith 95% interval")
    for device in devices:
        for metric, label in panels.items():
            ax = axes[f"{metric} {device}"]
            rows = speeds[metric][speeds[metric]["method"] == device].drop_duplicates("model").set_index("model")
            models = [model for model in looks if model in rows.index]
            rows = rows.loc[models]
            line = {"ecolor": INK, "edgecolor": INK, "linewidth": 0.8}
            bars = ax.barh(models, rows["value"], xerr=style.whiskers(rows), capsize=3, **line)
            for bar, model in zip(bars, models):
                bar.set(facecolor=looks[model].colour, hatch=looks[model].hatch)
            ax.set_title({"cpu": "CPU", "cuda": "GPU"}[device])
            ax.set_xlabel(label)
            ax.set_yticks(range(len(models)), [style.wrap(model, 20) for model in models])
            ax.yaxis.grid(False)
            ax.invert_yaxis()
            ax.xaxis.set_major_locator(MaxNLocator(4))
        axes[f"latency_ms {device}"].set_ylabel("model")
        ax.tick_params(labelleft=False)
    times = Line2D([], [], color=INK, marker="|", markersize=9, label="quartiles of the timings")
    style.legend(figure, [*style.model_handles(scores["model"], looks), times])
    return figure


def _ablation(table: pd.DataFrame, family: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of the arms of a family, a row per task and arm; and of the models they are held against."""
    what = f"ablation of {family}"
    rows = _headline_rows(table, _select(table, "ablations", what, method=family, model="student"))
    arms = summary(_need(rows, "ablations", what), "task", "model", "arm")
    reference = table[(table["stage"] == "ablations") & (table["method"] == "reference")]
    return arms, summary(_headline_rows(table, reference), "task", "model")


def _references(axes: Axes, reference: pd.DataFrame, task: str, along: str, looks: dict[str, Look]) -> None:
    """A line per model that is not ablated, with its interval; `along` is the axis that holds the scores."""
    line, span = {"x": (axes.axvline, axes.axvspan), "y": (axes.axhline, axes.axhspan)}[along]
    for row in reference[reference["task"] == task].itertuples():
        colour = looks[row.model].colour
        line(row.value, color=colour, linestyle=_reference_line(row.model), zorder=1)
        if row.low < row.high:
            span(row.low, row.high, color=colour, alpha=0.15, linewidth=0, zorder=0.5)


def _reference_line(model: str) -> str:
    return "--" if model == "teacher" else ":"


def _ablation_legend(figure: Figure, reference: pd.DataFrame, looks: dict[str, Look]) -> None:
    handles = [*style.model_handles(["student"], looks)]
    for model in (model for model in looks if model in set(reference["model"])):
        handles.append(Line2D([], [], color=looks[model].colour, linestyle=_reference_line(model), label=model))
    style.legend(figure, [*handles, Patch(color=GREY, alpha=0.3, label="95% interval")])


@style.styled
def ablation(table: pd.DataFrame, family: str) -> Figure:
    """Score of the students of a family of arms, a panel per task: a curve where every arm is a number (x), else a line
    per arm."""
    title, label = FAMILIES.get(family, (f"What does it change? ({family})", family))
    arms, reference = _ablation(table, family)
    looks, tasks = style.looks(table), _tasks(arms)
    numeric = arms["x"].notna().all() and arms["x"].nunique() > 2
    labels = {arm: style.wrap(arm, 20) for arm in arms["arm"].unique()}
    height = 3.4 if numeric else 1.4 + 0.5 * len(labels)
    figure, axes, columns = style.panels(title, len(tasks), 4, height, **{"sharex" if numeric else "sharey": True})
    for i, (ax, task) in enumerate(zip(axes, tasks)):
        mine = arms[arms["task"] == task]
        _references(ax, reference, task, "y" if numeric else "x", looks)
        ax.set_title(style.panel_title(task, mine))
        if numeric:
            _arm_curve(ax, mine.sort_values("x"), label, looks["student"])
            continue
        style.dots(ax, mine, "arm", labels, looks)
        style.percent(ax.xaxis, style.score_label(mine))
        if i % columns == 0:
            ax.set_ylabel(label)
        else:
            ax.tick_params(labelleft=False)
    _ablation_legend(figure, reference, looks)
    return figure


def _arm_curve(axes: Axes, rows: pd.DataFrame, label: str, look: Look) -> None:
    axes.errorbar(
        rows["x"], rows["value"], yerr=style.whiskers(rows), color=look.colour, marker=look.marker,
        markeredgecolor="white", capsize=3, elinewidth=1.8,
    )  # fmt: skip
    style.percent(axes.yaxis, style.score_label(rows))
    if label.endswith("(%)"):
        style.percent(axes.xaxis, label)
    else:
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlim(left=0)


def ablation_families(table: pd.DataFrame) -> list[str]:
    """The families of arms that the table has rows for, in its order."""
    rows = table[(table["stage"] == "ablations") & (table["method"] != "reference")]
    return list(rows["method"].dropna().unique())


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    draw.__name__: draw
    for draw in (
        fertility, layer_probe, retrieval, cka, vocabulary, conditioning, learning_curve, benchmark_probe,
        benchmark_finetune, fewshot, retention, differences, efficiency,
    )
}  # fmt: skip


def compare(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The benchmarks of several runs as one table, for any figure: the first run's teacher, each run's student by the
    name of the run.

    tables: tables of results by the name to show. Speeds can be compared where the runs were on one machine.
    """
    benchmarks = {name: table[table["stage"] == "benchmark"] for name, table in tables.items()}
    students = [rows[rows["model"] == "student"].assign(model=name) for name, rows in benchmarks.items()]
    first = next(iter(benchmarks.values()))
    return pd.concat([first[first["model"] == "teacher"], *students], ignore_index=True)


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The study in one table: a row per model of the benchmark; what was not measured is NaN.

    Scores are averages over tasks; latency (batch 1, median) and throughput (batch 32) the CPU's if it was timed.
    """
    rows = _select(table, "benchmark", "scores and sizes")
    rows = rows.sort_values("method", key=lambda method: method == "cuda", kind="stable")
    average = rows[(rows["task"] == "average") & (rows["metric"] == "score") & rows["seed"].isna()]

    def column(part: pd.DataFrame, **where: str) -> pd.Series:
        for name, wanted in where.items():
            part = part[part[name] == wanted]
        return part.drop_duplicates("model").set_index("model")["value"]

    probe = column(average, method="probe") * 100
    columns = {
        "parameters (M)": column(rows, metric="parameters") / 1e6,
        "size (MB)": column(rows, metric="megabytes"),
        "latency (ms)": column(rows, metric="latency_ms"),
        "sentences/s": column(rows, metric="sentences_per_second"),
        "probe score (%)": probe,
        "fine-tuning score (%)": column(average, method="finetune") * 100,
        "of teacher's probe score (%)": probe / probe.get("teacher", np.nan) * 100,
    }
    return pd.DataFrame(columns).reindex(list(style.looks(rows))).rename_axis("model")


def main_table(table: pd.DataFrame, method: str = "finetune") -> pd.DataFrame:
    """The paper's main table: a row per model, a column per task, in it the score in percent with its 95% interval.

    method: "finetune" or "probe". Raises UserError where the table of results has no such scores.
    """
    rows = _benchmark(table, method)
    sizes = table[(table["stage"] == "benchmark") & (table["metric"] == "parameters")].set_index("model")["value"] / 1e6
    cell = rows.apply(lambda r: f"{r['value'] * 100:.1f} [{r['low'] * 100:.1f}, {r['high'] * 100:.1f}]", axis=1)
    found = rows.assign(cell=cell).pivot(index="model", columns="task", values="cell").fillna("")
    found = found.reindex([model for model in style.looks(table) if model in found.index])[_tasks(rows)]
    found.insert(0, "parameters (M)", sizes.reindex(found.index).map("{:.1f}".format))
    return found
