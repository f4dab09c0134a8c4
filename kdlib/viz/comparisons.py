"""Figures that compare models: the benchmark and the ablations."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from kdlib.evaluation.paired_tests import LEVEL
from kdlib.viz import style
from kdlib.viz.style import GREY, INK, LOOKS, MARKERS, PALE, PALETTE, SCORES, Look
from kdlib.viz.tables import TEACHER_SHARE, benchmark_rows, headline_rows, need, select, summary, tasks_of

FAMILIES = {  # a family of ablation arms: the question that it answers
    "fraction": "How much text does the student need, at equal steps?",
    "passes": "How much text does the student need, read once?",
    "epochs": "How long should a student learn?",
    "init": "Which of the teacher's layers should a student start from?",
    "objective": "What should the student imitate?",
    "similar work": "What do the objectives of similar work reach?",
    "conditioning": "Does it help to condition the teacher first?",
    "depth": "How deep must a student be?",
    "width": "How wide must a student be?",
    "size": "How large must a student be?",
    "start": "How should a narrower student start?",
    "vocabulary": "How many embedding rows does a student need?",
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
    models = rows["model"].nunique()
    figure = style.new_figure(f"{title}\n{_first(rows)}", 2.2 + (0.5 + 0.07 * models) * len(labels))
    ax = figure.subplots()
    style.dots(ax, rows, "task", labels, looks)
    handles = style.model_handles(rows["model"], looks)
    chance = table[(table["metric"] == "chance") & table["task"].isin(labels)].drop_duplicates("task")
    for task, value in zip(chance["task"], chance["value"], strict=True):
        place = list(labels).index(task)
        ax.plot([value, value], [place - 0.45, place + 0.45], color=INK, linestyle=":", linewidth=1.5)
    if len(chance):
        handles.append(Line2D([], [], color=INK, linestyle=":", linewidth=1.5, label="chance"))
    style.percent(ax.xaxis, "score (%), with 95% intervals over seeds and test items")
    ax.set_ylabel("task")
    style.legend(figure, handles)
    return figure


def _first(rows: pd.DataFrame) -> str:
    """The student, the teacher and the best model without a trained transformer, by mean score."""
    means = rows[rows["task"] == "average"].set_index("model")["value"]
    if means.empty:  # one task
        means = rows.set_index("model")["value"]
    shown = [name for name in ("teacher", "student", "tf-idf") if name in means.index]
    mean = "mean of tasks" if "average" in set(rows["task"]) else rows["task"].iloc[0]
    return f"{mean}: " + ", ".join(f"{name} {means[name] * 100:.1f}" for name in shown)


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
    """What each model keeps of the teacher's probe score above chance, by task and on average."""
    what = "retention"
    rows = need(select(table, "benchmark", what, metric="retention", method="probe"), "benchmark", what)
    looks = style.looks(rows)
    room = table[(table["metric"] == "room") & (table["method"] == "probe")].set_index("task")
    tasks = [task for task in tasks_of(rows) if task not in ("average", "with room")]
    labels = {task: _room_label(task, room) for task in tasks}
    if len(tasks) > 1:
        labels |= {task: label for task, label in MEANS.items() if task in set(rows["task"])}
    best = rows[rows["model"] == "student"].set_index("task")
    last = next((task for task in ("with room", "average", *tasks) if task in best.index), None)
    title = "How much of the teacher does each model keep?"
    if last is not None:
        kept = best.loc[last]
        title = (
            f"The student keeps {kept['value']:.0%} of the teacher above chance\n"
            f"({MEANS.get(last, last)}; 95% interval {kept['low']:.0%} to {kept['high']:.0%})"
        )
    rows = rows[rows["task"].isin(labels) & ~rows["model"].isin(["teacher", "pruned teacher"])]
    figure = style.new_figure(title, 2.2 + 0.95 * len(labels))
    ax = figure.subplots()
    style.dots(ax, rows, "task", labels, looks)
    low, high = min(-0.1, rows["value"].min() - 0.1), max(1.15, rows["value"].max() + 0.1)
    ax.set_xlim(max(low, -1), min(high, 2))
    for share, line in ((0, ":"), (1, "-"), (TEACHER_SHARE / 100, "--")):
        ax.axvline(share, color=LOOKS["teacher"].colour if share else GREY, linewidth=1.6, linestyle=line, zorder=1)
    style.percent(ax.xaxis, "(score − chance) in % of (teacher's score − chance), with 95% intervals of both")
    ax.set_ylabel("task, and how much room it leaves")
    handles = [
        *style.model_handles(rows["model"], looks),
        Line2D([], [], color=LOOKS["teacher"].colour, linewidth=1.6, label="teacher"),
        Line2D([], [], color=LOOKS["teacher"].colour, linewidth=1.6, linestyle="--", label=f"{TEACHER_SHARE}%"),
        Line2D([], [], color=GREY, linewidth=1.6, linestyle=":", label="chance"),
    ]
    style.legend(figure, handles)
    return figure


MEANS = {"average": "mean of all tasks", "with room": "mean of tasks with room"}


def _room_label(task: str, room: pd.DataFrame) -> str:
    """The task, and by how many points the teacher is better than the best control."""
    if task not in room.index:
        return style.wrap(task)
    row = room.loc[task]
    clear = "" if row["low"] > 0 else ": no room" if row["high"] < 0 else ", not sure"
    return f"{style.wrap(task)}\n{row['value'] * 100:+.0f} over {row['arm']}{clear}"


@style.styled
def fewshot(table: pd.DataFrame) -> Figure:
    """Score after fine-tuning on a few examples per class, against their number."""
    return _label_curves(table, "benchmark", "fewshot", "How many labels does each model need?")


@style.styled
def task_students(table: pd.DataFrame) -> Figure:
    """Score of a task's student on labels and on soft labels, of its teacher and of tf-idf, against labelled rows."""
    main = table[~table["model"].astype("string").str.contains(": ", na=False)]  # without the arms
    return _label_curves(main, "task", "task", "Does a student learn more from the teacher's soft labels?")


def _label_curves(table: pd.DataFrame, stage: str, method: str, title: str) -> Figure:
    what = f"{method} score"
    rows = headline_rows(table, select(table, stage, what, method=method))
    rows = summary(need(rows, stage, what), "task", "model", "x")
    tasks, looks = tasks_of(rows), style.looks(table)
    title += f"\n{_with_fewest(rows, tasks)}"
    figure, axes, _ = style.panels(title, len(tasks), 3, 3.4, sharex=True)
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


def _with_fewest(rows: pd.DataFrame, tasks: list[str]) -> str:
    """The best model of each task with the fewest rows."""
    few = rows[rows["x"] == rows["x"].min()].set_index(["task", "model"])["value"]
    best = {task: few[task].idxmax() for task in tasks if task != "average"}
    return f"best with {rows['x'].min():g} rows per class: " + ", ".join(f"{m} ({task})" for task, m in best.items())


METHODS = {"probe": "linear probe", "best layer": "probe, best layer", "finetune": "fine-tuned", "fewshot": "few-shot"}


@style.styled
def differences(table: pd.DataFrame) -> Figure:
    """The student minus the teacher, with the margin, and minus every other model, averaged over tasks."""
    what = "paired comparison"
    rows = select(table, "benchmark", what, metric=["difference", "difference_90"], task="average", model="student")
    rows = need(rows[rows["x"].isna()], "benchmark", what)
    margin = select(table, "benchmark", what, metric="margin")["value"].iloc[0]
    methods = [method for method in METHODS if method in set(rows["method"])]
    others = [name for name in dict.fromkeys(rows["arm"]) if name != "teacher"]
    sides = {"teacher": ["teacher"], "every other model": others} if others else {"teacher": ["teacher"]}
    figure = style.new_figure(_difference_title(rows, margin), 2.6 + 0.62 * max(len(others), 2))
    axes = figure.subplots(1, len(sides), width_ratios=[1.2, 1][: len(sides)], squeeze=False)[0]
    step = 0.7 / len(methods)
    for ax, (side, names) in zip(axes, sides.items(), strict=True):
        ax.axvspan(-margin, margin, color=PALE, alpha=0.7, linewidth=0, zorder=0)
        ax.axvline(0, color=INK, linewidth=1)
        for place, name in enumerate(names):
            for i, method in enumerate(methods):
                one = rows[(rows["arm"] == name) & (rows["method"] == method)]
                y = place + (i - (len(methods) - 1) / 2) * step
                for metric, width in (("difference", 1.2), ("difference_90", 3.5)):
                    line = one[one["metric"] == metric]
                    ax.errorbar(
                        line["value"], [y] * len(line), xerr=style.whiskers(line), fmt=MARKERS[i], color=PALETTE[i],
                        markeredgecolor="white", capsize=3 if width < 2 else 0, elinewidth=width,
                    )  # fmt: skip
        ax.set_yticks(range(len(names)), [style.wrap(name, 20) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.yaxis.grid(False)
        ax.margins(x=0.08)
        ax.set_title(f"against the {side}" if side == "teacher" else f"against {side}")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value * 100:+.4g}" if value else "0")
        ax.set_xlabel("student − other (points)")
    handles = [
        Line2D([], [], color=PALETTE[i], marker=MARKERS[i], label=METHODS[method]) for i, method in enumerate(methods)
    ]
    handles += [
        Line2D([], [], color=INK, linewidth=3.5, label="90% interval (TOST)"),
        Line2D([], [], color=INK, linewidth=1.2, label="95% interval"),
        Patch(color=PALE, alpha=0.7, label=f"on par: within {margin * 100:g} points"),
    ]
    style.legend(figure, handles)
    return figure


def _difference_title(rows: pd.DataFrame, margin: float) -> str:
    """What the 90% interval of the difference to the teacher says, by linear probe."""
    found = rows[(rows["arm"] == "teacher") & (rows["metric"] == "difference_90") & (rows["method"] == "probe")]
    if found.empty:
        return "Is the student better or worse, beyond chance?"
    row = found.iloc[0]
    inside = row["low"] > -margin and row["high"] < margin
    verdict = "on par with" if inside else "below" if row["high"] < 0 else "not shown to be on par with"
    return f"By linear probe the student is {verdict} the teacher ({row['value'] * 100:+.1f} points)"


@style.styled
def efficiency(table: pd.DataFrame) -> Figure:
    """Score against size and latency, with the models that no other one beats in both."""
    looks, what = style.looks(table), "average probe score"
    scores = benchmark_rows(table, "probe")
    scores = need(scores[scores["task"] == "average"], "benchmark", what).set_index("model")
    costs = {"megabytes": "size of the weights (MB)", "latency_ms": "latency of one sentence (ms)"}
    measured = {
        metric: select(table, "benchmark", metric, metric=metric).drop_duplicates("model").set_index("model")["value"]
        for metric in costs
    }
    figure = style.new_figure(_smallest(table, measured), 5.9)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (metric, label) in zip(axes, costs.items(), strict=True):
        points = scores.join(measured[metric].rename("cost"), how="inner").sort_values(["cost", "value"])
        front = points[points["value"] >= points["value"].cummax()]
        ax.step(front["cost"], front["value"], where="post", color=GREY, linestyle="--", linewidth=1.5, zorder=1)
        for model in (name for name in looks if name in points.index):
            row = points.loc[[model]]
            ax.errorbar(
                row["cost"], row["value"], yerr=style.whiskers(row), fmt=looks[model].marker, markersize=10,
                color=looks[model].colour, markeredgecolor="white", capsize=3,
            )  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(lambda value, _: "")
        ax.set_xlabel(label)
    style.percent(axes[0].yaxis, "average probe score (%)\nwith 95% interval")
    machine = table[(table["stage"] == "benchmark") & (table["metric"] == "threads")]
    if len(machine):
        axes[1].set_xlabel(f"{costs['latency_ms']}\n{machine['arm'].iloc[0]}, {machine['value'].iloc[0]:g} threads")
    handles = style.model_handles(
        set(scores.index) & {*measured["megabytes"].index, *measured["latency_ms"].index}, looks
    )
    style.legend(figure, [*handles, Line2D([], [], color=GREY, linestyle="--", label="no model is smaller and better")])
    return figure


def _smallest(table: pd.DataFrame, costs: dict[str, pd.Series]) -> str:
    """The smallest and the fastest model that keep most of the teacher's score."""
    rows = table[(table["metric"] == "retention") & (table["task"] == "average") & (table["method"] == "probe")]
    kept = rows.set_index("model")["value"]
    good = [
        name for name in kept[kept >= TEACHER_SHARE / 100].index if all(name in cost.index for cost in costs.values())
    ]
    if not good:
        return "Which model is best for its size, and for its speed?"
    small, fast = (cost[good].idxmin() for cost in costs.values())
    of = f"of the models that keep {TEACHER_SHARE}% of the teacher above chance (mean of tasks)"
    if small == fast:
        return f"The {small} is the smallest and the fastest\n{of}"
    return f"The {small} is the smallest and the {fast} the fastest\n{of}"


MEASURES = {"score": ("average", "mean probe score (%)"), "similarity": (None, "similarity to the teacher (%)")}


@style.styled
def ablation(table: pd.DataFrame, family: str) -> Figure:
    """The arms of a family: each student's score, and the paired difference to the first arm, by score and similarity.

    Small dots are students of single seeds. A filled difference is beyond chance, corrected for the arms of the family.
    """
    what = f"ablation of {family}"
    rows = select(table, "ablations", what, method=family, model="student")
    reference = table[(table["stage"] == "ablations") & (table["method"] == "reference")]
    measures = [name for name in MEASURES if name in set(rows["metric"])]
    need(rows[rows["metric"].isin(measures)], "ablations", what)
    arms, looks = list(dict.fromkeys(rows["arm"])), style.looks(table)
    question = FAMILIES.get(family, f"What does each choice change? ({family})")
    figure = style.new_figure(f"{question}\n{_answer(rows, arms)}", 1.9 + (1.0 + 0.42 * len(arms)) * len(measures))
    axes = figure.subplots(len(measures), 2, sharey=True, squeeze=False)
    for (left, right), name in zip(axes, measures, strict=True):
        task, label = MEASURES[name]
        _arm_values(left, rows, arms, name, looks["student"])
        for row in reference[(reference["metric"] == name) & reference["seed"].isna()].itertuples():
            left.axvline(row.value, color=looks[row.model].colour, linestyle=_reference_line(row.model), zorder=1)
        style.percent(left.xaxis, label)
        of = rows[rows["task"].isna() if task is None else rows["task"] == task].set_index("arm")
        right.axvline(0, color=INK, linewidth=1)
        for place, arm in enumerate(arms):
            mine = of.loc[of.index == arm]
            gap, p = mine[mine["metric"] == "difference"], mine[mine["metric"] == "p_holm"]["value"]
            clear = bool(len(p)) and p.iloc[0] < LEVEL
            right.errorbar(
                gap["value"], [place] * len(gap), xerr=style.whiskers(gap), fmt=looks["student"].marker, capsize=3,
                color=looks["student"].colour, markerfacecolor=looks["student"].colour if clear else "white",
            )  # fmt: skip
        right.xaxis.set_major_formatter(lambda value, _: f"{value * 100:+.4g}" if value else "0")
        right.set_xlabel(f"difference to {arms[0]} (points)")
        left.set_yticks(range(len(arms)), [style.wrap(arm, 26) for arm in arms])
        left.set_ylim(len(arms) - 0.5, -0.5)
        left.yaxis.grid(False)
        right.yaxis.grid(False)
    handles = [
        Line2D([], [], color=looks["student"].colour, marker=looks["student"].marker, label="mean, with 95% interval"),
        Line2D([], [], color=GREY, marker="o", linestyle="", markersize=4, label="one seed"),
        Line2D([], [], color=looks["student"].colour, marker="D", markerfacecolor="white", linestyle="",
               label="not beyond chance"),
    ]  # fmt: skip
    for model in (model for model in looks if model in set(reference["model"])):
        handles.append(Line2D([], [], color=looks[model].colour, linestyle=_reference_line(model), label=model))
    style.legend(figure, handles)
    return figure


def _arm_values(axes: Axes, rows: pd.DataFrame, arms: list[str], name: str, look: Look) -> None:
    """Each arm's mean with its interval, and a dot for each seed."""
    if name == "score":
        scores = headline_rows(rows, rows[rows["seed"].notna() & (rows["task"] != "average")])
        seeds = scores.groupby(["arm", "seed"])["value"].mean().reset_index()
    else:
        seeds = rows[(rows["metric"] == name) & rows["seed"].notna()]
    means = rows[(rows["metric"] == name) & rows["seed"].isna()]
    for place, arm in enumerate(arms):
        mean, dots = means[means["arm"] == arm], seeds[seeds["arm"] == arm]["value"]
        axes.plot(dots, [place + 0.22] * len(dots), "o", color=GREY, markersize=4)
        axes.errorbar(
            mean["value"], [place] * len(mean), xerr=style.whiskers(mean), fmt=look.marker, color=look.colour,
            markeredgecolor="white", capsize=3,
        )  # fmt: skip


def _answer(rows: pd.DataFrame, arms: list[str]) -> str:
    """Which arms are better or worse than the first one by probe, and what difference could have been seen."""
    of = rows[rows["task"] == "average"].pivot_table(index="arm", columns="metric", values="value")
    if "p_holm" not in of:
        return f"one arm alone: {arms[0]}"
    clear = of[of["p_holm"] < LEVEL]
    better, worse = (list(part.index) for part in (clear[clear["difference"] > 0], clear[clear["difference"] < 0]))
    parts = [
        f"{word} than {arms[0]}: {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names
    ]
    least = of["detectable"].max() * 100
    parts = parts or [f"no arm differs from {arms[0]} beyond chance"]
    return f"{'; '.join(parts)} (by probe; {least:.1f} points could have been seen)"


def _reference_line(model: str) -> str:
    return "--" if model == "teacher" else ":"


def ablation_families(table: pd.DataFrame) -> list[str]:
    """The families with at least two arms. They keep the order of the table."""
    rows = table[(table["stage"] == "ablations") & (table["method"] != "reference")]
    arms = rows.groupby("method", sort=False)["arm"].nunique()
    return list(arms[arms > 1].index)
