"""The runs of several languages side by side: one table and one figure."""

import pandas as pd
from matplotlib.figure import Figure

from kdlib.errors import UserError
from kdlib.viz import style
from kdlib.viz.style import INK, PALE, PALETTE

MEASURES = {  # column -> stage, metric, model, method of the row of results
    "tokens a word, teacher": ("prune", "fertility", "teacher", "heldout"),
    "tokens a word, pruned": ("prune", "fertility", "pruned teacher", "heldout"),
    "unknown tokens, teacher": ("prune", "unknown_rate", "teacher", "heldout"),
    "unknown tokens, pruned": ("prune", "unknown_rate", "pruned teacher", "heldout"),
    "rows": ("prune", "rows", "pruned teacher", None),
    "similarity before": ("distill", "similarity", "no distillation", "heldout"),
    "similarity after": ("distill", "similarity", "student", "heldout"),
    "probe score, teacher": ("benchmark", "score", "teacher", "probe"),
    "probe score, student": ("benchmark", "score", "student", "probe"),
}
PANELS = {  # axis label -> the columns it shows
    "tokens a word": ["tokens a word, teacher", "tokens a word, pruned"],
    "cosine with the teacher's vectors": ["similarity before", "similarity after"],
    "probe score": ["probe score, teacher", "probe score, student"],
}


def language_table(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row a language, a column a measure that any of them has.

    Args:
        tables: tables of results by the code of the language.

    Raises:
        UserError: where there is nothing to show.
    """
    found: dict[str, dict[str, float]] = {}
    for code, table in tables.items():
        own = table[(table["language"] == code) & table["seed"].isna()]
        for column, (stage, metric, model, method) in MEASURES.items():
            rows = own[(own["stage"] == stage) & (own["metric"] == metric) & (own["model"] == model)]
            rows = rows[rows["method"] == method] if method else rows
            if len(rows):
                found.setdefault(code, {})[column] = float(rows["value"].iloc[-1])
    if not found:
        raise UserError("no language has results; run the stage 'prune' first")
    table = pd.DataFrame.from_dict(found, orient="index").rename_axis("language")
    return table[[column for column in MEASURES if column in table]]


@style.styled
def language_figure(table: pd.DataFrame) -> Figure:
    """What a table of `language_table` holds: before and after, language by language."""
    panels = {label: columns for label, columns in PANELS.items() if set(columns) <= set(table)}
    figure = style.new_figure("What do pruning and distillation do to each language?", 2.2 + 0.6 * len(table))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (label, columns) in zip(axes, panels.items()):
        for i, (column, colour) in enumerate(zip(columns, (PALE, PALETTE[0]))):
            places = [place + 0.2 - 0.4 * i for place in range(len(table))][::-1]
            name = column.removeprefix(f"{label}, ")
            bars = ax.barh(places, table[column].fillna(0), 0.38, color=colour, edgecolor=INK, label=name)
            ax.bar_label(bars, fmt="{:.2f}", padding=3)
        ax.set_yticks(range(len(table)), list(table.index)[::-1])
        ax.set_xlabel(label)
        ax.set_xlim(0, table[columns].max(axis=None) * 1.25)
        ax.yaxis.grid(False)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure
