"""Masked language modelling: the head that turns states into logits over the vocabulary, and masking."""

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
    """dense, activation, LayerNorm, then the product with the input embeddings plus a bias.

    The head that BERT, RoBERTa, XLM-R, DistilBERT and DeBERTa-v2 share under different names.

    The embedding matrix is not part of the head (it is tied): whoever calls brings it.
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
    """An untrained head for `model`, started as BERT's (weights normal(0, initializer_range), biases 0).

    frequencies: of each embedding row in some text, positive, summing to 1; their logarithms are the output bias then.
    So it starts near what is known without context, which a short training would else be spent on.
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
    """The epsilon of the head's LayerNorm; DistilBERT's is no part of its config."""
    return getattr(model.config, "layer_norm_eps", 1e-12)


def prune_head(head: MaskedHead, ids: Sequence[int]) -> MaskedHead:
    """The head for the embedding rows `ids` alone: its logits are the full head's at those ids.

    Rows are taken in ascending order, as `vocabulary.prune_model` takes them. Raises UserError for an id that is none.
    """
    rows = torch.tensor(sorted(int(i) for i in ids), device=head.bias.device)
    if int(rows[-1]) >= len(head.bias):
        raise UserError(f"ids go up to {int(rows[-1])}, the masked-language head has only {len(head.bias)} rows")
    pruned = copy.deepcopy(head)
    pruned.bias = nn.Parameter(head.bias.detach()[rows].clone())
    return pruned


def save_head(head: MaskedHead, file: Path) -> None:
    """Write a head as safetensors; what is no weight stands in the file's metadata."""
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    settings = {"eps": head.norm.eps, "activation": head.activation}
    save_file(state, file, {"format": "pt", "head": json.dumps(settings)})


def load_head(file: Path, model: PreTrainedModel) -> MaskedHead:
    """A head that `save_head` wrote. Raises UserError if it is not one, or not of this model's sizes."""
    try:
        with safe_open(file, "pt") as stored:
            settings = json.loads(stored.metadata()["head"])
            state = {name: stored.get_tensor(name) for name in stored.keys()}
        eps, activation = float(settings["eps"]), str(settings["activation"])
        ACT2FN[activation]
    except Exception as error:  # the reader and what is read raise many kinds; people need one line
        raise UserError(f"{file}: not a masked-language head ({str(error).splitlines()[0]})") from None
    return build_head(state, model, eps, activation, str(file))


def build_head(
    state: dict[str, torch.Tensor], model: PreTrainedModel, eps: float, activation: str, origin: str
) -> MaskedHead:
    """A head in eval mode holding the weights `state`, for `model`. Raises UserError where they do not fit it."""
    rows, width = model.get_input_embeddings().weight.shape
    head = MaskedHead(model.config.hidden_size, width, rows, eps, activation)
    wanted = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != found:
        raise UserError(f"{origin}: the masked-language head has weights {found}; the model needs {wanted}")
    head.load_state_dict(state)
    return head.to(model.device).eval()


def perplexity(sums: np.ndarray, resamples: int = 1000) -> dict[str, float]:
    """Exp of the mean loss of all tokens (or words): value, and low and high of its 95% interval.

    sums: [texts, 2], each text's losses (nats) and how many they are. The interval is a bootstrap over texts.
    """
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples) @ sums
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.exp(np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]))
    losses, count = sums.sum(0)
    return {"value": float(np.exp(losses / count)), "low": float(low), "high": float(high)}
