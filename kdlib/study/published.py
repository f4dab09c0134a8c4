"""The numbers in README and docs: kept from a finished run, and written between markers. Nobody types them."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluation.paired_tests import verdicts
from kdlib.evaluation.task_students import HARD, SOFT
from kdlib.files import new_file, new_folder, read_json
from kdlib.progress import clock
from kdlib.study.run import Run, project_folder
from kdlib.study.study import STAGES
from kdlib.viz.tables import benchmark_rows, headline, headline_rows, summary

KEPT = ("results.csv", "profile.yaml", "sources.json", "stages")
MARKED = re.compile(r"(<!-- from the run: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# What the kit claims, as a comparison of two models by linear probe, averaged over tasks: claim, first, second, and the
# verdicts that would support it.
CLAIMS = (
    ("The student equals the teacher", "student", "teacher", "on par"),
    ("Pruning the vocabulary costs nothing", "pruned teacher", "teacher", "on par"),
    ("Copying layers is not enough: distillation matters", "student", "no distillation", "better"),
    ("The student knows more than random weights", "student", "random weights", "better"),
    ("It is the teacher that helps, not the text alone", "student", "blank", "better"),
    ("The student is better than the teacher's token vectors", "student", "static", "better"),
    ("The student is better than counting letters and words", "student", "tf-idf", "better"),
    ("Eight bits cost the student nothing", "student int8", "student", "on par"),
    ("Eight bits cost the pruned teacher nothing", "pruned teacher int8", "pruned teacher", "on par"),
)


def keep(run: Run, to: Path) -> Path:
    """Copy what a finished run found, without its models and figures, into `to`/<profile>. Returns that folder.

    Raises:
        UserError: where the run is not finished.
    """
    missing = [name for name in KEPT if not (run.path / name).exists()]
    if missing or not (run.path / "stages" / "figures.json").is_file():
        raise UserError(f"{run.path}: not finished ({', '.join(missing) or 'stage figures'} missing); run it first")
    with new_folder(to / run.profile.name) as folder:
        for name in KEPT:
            if (run.path / name).is_dir():
                shutil.copytree(run.path / name, folder / name)
            else:
                shutil.copy(run.path / name, folder / name)
    return to / run.profile.name


def kept_run(name: str = "full") -> Run | None:
    """The results of a finished run that come with the project, in `results/<name>`; None where they are missing."""
    for base in (Path(__file__).parents[2], project_folder()):
        if (base / "results" / name / "results.csv").is_file():
            return Run(base / "results" / name)
    return None


def fill(file: Path, run: Run) -> bool:
    """Rewrite what is between the markers of a Markdown file from a run's results. Returns whether it changed.

    A marked part begins with `<!-- from the run: NAME -->` and ends with `<!-- end -->`; NAME is one of `PARTS`.

    Raises:
        UserError: for an unknown name, or a run that lacks the numbers.
    """
    text = file.read_text("utf-8")
    written = filled(text, run, str(file))
    if written != text:
        with new_file(file) as path:
            path.write_text(written, "utf-8")
    return written != text


def filled(text: str, run: Run, origin: str = "") -> str:
    """The text with its marked parts rewritten, see `fill`."""
    if run.results().empty:
        raise UserError(f"{run.path}: no results; run the study first")

    def part(found: re.Match) -> str:
        if found[2] not in PARTS:
            raise UserError(f"{origin}: no part {found[2]!r}; the parts are {', '.join(PARTS)}")
        return f"{found[1]}{PARTS[found[2]](run)}\n{found[3]}"

    return MARKED.sub(part, text)


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _numbers(values: pd.Series, digits: int) -> list[str]:
    return ["" if pd.isna(value) else f"{value:,.{digits}f}" for value in values]


def _percent(row: pd.Series) -> str:
    """A share with its interval."""
    return f"{row['value'] * 100:.1f} [{row['low'] * 100:.1f}, {row['high'] * 100:.1f}]"


def _kept(run: Run) -> tuple[pd.DataFrame, str]:
    """Retention by probe, by model, over the tasks with room; and the name of that mean. All tasks where none has."""
    rows = run.results().query("metric == 'retention' and method == 'probe'")
    mean = "with room" if "with room" in set(rows["task"]) else "average"
    return rows[rows["task"] == mean].set_index("model"), mean


def _about(run: Run) -> str:
    """One paragraph: what ran, how long, and the student in a sentence."""
    table, (kept, mean) = run.results(), _kept(run)
    done = {file.stem: read_json(file)["seconds"] for file in (run.path / "stages").glob("*.json")}
    missing = [name for name in STAGES if name not in done]
    how = f"not run to the end ({', '.join(missing)})" if missing else clock(sum(done.values()))
    machine = table[table["metric"] == "threads"]
    where = f", on {machine['value'].iloc[0]:g} threads of {machine['arm'].iloc[0]}" if len(machine) else ""
    sizes = table[(table["metric"] == "parameters") & (table["stage"] == "benchmark")].set_index("model")["value"]
    text = f"Profile `{run.profile.name}`, language `{run.profile.target}`: {how}{where}."
    if "student" in kept.index:
        room = table.query("metric == 'room' and method == 'probe' and low > 0")["task"]
        over = f"the tasks with room ({', '.join(room)})" if mean == "with room" else "all tasks"
        text += (
            f" The student has {sizes['student'] / sizes['teacher']:.1%} of the teacher's parameters and keeps "
            f"{_percent(kept.loc['student'])}% of its probe score above chance, averaged over {over}."
        )
    return text


def _headline(run: Run) -> str:
    """A row for each model: size, speed, score, and what it keeps of the teacher."""
    table, (kept, mean) = headline(run.results()), _kept(run)
    average = benchmark_rows(run.results(), "probe").query("task == 'average'").set_index("model")
    found = pd.DataFrame({"model": [f"**{name}**" if name == "student" else name for name in table.index]})
    for column, digits in (("parameters (M)", 1), ("size (MB)", 0), ("latency (ms)", 1), ("sentences/s", 0)):
        found[column] = _numbers(table[column], digits)
    found["probe score (%)"] = [_percent(average.loc[m]) if m in average.index else "" for m in table.index]
    label = "above chance, of the teacher (%), " + ("tasks with room" if mean == "with room" else "all tasks")
    found[label] = [_percent(kept.loc[m]) if m in kept.index else "" for m in table.index]
    return _markdown(found)


def _tasks(run: Run) -> str:
    """A row for each task: chance, controls, teacher, student, and the room it leaves."""
    table = run.results()
    scores = benchmark_rows(table, "probe").set_index(["task", "model"])
    rows = []
    for task in table.query("metric == 'chance'")["task"].unique():
        at = table[(table["task"] == task) & (table["method"] == "probe")]
        room = at[at["metric"] == "room"]
        line = {"task": task, "metric": scores.loc[task]["metric"].iloc[0]}
        line["chance"] = f"{at[at['metric'] == 'chance']['value'].iloc[0] * 100:.1f}"
        for model in ("tf-idf", "static", "random weights", "no distillation", "blank", "student", "teacher"):
            if (task, model) in scores.index:
                line[model] = _percent(scores.loc[(task, model)])
        line["room"] = f"{_percent(room.iloc[0])}, over {room['arm'].iloc[0]}" if len(room) else ""
        rows.append(line)
    return _markdown(pd.DataFrame(rows).fillna(""))


def _tested(found: pd.DataFrame) -> pd.DataFrame:
    """Columns that say what a comparison found."""
    points = [f"{row['difference'] * 100:+.1f}" for _, row in found.iterrows()]
    within = [f"{row['low'] * 100:+.1f} to {row['high'] * 100:+.1f}" for _, row in found.iterrows()]
    p = [f"{row['p_holm']:.3f}, {row['tost_p_holm']:.3f}" for _, row in found.iterrows()]
    least = [f"{row['detectable'] * 100:.1f}" for _, row in found.iterrows()]
    return pd.DataFrame(
        {
            "difference (points)": points, "95% interval": within, "p of no difference, of a large one (Holm)": p,
            "detectable": least, "verdict": list(found["verdict"]),
        }
    )  # fmt: skip


def _claims(run: Run) -> str:
    """A row for each of `CLAIMS` whose models were compared: what was found, and whether it holds."""
    table = run.results()
    found = verdicts(table[table["stage"] == "benchmark"], run.profile.benchmark.margin)
    found = found[(found["task"] == "average") & (found["method"] == "probe")].set_index(["model", "arm"])
    claims = [claim for claim in CLAIMS if claim[1:3] in found.index]
    if not claims:
        raise UserError(f"{run.path}: no paired comparisons; run the benchmark first")
    tested = _tested(pd.DataFrame([found.loc[claim[1:3]] for claim in claims]))
    holds = [
        "yes" if verdict.startswith(wanted) else "not shown" if verdict == "undecided" else "no"
        for verdict, (*_, wanted) in zip(tested["verdict"], claims, strict=True)
    ]
    tested.insert(0, "compared", [f"{first} − {second}" for _, first, second, _ in claims])
    tested.insert(0, "claim", [claim[0] for claim in claims])
    return _markdown(tested.assign(holds=holds))


def _ablations(run: Run) -> str:
    """A row for each arm: the paired difference to the first arm of its family, by mean probe score and similarity."""
    table = run.results().query("stage == 'ablations' and method != 'reference'")
    found = verdicts(table.assign(model=table["arm"], arm=""), run.profile.benchmark.margin)
    found = found[(found["task"] == "average") | found["task"].isna()]
    if found.empty:
        raise UserError(f"{run.path}: no paired comparisons of arms; run the ablations first")
    bases = {family: next(iter(arms)) for family, arms in run.profile.ablations.arms.items()}
    tested = _tested(found)
    tested.insert(0, "by", ["probe" if task == "average" else "similarity" for task in found["task"]])
    pairs = zip(found["model"], found["method"], strict=True)
    tested.insert(0, "arm", [f"{arm} − {bases.get(family, '')}" for arm, family in pairs])
    tested.insert(0, "family", list(found["method"]))
    return _markdown(tested)


def _task_students(run: Run) -> str:
    """A row for each task and number of labelled rows: the models of notebook 04b, and what soft labels changed."""
    table = run.results().query("stage == 'task' and method == 'task' and task != 'average'")
    scores = summary(headline_rows(run.results(), table), "task", "x", "model")
    tested = verdicts(table, run.profile.benchmark.margin)
    tested = tested[(tested["model"] == SOFT) & (tested["arm"] == HARD)].reset_index(drop=True)
    if tested.empty:
        raise UserError(f"{run.path}: no students of tasks; run the stage 'task' first")
    found = pd.DataFrame({"task": tested["task"], "rows per class": [f"{x:g}" for x in tested["x"]]})
    cells = scores.assign(cell=[_percent(row) for _, row in scores.iterrows()]).set_index(["task", "x", "model"])[
        "cell"
    ]
    for model in ("tf-idf", "teacher", HARD, SOFT):
        found[model] = [cells.get((row.task, row.x, model), "") for row in tested.itertuples()]
    return _markdown(pd.concat([found, _tested(tested).add_prefix("soft labels − labels: ")], axis=1))


def _task_arms(run: Run) -> str:
    """A row for each arm of task distillation: what a filter, a balance and hidden states changed."""
    table = run.results().query("stage == 'task' and method == 'task' and task != 'average'")
    tested = verdicts(table, run.profile.benchmark.margin)
    tested = tested[tested["model"].str.startswith(f"{SOFT}: ")].reset_index(drop=True)
    if tested.empty:
        raise UserError(f"{run.path}: no arms of students of tasks; run the stage 'task' first")
    found = pd.DataFrame({"task": tested["task"], "rows per class": [f"{x:g}" for x in tested["x"]]})
    found["arm"] = tested["model"].str.removeprefix(f"{SOFT}: ")
    return _markdown(pd.concat([found, _tested(tested)], axis=1))


def _transfer(run: Run) -> str:
    """A row for each arm that was scored on English: are its vectors where the teacher's vectors of English are?"""
    rows = run.results().query("stage == 'ablations' and metric == 'transfer' and seed.isna()")
    rows = rows[rows["low"].notna()]
    if rows.empty:
        raise UserError(f"{run.path}: no transfer was measured; run the ablations first")
    rows = rows.assign(cell=[_percent(row) for _, row in rows.iterrows()], arm=rows["arm"].fillna(rows["model"]))
    wide = rows.drop_duplicates(["arm", "task"]).pivot(index="arm", columns="task", values="cell").fillna("")
    return _markdown(wide.loc[list(dict.fromkeys(rows["arm"]))].reset_index().rename_axis(columns=None))


PARTS: dict[str, Callable[[Run], str]] = {
    "about": _about, "headline": _headline, "tasks": _tasks, "claims": _claims, "ablations": _ablations,
    "task_students": _task_students, "task_arms": _task_arms, "transfer": _transfer,
}  # fmt: skip
