"""Write the table of families and stages in teachers.md: python docs/teachers.py runs every stage, in minutes."""

import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from families import STAGES, TEACHERS, training_texts, try_stages  # noqa: E402

MARKS = ("<!-- stages: this table is written by docs/teachers.py -->", "<!-- stages: end -->")


def table() -> str:
    lines = [["family", *STAGES], ["---"] * (len(STAGES) + 1)]
    for family in TEACHERS:
        with tempfile.TemporaryDirectory() as folder:
            failed = try_stages(family, Path(folder), *training_texts())
        lines.append([family, *("no" if name in failed else "yes" for name in STAGES)])
        print(family, failed, flush=True)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    page = DOCS / "teachers.md"
    before, rest = page.read_text("utf-8").split(MARKS[0], 1)
    page.write_text(before + MARKS[0] + "\n" + table() + MARKS[1] + rest.split(MARKS[1], 1)[1], "utf-8")
