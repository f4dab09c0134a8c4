"""Student building: a smaller encoder of the teacher's kind, started from some of the teacher's layers."""

import copy
import re

import torch
from transformers import PreTrainedModel

from kdlib.errors import UserError
from kdlib.vocabulary import with_state

LAYER = re.compile(r"^(.*(?:encoder|transformer)\.layer\.)(\d+)(\..*)$")


def layer_map(init: str | list[int], student_layers: int, teacher_layers: int) -> list[int]:
    """Which teacher layer (1 = first) each student layer is copied from and compared with.

    init: "alternate" (every n-th, the last among them), "first", "last", or the layers themselves. A random start
    has no source layers; it is compared with the alternate ones. Cruz and Aji's student layer i is compared with
    teacher layer i * L / l, which is "alternate".
    """
    if isinstance(init, list):
        if len(init) != student_layers:
            raise UserError(f"student.init names {len(init)} layers for a student of {student_layers}")
        if not all(1 <= layer <= teacher_layers for layer in init):
            raise UserError(f"student.init is {init}; the teacher's layers are 1 to {teacher_layers}")
        return init
    if init not in ("alternate", "first", "last", "random"):
        raise UserError(f"student.init is {init!r}; must be alternate, first, last, random or a list of layers")
    if student_layers > teacher_layers:
        raise UserError(f"student.layers is {student_layers}; the teacher has only {teacher_layers}")
    if init == "first":
        return list(range(1, student_layers + 1))
    if init == "last":
        return list(range(teacher_layers - student_layers + 1, teacher_layers + 1))
    return [(i + 1) * teacher_layers // student_layers for i in range(student_layers)]


def build_student(
    teacher: PreTrainedModel, layers: int = 4, init: str | list[int] = "alternate", seed: int = 0
) -> PreTrainedModel:
    """A student of `layers` layers of the teacher's shape.

    init: "alternate", "first", "last" or a list of teacher layers (1 = first) copies those layers and everything
    outside the layers (embeddings, pooler); "random" draws all weights anew with `seed` (a "blank" student).
    """
    if layers < 1:
        raise UserError(f"student.layers is {layers}; must be at least 1")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if init == "random":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return type(teacher)._from_config(config).eval()
    source = layer_map(init, layers, count_layers(teacher))
    state, seen = {}, set()
    for name, value in teacher.state_dict().items():
        match = LAYER.match(name)
        if match is None:
            state[name] = value
            continue
        seen.add(int(match[2]))
        for i, teacher_layer in enumerate(source):
            if int(match[2]) == teacher_layer - 1:
                state[f"{match[1]}{i}{match[3]}"] = value
    if len(seen) != count_layers(teacher):
        raise UserError(f"cannot copy layers of a {type(teacher).__name__}: student.init must be random")
    return with_state(type(teacher), config, state)


def count_layers(model: PreTrainedModel) -> int:
    """Number of transformer layers."""
    return model.config.num_hidden_layers
