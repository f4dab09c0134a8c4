"""All benchmarks: python -m benchmarks [--quick] [NAME ...]; a table, `results.json`, and the table in docs and README.

Names (batches, pruning, step, ...) choose some; then the results of the others are kept.
"""

import importlib
import json
import sys
import time

from benchmarks.common import HERE, PAGES, RESULTS, quiet, show, write_results

NAMES = ("batches", "pruning", "step", "distillation", "brewer", "cache", "fast")


def run(names: list[str], quick: bool) -> list[dict]:
    """The rows of some benchmarks, each shown when it is done."""
    rows = []
    for name in names:
        start = time.perf_counter()
        found = importlib.import_module(f"benchmarks.{name}").measure(quick)
        rows += [{"benchmark": name, **row} for row in found]
        show(found, f"{name}, {time.perf_counter() - start:.0f} s")
    return rows


def main() -> None:
    quiet()
    quick = "--quick" in sys.argv
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    if unknown := set(names) - set(NAMES):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    rows = run(names or list(NAMES), quick)
    target = HERE / ".work" / "quick.json" if quick else RESULTS  # a try says nothing about speed
    if names and target.is_file():
        before = json.loads(target.read_text("utf-8"))
        rows = sorted(
            [r for r in before if r["benchmark"] not in names] + rows, key=lambda r: NAMES.index(r["benchmark"])
        )
    write_results(rows, target, () if quick else PAGES)
    goals = [row for row in rows if row["goal"]]
    print(f"{sum(bool(row['met']) for row in goals)} of {len(goals)} goals met; written: {target}")


if __name__ == "__main__":
    main()
