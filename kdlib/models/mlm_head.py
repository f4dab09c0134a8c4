"""The masked-language head, which turns states into logits over the vocabulary."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from kdlib.errors import UserError

IGNORE = -100


class MaskedHead(nn.Module):
    """Dense layer, activation, LayerNorm, and the product with the input embeddings plus a bias.

    BERT and most later families share this head under different names; ModernBERT's has no bias before the output. The
    embedding matrix is tied, so it is not part of the head; the caller passes it.
    """

    def __init__(self, hidden: int, embedding: int, rows: int, eps: float = 1e-12, activation: str = "gelu"):
        super().__init__()
        self.dense = nn.Linear(hidden, embedding)
        self.norm = nn.LayerNorm(embedding, eps=eps)
        self.bias = nn.Parameter(torch.zeros(rows))
        self.activation = activation

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """States [..., hidden], embeddings [rows, embedding] -> logits [..., rows]."""
        return F.linear(self.norm(ACT2FN[self.activation](self.dense(states))), embeddings, self.bias)


def new_head(model: PreTrainedModel, frequencies: np.ndarray | None = None, seed: int = 0) -> MaskedHead:
    """An untrained head, initialised as BERT's: weights normal(0, initializer_range), biases 0.

    Args:
        model: the encoder.
        frequencies: share of each embedding row in some text, all above 0, with sum 1. Their logarithms become the
            output bias, so that training does not start below what is known without context.
        seed: of the weights.
    """
    rows, width = model.get_input_embeddings().weight.shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = MaskedHead(model.config.hidden_size, width, rows, head_eps(model))
        nn.init.normal_(head.dense.weight, std=getattr(model.config, "initializer_range", 0.02))
    nn.init.zeros_(head.dense.bias)
    if frequencies is not None:
        head.bias.data.copy_(torch.from_numpy(np.log(frequencies)))
    return head.to(model.device).eval()


def head_eps(model: PreTrainedModel) -> float:
    """The epsilon of the head's LayerNorm; ModernBERT has another name for it, DistilBERT's config lacks it."""
    return getattr(model.config, "layer_norm_eps", getattr(model.config, "norm_eps", 1e-12))


def prune_head(head: MaskedHead, ids: Sequence[int]) -> MaskedHead:
    """The head for the embedding rows `ids` alone, ascending. Its logits are the full head's at those ids.

    Raises:
        UserError: for an id outside the vocabulary.
    """
    rows = torch.tensor(sorted(int(i) for i in ids), device=head.bias.device)
    if int(rows[-1]) >= len(head.bias):
        raise UserError(f"ids go up to {int(rows[-1])}, the masked-language head has only {len(head.bias)} rows")
    pruned = copy.deepcopy(head)
    pruned.bias = nn.Parameter(head.bias.detach()[rows].clone())
    return pruned


def save_head(head: MaskedHead, file: Path) -> None:
    """Write a head as safetensors; its settings are in the file's metadata."""
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    settings = {"eps": head.norm.eps, "activation": head.activation}
    save_file(state, file, {"format": "pt", "head": json.dumps(settings)})


def load_head(file: Path, model: PreTrainedModel) -> MaskedHead:
    """Read a head written by `save_head`. Raises UserError if the file is none or its sizes differ from the model's."""
    try:
        with safe_open(file, "pt") as stored:
            settings = json.loads(stored.metadata()["head"])
            state = {name: stored.get_tensor(name) for name in stored.keys()}
        eps, activation = float(settings["eps"]), str(settings["activation"])
        ACT2FN[activation]
    except Exception as error:  # readers raise a dozen kinds; people need one line
        raise UserError(f"{file}: not a masked-language head ({str(error).splitlines()[0]})") from None
    return build_head(state, model, eps, activation, str(file))


def build_head(
    state: dict[str, torch.Tensor], model: PreTrainedModel, eps: float, activation: str, origin: str
) -> MaskedHead:
    """A head for `model` in eval mode with the weights `state`. Raises UserError where they do not fit."""
    rows, width = model.get_input_embeddings().weight.shape
    head = MaskedHead(model.config.hidden_size, width, rows, eps, activation)
    wanted = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != found:
        raise UserError(f"{origin}: the masked-language head has weights {found}; the model needs {wanted}")
    head.load_state_dict(state)
    return head.to(model.device).eval()


def perplexity(sums: np.ndarray, resamples: int = 1000) -> dict[str, float]:
    """Exp of the mean loss: value, low and high of its 95% interval (bootstrap over texts).

    Args:
        sums: [texts, 2], the sum of each text's losses (nats), and their number.
        resamples: of the bootstrap.
    """
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples) @ sums
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.exp(np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]))
    losses, count = sums.sum(0)
    return {"value": float(np.exp(losses / count)), "low": float(low), "high": float(high)}
