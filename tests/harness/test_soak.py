"""The short version of `make soak`: a study killed where it trains ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_a_study_killed_while_it_trains_ends_as_if_nothing_had_happened():
    command = [sys.executable, Path(__file__).with_name("soak.py"), "--kills", "4", "--seed", "7"]
    aim = ["condition", "distill", "ablations"]
    result = subprocess.run([*command, "--aim", *aim], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[-1] == "4 passed, 0 failed", result.stdout[-2000:] + result.stderr[-2000:]
    assert lines[0] == "SEED=7" and sum("    at " in line for line in lines) == 4
