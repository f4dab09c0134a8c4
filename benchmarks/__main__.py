"""All benchmarks: python -m benchmarks [--quick] [NAME ...]; a table, `results.json`, and the table in docs.

Names (batches, pruning, step, ...) choose some of them; the results of the others are kept.
"""

import importlib
import json
import sys
import time
from pathlib import Path

from benchmarks.common import HERE, PAGES, RESULTS, quiet, show, write_results

NAMES = ("batches", "pruning", "step", "distillation", "brewer", "cache", "fast")


def keep(rows: list[dict], target: Path, pages: tuple[Path, ...]) -> list[dict]:
    """Write the rows of a benchmark, compared with those of the others that are there; returns all of them."""
    before = json.loads(target.read_text("utf-8")) if target.is_file() else []
    rows = [row for row in before if row["benchmark"] != rows[0]["benchmark"]] + rows
    rows.sort(key=lambda row: NAMES.index(row["benchmark"]))
    write_results(rows, target, pages)
    return rows


def main() -> None:
    quiet()
    quick = "--quick" in sys.argv
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    if unknown := set(names) - set(NAMES):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    target, pages = (HERE / ".work" / "quick.json", ()) if quick else (RESULTS, PAGES)  # a try says nothing about speed
    for name in names or NAMES:
        start = time.perf_counter()
        found = importlib.import_module(f"benchmarks.{name}").measure(quick)
        rows = keep([{"benchmark": name, **row} for row in found], target, pages)  # as soon as there are any
        show(found, f"{name}, {time.perf_counter() - start:.0f} s")
    goals = [row for row in rows if row["goal"]]
    print(f"{sum(bool(row['met']) for row in goals)} of {len(goals)} goals met; written: {target}")


if __name__ == "__main__":
    main()
