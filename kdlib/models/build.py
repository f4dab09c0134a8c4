"""Models built from a config and weights, and written."""

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from kdlib.files import read_json, write_json
from kdlib.models.families import older_settings


def with_state(kind: type[PreTrainedModel], config: AutoConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of class `kind` with copies of all weights in `state`. Tied weights are tied again."""
    with no_init_weights():  # no random start: drawing weights that are overwritten would take most of the time
        model = kind._from_config(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise ValueError(f"weights do not fit {kind.__name__}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def save_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model's folder, with the settings that transformers 4 looks for."""
    model.save_pretrained(folder)
    file = Path(folder) / "config.json"
    settings = read_json(file)
    if older := older_settings(settings):
        write_json(file, settings | older)
