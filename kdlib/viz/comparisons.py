"""Figures that compare models: the benchmark and the ablations."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from kdlib.errors import UserError
from kdlib.viz import style
from kdlib.viz.style import GREY, INK, LOOKS, PALE, SCORES, Look
from kdlib.viz.tables import TEACHER_SHARE, benchmark_rows, headline_rows, need, select, summary, tasks_of

FAMILIES = {  # a family of ablation arms: title of its figure, label of its axis
    "fraction": ("How much text does the student need?", "corpus used (%)"),
    "epochs": ("How long should a student learn?", "passes over the corpus"),
    "init": ("Which of the teacher's layers should a student start from?", "layers copied"),
    "objective": ("What should the student imitate?", "objectives"),
    "conditioning": ("Does it help to condition the teacher first?", "distilled from"),
    "depth": ("How deep must a student be?", "layers of the student"),
    "width": ("How wide must a student be?", "width of the student"),
    "size": ("How large must a student be?", "student"),
    "start": ("How should a narrower student start?", "weights from the teacher"),
    "vocabulary": ("How many embedding rows does a student need?", "rows of the vocabulary"),
}


def _task_labels(rows: pd.DataFrame) -> dict[str, str]:
    """Task -> its name with metric and n, for an axis."""
    labels = {}
    for task in tasks_of(rows):
        mine = rows[rows["task"] == task]
        metric = mine["metric"].iloc[0]
        detail = ", ".join(filter(None, [SCORES.get(metric, metric), style.count(mine["n"])]))
        labels[task] = "average of tasks" if task == "average" else f"{style.wrap(task)}\n{detail}"
    return labels


def _benchmark_figure(table: pd.DataFrame, method: str, title: str) -> Figure:
    rows, looks = benchmark_rows(table, method), style.looks(table)
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

    The intervals are the student's, divided by the teacher's mean. They leave out the teacher's own uncertainty.
    """
    rows = benchmark_rows(table, "probe")
    labels = _task_labels(rows)
    teacher = rows[rows["model"] == "teacher"].set_index("task")["value"]
    student = rows[rows["model"] == "student"].set_index("task")
    both = [task for task in labels if task in student.index and (teacher.get(task) or 0) > 0]
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
    rows = headline_rows(table, select(table, "benchmark", "few-shot score", method="fewshot"))
    rows = summary(need(rows, "benchmark", "few-shot score"), "task", "model", "x")
    tasks, looks = tasks_of(rows), style.looks(table)
    figure, axes, _ = style.panels("How many labels does each model need?", len(tasks), 3, 3.4, sharex=True)
    for ax, task in zip(axes, tasks):
        mine = rows[rows["task"] == task]
        models = [model for model in looks if model in set(mine["model"])]
        for i, model in enumerate(models):
            points, look = mine[mine["model"] == model].sort_values("x"), looks[model]
            aside = 2 ** (0.12 * (i - (len(models) - 1) / 2))  # so that intervals do not overlap
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
    """The difference between the student and every other model, averaged over tasks, with the margin of equivalence."""
    what = "paired comparison"
    rows = select(table, "benchmark", what, metric="difference", task="average")
    rows = need(rows[rows["x"].isna()], "benchmark", what)
    margin = select(table, "benchmark", what, metric="margin")["value"].iloc[0]
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
    """The cost of each model: parameters against score, latency and throughput."""
    looks = style.looks(table)
    scores = benchmark_rows(table, "probe")
    scores = need(scores[scores["task"] == "average"], "benchmark", "average probe score")
    sizes = select(table, "benchmark", "parameters", metric="parameters").drop_duplicates("model")
    sizes = sizes.set_index("model")["value"] / 1e6
    panels = {"latency_ms": "latency (ms)\nof one sentence", "sentences_per_second": "sentences / s\nin batches of 32"}
    speeds = {metric: select(table, "benchmark", metric, metric=metric) for metric in panels}
    devices = [d for d in ("cpu", "cuda") if all(d in set(rows["method"]) for rows in speeds.values())]
    if not devices:
        raise UserError("no latency and throughput on the same device; run the stage 'benchmark' first")
    height = max(3.4, 0.6 * len(looks))
    figure = style.new_figure("What does each model cost, and how good is it?", 1.8 + height * len(devices))
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
    """Scores of the arms of a family, a row per task and arm, and of the models for reference."""
    what = f"ablation of {family}"
    rows = headline_rows(table, select(table, "ablations", what, method=family, model="student"))
    arms = summary(need(rows, "ablations", what), "task", "model", "arm")
    reference = table[(table["stage"] == "ablations") & (table["method"] == "reference")]
    return arms, summary(headline_rows(table, reference), "task", "model")


def _references(axes: Axes, reference: pd.DataFrame, task: str, along: str, looks: dict[str, Look]) -> None:
    """A line with its interval for each reference model; `along` is the axis of the scores."""
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
    """Scores of the students of a family of arms, a panel per task.

    A curve where every arm is a number (x), else a line per arm.
    """
    title, label = FAMILIES.get(family, (f"What does each choice change? ({family})", family))
    arms, reference = _ablation(table, family)
    looks, tasks = style.looks(table), tasks_of(arms)
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
    """The families of arms in the table, in its order."""
    rows = table[(table["stage"] == "ablations") & (table["method"] != "reference")]
    return list(rows["method"].dropna().unique())
