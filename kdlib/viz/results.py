"""The results explorer: which results are comparable, and how they are shown."""

import pandas as pd
from matplotlib.figure import Figure

from kdlib.errors import UserError
from kdlib.viz import style, tables
from kdlib.viz.explore import interval_text
from kdlib.viz.html import escape, html_table, page, paragraph
from kdlib.viz.style import LOOKS, SCORES, SPARE_LOOKS

NOTHING = "no rows of the table of results can be compared; run the stage 'benchmark' first"


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    """The comparable numbers of a study, a row each, from the table of results.

    Seeds are averaged where the table has no row for all of them. A family of arms comes with its reference models.
    Left out are numbers with a figure of their own (layer probes, learning curve, vocabulary rows) and numbers without
    another to compare with.

    Returns:
        Rows of what (stage and method, such as "benchmark: probe"), task ("" for none), metric, name (model or arm),
            model,
        value, low, high, n.
    """
    own = (table["metric"] == "coverage") | table["metric"].astype(str).str.startswith("rows_")
    rows = table[(table["stage"] != "probe") & ~own & ~((table["stage"] == "distill") & table["x"].notna())]
    rows = rows.assign(**{column: rows[column].fillna("") for column in ("method", "task", "arm", "language")})
    ablated = rows["stage"] == "ablations"
    reference = rows[ablated & (rows["method"] == "reference")]
    families = [family for family in rows.loc[ablated, "method"].unique() if family != "reference"]
    rows = pd.concat([rows.drop(reference.index), *(reference.assign(method=family) for family in families)])
    if rows.empty:
        raise UserError(NOTHING)
    language_of_study = table["language"].mode().iloc[0]
    rows["what"] = [f"{stage}: {method}" if method else stage for stage, method in zip(rows["stage"], rows["method"])]
    rows["name"] = [
        (arm or model) + ("" if language in (language_of_study, "") else f" {language}")
        for arm, model, language in zip(rows["arm"], rows["model"], rows["language"])
    ]
    summary = tables.summary(rows, "what", "task", "name", "model")
    summary = summary[summary.groupby(["what", "task", "metric"])["name"].transform("size").gt(1)]
    if summary.empty:
        raise UserError(NOTHING)
    return summary[["what", "task", "metric", "name", "model", "value", "low", "high", "n"]]


UNITS = {  # factor and label of metrics that are not scores
    "parameters": (1e-6, "parameters (millions)"),
    "megabytes": (1, "size (MB)"),
    "rows": (1, "rows of the vocabulary"),
    "latency_ms": (1, "latency of one sentence (ms)"),
    "sentences_per_second": (1, "sentences a second"),
    "fertility": (1, "tokens per word"),
}
TIMED = ("latency_ms", "sentences_per_second")  # their low and high are quartiles


def _unit(metric: str) -> tuple[float, str, str]:
    """Factor, unit and label of a metric."""
    if metric in SCORES or metric in ("similarity", "unknown_rate"):
        return 100, "%", f"{SCORES.get(metric, metric.replace('_', ' '))} (%)"
    scale, label = UNITS.get(metric, (1, metric.replace("_", " ")))
    return scale, "", label


def _spread(metric: str) -> str:
    return "quartiles of the timings" if metric in TIMED else "95% interval"


@style.styled
def results_figure(rows: pd.DataFrame) -> Figure:
    """Values with intervals, a line per row of `comparable` rows that share what, task and metric."""
    first = rows.iloc[0]
    scale, unit, label = _unit(first["metric"])
    task = {"average": "average of tasks"}.get(first["task"], first["task"])
    figure = style.new_figure(", ".join(filter(None, [first["what"], task])), 1.9 + 0.55 * len(rows))
    ax = figure.subplots()
    for i, row in enumerate(rows.itertuples()):
        look = LOOKS.get(row.model, SPARE_LOOKS[0])
        errors = style.whiskers(rows.iloc[[i]]) * scale
        ax.errorbar(
            row.value * scale, i, xerr=errors, fmt=look.marker, color=look.colour, markersize=9,
            markeredgecolor="white", capsize=4, elinewidth=2,
        )  # fmt: skip
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate(
            _number(row.value * scale, unit), (row.value * scale, i), (0, 10), textcoords="offset points", ha="center",
            bbox=ground, fontsize=11,
        )  # fmt: skip
    ax.set_yticks(range(len(rows)), [style.wrap(name, 26) for name in rows["name"]])
    ax.set_ylim(len(rows) - 0.5, -0.75)
    ax.margins(x=0.1)
    ax.yaxis.grid(False)
    interval = f", with {_spread(first['metric'])}" if rows["low"].notna().any() else ""
    ax.set_xlabel(f"{label}{interval}")
    return figure


def _number(value: float, unit: str = "") -> str:
    if unit or 10 <= abs(value) < 1000:
        return f"{value:,.1f}{unit}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def results_html(rows: pd.DataFrame) -> str:
    """The values as a table, with a sentence on the best one."""
    scale, unit, label = _unit(rows["metric"].iloc[0])
    cells = [
        [
            escape(row["name"]),
            f"<b>{_number(row['value'] * scale, unit)}</b>",
            interval_text(row, scale, unit),
            "" if pd.isna(row["n"]) else f"{row['n']:,.0f}",
        ]
        for _, row in rows.iterrows()
    ]
    return page(html_table(["", escape(label), _spread(rows["metric"].iloc[0]), "n"], cells), paragraph(_clear(rows)))


def _clear(rows: pd.DataFrame) -> str:
    measured = rows.dropna(subset=["low", "high"]).sort_values("value", ascending=False)
    if len(measured) < 2 or rows["metric"].iloc[0] not in SCORES:
        return ""
    best = escape(measured.iloc[0]["name"])
    return f"<b>{best}</b> is highest. Intervals do not say whether two differ: the paired tests of the notebook do."
