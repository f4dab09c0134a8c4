"""Models built from a config and weights."""

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights


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
