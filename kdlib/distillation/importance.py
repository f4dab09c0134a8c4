"""Which feed-forward neurons and attention heads of a model matter most to its own outputs. No labels are needed."""

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kdlib.batching import budget_batches, pad, tokens_per_batch
from kdlib.models.families import family_of

ROUNDS = 4  # scores change as parts go: TextPruner's scores rise with the number of rounds
TOKENS = 4096  # of the sample that a round reads
DRAW = 256  # tokens of a batch, padding included; a score is a mean over batches


def sample_batches(
    model: PreTrainedModel, sample: Sequence[Sequence[int]] | None, tokens: int, budget: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask of batches of a sample, on the model's device.

    Args:
        model: has the vocabulary.
        sample: token ids of texts; None: random rows of the vocabulary.
        tokens: read until so many.
        budget: tokens of a batch; None: `tokens_per_batch`.
    """
    if sample is None:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randint(model.config.vocab_size, (tokens // 32, 32), generator=generator).tolist()
    lengths = np.array([len(row) for row in sample])
    enough = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
    for batch in budget_batches(lengths[:enough], budget or tokens_per_batch()):
        ids, mask = pad([sample[i] for i in batch], model.config.pad_token_id or 0)
        yield ids.to(model.device), mask.to(model.device)


def most_important(
    model: PreTrainedModel, heads: int, neurons: int, sample: Sequence[Sequence[int]] | None = None, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The heads and the feed-forward neurons that every layer keeps, equally many in each layer.

    A part's score is ``|sum of weight x gradient|`` over the weights that carry its output on, which is to first order
    what the loss loses without the part; mean over batches. The least important parts go in ROUNDS equal steps, and the
    rest is scored again after each. The loss is the MSE to the last states of the unpruned model, plus noise as large
    as their standard deviation. Without noise the gradient of the first round would be 0; with it, scores have the size
    of the change of the states. Padding has no part in any mean. A student's parts are chosen after its layers, in the
    model that has no others.

    Args:
        model: the unpruned model, in eval mode. It is not changed.
        heads: to keep in each layer.
        neurons: to keep in each layer.
        sample: token ids of texts, of which about TOKENS tokens are read; None: random rows of the vocabulary.
        seed: of the noise.

    Returns:
        For each layer the numbers of the heads and of the neurons that are kept, both sorted.

    References:
        Michel et al. (2019), eq. 2; Molchanov et al. (2019), for the first-order score; Yang et al. (2022), TextPruner,
        for rounds and for scores without labels.
    """
    names, pruned = family_of(model.config.model_type), copy.deepcopy(model)
    layers = [pruned.get_submodule(f"{names.layers}.{i}") for i in range(pruned.config.num_hidden_layers)]
    weights = [layer.get_parameter(f"{name}.weight") for layer in layers for name in (names.out, names.down)]
    parts = [pruned.config.num_attention_heads, weights[1].shape[1]] * len(layers)  # of each weight's columns
    goals = [heads, neurons] * len(layers)
    pruned.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (ids, mask, _drawn(model, ids, mask, generator)) for ids, mask in sample_batches(pruned, sample, TOKENS, DRAW)
    ]
    kept: list[torch.Tensor] = []
    for step in range(1, ROUNDS + 1):
        scores = [weight.new_zeros(count) for weight, count in zip(weights, parts)]
        for ids, mask, target in batches:
            states = pruned(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
            gradients = torch.autograd.grad(F.mse_loss(states, target), weights)
            for score, weight, gradient in zip(scores, weights, gradients):
                score += (weight.detach() * gradient).sum(0).unflatten(0, (len(score), -1)).sum(1).abs()
        left = [count - round((count - goal) * step / ROUNDS) for count, goal in zip(parts, goals)]
        kept = [score.topk(count).indices.sort().values for score, count in zip(scores, left)]
        with torch.no_grad():
            for weight, chosen, count in zip(weights, kept, parts):
                gone = torch.ones(count, dtype=torch.bool, device=weight.device).index_fill_(0, chosen, False)
                weight[:, gone.repeat_interleave(weight.shape[1] // count)] = 0  # a part that went scores 0 from now on
    kept = [chosen.cpu() for chosen in kept]
    return list(zip(kept[::2], kept[1::2]))


@torch.no_grad()
def _drawn(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The model's last states at real tokens, with noise: [real tokens, hidden]."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    noise = torch.randn(states.shape, generator=generator).to(states)
    return states + noise * states.std()
