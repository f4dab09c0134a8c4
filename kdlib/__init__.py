"""kdlib: from a massively multilingual transformer to a small single-language encoder.

The front door; each name is imported when it is first used, so that `import kdlib` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlib.distillation.distill import distill
    from kdlib.distillation.student_init import build_student
    from kdlib.models.loading import load_encoder
    from kdlib.pruning.model import prune_encoder
    from kdlib.study.study import Study

    __version__: str

__all__ = ["Study", "__version__", "build_student", "distill", "load_encoder", "prune_encoder"]
_HOMES = {
    "Study": "kdlib.study.study",
    "build_student": "kdlib.distillation.student_init",
    "distill": "kdlib.distillation.distill",
    "load_encoder": "kdlib.models.loading",
    "prune_encoder": "kdlib.pruning.model",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("kdlib")
    if name not in _HOMES:
        raise AttributeError(f"module 'kdlib' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
