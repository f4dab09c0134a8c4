"""The same profile for several languages, one run each, with one table and one figure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field, ValidationError

from kdlib import config
from kdlib.errors import UserError
from kdlib.files import new_file, parse_yaml
from kdlib.study.run import Run
from kdlib.study.runner import NotebookError, run_study, wanted_stages
from kdlib.viz import figures
from kdlib.viz.languages import language_figure, language_table


class Sweep(config.Section):
    """What `kdlib sweep` reads from its YAML file."""

    profile: str = Field(default="workshop", description="of every run: a name, or a YAML file")
    only: list[str] = Field(default=["probe", "prune", "distill"], min_length=1, description="the stages to run")
    set: dict[str, Any] = Field(default={}, description="parameters of every run, by dotted key")
    languages: dict[str, dict[str, Any]] = Field(min_length=1, description="code -> parameters of its run")

    def overrides(self, code: str) -> list[str]:
        """The assignments of a language's run."""
        given = {"language": code} | self.set | self.languages[code]
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]


def read_sweep(file: Path) -> Sweep:
    """Read and check the file. Raises UserError for what cannot be a sweep, or a wrong parameter of a language."""
    try:
        sweep = Sweep.model_validate(parse_yaml(file.read_text("utf-8"), str(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    wanted_stages(sweep.only, None)
    for code in sweep.languages:
        config.load_profile(sweep.profile, sweep.overrides(code))
    return sweep


def run_sweep(file: Path, out: Path, say: Callable[[str], None] = print) -> tuple[pd.DataFrame, list[str]]:
    """Run every language in `out`/<code>; finished stages are kept. A language that fails does not stop the others.

    Writes `languages.csv` and `languages.png` and `.pdf` in `out`.

    Returns:
        The table, a row a language; and a line about each language that failed.

    Raises:
        UserError: for a wrong file, or where no language has results.
    """
    sweep, tables, failed = read_sweep(file), {}, []
    for code in sweep.languages:
        say(f"-- {code}")
        try:
            run_study(out / code, sweep.profile, sweep.overrides(code), sweep.only, again=False)
        except (UserError, NotebookError) as error:
            failed.append(f"{code}: {error}")
            say(failed[-1])
        if (out / code).is_dir():
            tables[code] = Run(out / code).results()
    table = language_table(tables)
    with new_file(out / "languages.csv") as path:
        table.to_csv(path)
    figures.save(language_figure(table), out, "languages")
    return table, failed
