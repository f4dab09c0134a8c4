"""The ablation grid: arms are listed in the profile; each is a whole profile that changes one thing."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdlib import config
from kdlib.errors import UserError

SECTIONS = ("vocabulary", "condition", "student", "distill")  # what an arm may change
INT8 = ("pruned teacher int8", "student int8")
UNDISTILLED = ("no distillation", "random weights")
STATIC = ("static", "static SIF")
RESERVED = (
    "teacher", "pruned teacher", "conditioned teacher", "student", "tf-idf", "chance", *INT8, *UNDISTILLED, *STATIC
)  # fmt: skip


@dataclass
class Arm:
    """One student of the grid. `profile` is the study's with the arm's changes."""

    family: str
    name: str
    changes: dict[str, Any]
    profile: config.Profile

    def with_seed(self, seed: int) -> config.Profile:
        """The arm's profile for one of its students."""
        return config.changed(self.profile, {"distill.seed": seed}, f"ablations.seeds {seed}")

    @property
    def x(self) -> float | None:
        """The changed value, if it is one number."""
        values = list(self.changes.values())
        number = len(values) == 1 and isinstance(values[0], (int, float)) and not isinstance(values[0], bool)
        return float(values[0]) if number else None


def arms(profile: config.Profile, wanted: Sequence[str] = ()) -> list[Arm]:
    """The arms of the profile's grid, in its order.

    Args:
        profile: the study's.
        wanted: only these, each "family" or "family/arm"; none: all.

    Raises:
        UserError: for an unknown arm, a parameter that an arm may not change, or a wrong value.
    """
    spec = profile.ablations
    found = []
    shared = {"distill.epochs": spec.epochs, "distill.evaluations": 1}
    for family, members in spec.arms.items():
        for name, changes in members.items():
            changed = _changed(profile, changes, f"ablations.arms.{family}.{name}", shared)
            found.append(Arm(family, name, changes, changed))
    names = {name for arm in found for name in (arm.family, f"{arm.family}/{arm.name}")}
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
            raise UserError(f"no ablation arm {name!r}; closest: {', '.join(close) or ', '.join(sorted(spec.arms))}")
    return [arm for arm in found if not wanted or arm.family in wanted or f"{arm.family}/{arm.name}" in wanted]


def students(profile: config.Profile) -> dict[str, config.Profile]:
    """The other students to benchmark: name -> the study's profile with the student's changes. Errors as `arms`."""
    for section, taken in (("students", [*RESERVED, *profile.baselines]), ("baselines", RESERVED)):
        for name in getattr(profile, section):
            if name in taken:
                raise UserError(f"{section}.{name}: this name is used already; choose another")
    return {name: _changed(profile, changes, f"students.{name}") for name, changes in profile.students.items()}


def _changed(
    profile: config.Profile, changes: dict[str, Any], where: str, shared: dict | None = None
) -> config.Profile:
    for key in changes:
        if key.split(".")[0] not in SECTIONS:
            raise UserError(f"{where}: cannot change {key!r}; an arm may change keys of {', '.join(SECTIONS)}")
    return config.changed(profile, (shared or {}) | changes, where)
