"""Tables of results: the rows that figures and readers need."""

from collections.abc import Sequence

import langcodes
import numpy as np
import pandas as pd
from langcodes.tag_parser import LanguageTagError

from kdlib.errors import UserError
from kdlib.viz import style

NUMBERS = ["x", "value", "low", "high", "n"]
TEACHER_SHARE = 95  # percent of the teacher's score that a student should keep


def language_name(code: str) -> str:
    """The English name of a language; the code where it has none."""
    try:
        known = langcodes.get(code)
    except LanguageTagError:
        return code
    return known.display_name() if known.is_valid() else code


def check(table: pd.DataFrame) -> None:
    """Raise UserError for a table that is no table of results."""
    if table.empty:
        raise UserError("the table of results is empty; run the stages of the study first")


def select(table: pd.DataFrame, stage: str, what: str, **where: str | Sequence[str]) -> pd.DataFrame:
    """The rows of `stage` with a finite value and these column values; UserError if there are none."""
    check(table)
    rows = table[(table["stage"] == stage) & np.isfinite(table["value"].astype(float))]
    for column, wanted in where.items():
        rows = rows[rows[column].isin([wanted] if isinstance(wanted, str) else wanted)]
    return need(rows, stage, what)


def need(rows: pd.DataFrame, stage: str, what: str) -> pd.DataFrame:
    """Raise UserError for an empty selection, with the stage that gives the rows."""
    if rows.empty:
        raise UserError(f"no {what} in the table of results; run the stage {stage!r} first")
    return rows


def headline_rows(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with their task's headline metric, or the average over tasks."""
    scores = table[table["task"].notna() & (table["task"] != "average")]
    scores = scores[~scores["metric"].isin(["transfer", "retention", "room", "chance"])]
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


def tasks_of(rows: pd.DataFrame) -> list[str]:
    """Tasks in the table's order; the average last, where it covers several."""
    found = list(rows["task"].dropna().unique())
    tasks = [task for task in found if task != "average"]
    return tasks if len(tasks) == 1 else tasks + ["average"] * ("average" in found)


def compare(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The benchmarks of several runs as one table for any figure: the first run's teacher, and each run's student.

    Args:
        tables: tables of results by display name. Speeds are comparable where the runs used one machine.
    """
    benchmarks = {name: table[table["stage"] == "benchmark"] for name, table in tables.items()}
    students = [rows[rows["model"] == "student"].assign(model=name) for name, rows in benchmarks.items()]
    first = next(iter(benchmarks.values()))
    return pd.concat([first[first["model"] == "teacher"], *students], ignore_index=True)


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The study in one table: a row per model of the benchmark; NaN where nothing was measured.

    Scores are averages over tasks. Latency (batch 1, median) and throughput (batch 32) are the CPU's if measured.
    """
    rows = select(table, "benchmark", "scores and sizes")
    rows = rows.sort_values("method", key=lambda method: method == "cuda", kind="stable")
    average = rows[(rows["task"] == "average") & (rows["metric"] == "score") & rows["seed"].isna()]

    def column(part: pd.DataFrame, **where: str) -> pd.Series:
        for name, wanted in where.items():
            part = part.loc[part[name] == wanted]
        return part.drop_duplicates("model").set_index("model")["value"]

    kept = rows[(rows["metric"] == "retention") & (rows["task"] == "average")]
    columns = {
        "parameters (M)": column(rows, metric="parameters") / 1e6,
        "size (MB)": column(rows, metric="megabytes"),
        "latency (ms)": column(rows, metric="latency_ms"),
        "sentences/s": column(rows, metric="sentences_per_second"),
        "probe score (%)": column(average, method="probe") * 100,
        "fine-tuning score (%)": column(average, method="finetune") * 100,
        "of teacher, above chance (%)": column(kept, method="probe") * 100,
    }
    return pd.DataFrame(columns).reindex(list(style.looks(rows))).rename_axis("model")


def main_table(table: pd.DataFrame, method: str = "finetune") -> pd.DataFrame:
    """The paper's main table: a row per model, a column per task, scores in percent with 95% intervals.

    Args:
        table: the table of results.
        method: "finetune" or "probe".

    Raises:
        UserError: where the table has no such scores.
    """
    rows = benchmark_rows(table, method)
    sizes = table[(table["stage"] == "benchmark") & (table["metric"] == "parameters")].set_index("model")["value"] / 1e6
    cell = rows.apply(lambda r: f"{r['value'] * 100:.1f} [{r['low'] * 100:.1f}, {r['high'] * 100:.1f}]", axis=1)
    found = rows.assign(cell=cell).pivot(index="model", columns="task", values="cell").fillna("")
    found = found.reindex([model for model in style.looks(table) if model in found.index])[tasks_of(rows)]
    found.insert(0, "parameters (M)", sizes.reindex(found.index).map("{:.1f}".format))
    return found


def benchmark_rows(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """The headline score of every model on every task, a row each."""
    what = {"probe": "probe score", "finetune": "fine-tuning score"}[method]
    rows = headline_rows(table, select(table, "benchmark", what, method=method))
    return summary(need(rows, "benchmark", what), "task", "model")
