"""The benchmark of the field: the tasks that the library mteb has for a language, on the models of a run.

The optional packages are installed by `pip install 'kdlib[mteb]'`. The tasks' data are on a model hub.
"""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from kdlib.errors import UserError
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.study.study import Study

MODELS = ("teacher", "pruned teacher", "student", "static")
TYPES = ("Classification", "MultilabelClassification", "PairClassification", "BitextMining", "STS")
CODES = {"tgl": ("tgl", "fil")}  # mteb has Tagalog under both


def library() -> ModuleType:
    """The module mteb. Raises UserError where it is not installed."""
    try:
        import mteb
    except ImportError as error:
        raise UserError(f"this needs the package {error.name}: pip install 'kdlib[mteb]'") from None
    return mteb


def tasks_for(language: str, names: Sequence[str] = ()) -> list[Any]:
    """The library's text tasks for a language, of the kinds in `TYPES`, or those with these names.

    Raises:
        UserError: where there are none.
    """
    mteb, codes = library(), list(CODES.get(language, (language,)))
    try:
        found = mteb.get_tasks(
            tasks=list(names) or None, languages=codes, modalities=["text"], exclusive_modality_filter=True,
            task_types=None if names else list(TYPES),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise UserError(f"mteb: {str(error).strip(chr(39))}") from None
    if not found:
        raise UserError(
            f"mteb has no text task for {', '.join(codes)}" + (f" named {', '.join(names)}" if names else "")
        )
    return list(found)


def score(encoders: Mapping[str, Encoder | Callable[[], Encoder]], tasks: Sequence[Any], language: str) -> list[dict]:
    """Run the library's tasks on encoders, which read texts as everywhere in the kit.

    Returns:
        Rows of model, task (the library's name), metric (the task's main score), value, language (of the part of the
        data), method (the split).

    Raises:
        UserError: where a task's data cannot be read.
    """
    mteb = library()
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    class Wrapped(AbsEncoder):
        def __init__(self, encoder: Encoder, name: str):
            self.encoder = encoder
            meta = {"name": f"kdlib/{name.replace(' ', '-')}", "revision": "run"}
            self.mteb_model_meta = ModelMeta.create_empty(meta)

        def encode(self, inputs: Any, **_: Any) -> np.ndarray:
            texts = [text for batch in inputs for text in batch["text"]]
            return text_vectors(self.encoder, texts)[:, 0]

    rows = []
    for name, encoder in encoders.items():
        model = Wrapped(encoder() if callable(encoder) else encoder, name)
        for task in tasks:
            try:
                result = mteb.evaluate(model, task, cache=None, show_progress_bar=False)
            except (OSError, ConnectionError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"mteb task {task.metadata.name}: cannot be run ({reason})") from None
            for found in result.task_results:
                shared = dict(model=name, task=found.task_name, metric=task.metadata.main_score)
                for split, parts in found.scores.items():
                    rows += [
                        shared | dict(method=split, value=float(part["main_score"]), language=_language(part, language))
                        for part in parts
                    ]
    return rows


def _language(part: dict, language: str) -> str:
    """The language of a part of a task's data; of a pair of languages the other one."""
    codes = [code.partition("-")[0] for code in part["languages"]]
    own = {*CODES.get(language, (language,)), language}
    return next((code for code in codes if code not in own), language)


def run_mteb(study: Study, names: Sequence[str] = (), tasks: Sequence[Any] = ()) -> pd.DataFrame:
    """Run the tasks on a run's models, record the rows as stage "mteb", and write them into the student's card.

    Args:
        study: a run with a student.
        names: tasks by the library's names; none: all text tasks of `TYPES` for the language.
        tasks: task objects instead of names.
    """
    chosen = list(tasks) or tasks_for(study.profile.target, names)
    models = {name: study.graph.models[name].get for name in MODELS}
    table = study.run.record("mteb", score(models, chosen, study.profile.target))
    study.write_cards()
    wide = table.pivot_table(
        index=["task", "language", "metric", "method"], columns="model", values="value", sort=False
    )
    return wide[list(MODELS)]
