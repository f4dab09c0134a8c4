"""Capturing the hidden states, queries, keys, values and logits of a forward pass."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from kdlib.distillation.objectives import ModelOutputs, RequiredOutputs
from kdlib.models.families import family_of
from kdlib.models.mlm_head import MaskedHead


class StateCapture(nn.Module):
    """A model whose forward pass returns `ModelOutputs`. For a student, this module is trained and checkpointed.

    Args:
        model: the encoder.
        needs: the outputs to capture.
        layers: layers whose states are kept, 1 = first, with the last layer at the end.
        projection: hidden -> the teacher's hidden, applied to all kept states (Jiao et al. 2020, eq. 8).
        head: gives the logits, from the states before the projection.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int],
        needs: RequiredOutputs,
        projection: nn.Linear | None = None,
        head: MaskedHead | None = None,
    ):
        super().__init__()
        self.model, self.projection, self.head = model, projection, head
        self.layers, self.needs = list(layers), needs
        self.caught: dict[str, dict[int, torch.Tensor]] = {"query": {}, "key": {}, "value": {}}
        self.hooks = []
        if needs.attention:
            # We record queries, keys and values at their projections. They give the scores before the softmax under
            # any attention implementation; `output_attentions` gives probabilities only, and nothing with sdpa.
            for kind, modules in _projections(model).items():
                if kind == "value" and not needs.values:
                    continue
                self.hooks += [modules[layer - 1].register_forward_hook(self._catch(kind, layer)) for layer in layers]

    def _catch(self, kind: str, layer: int) -> Callable:
        heads = self.model.config.num_attention_heads

        def hook(module, inputs, output):  # DeBERTa projects the relative positions too, after the text
            self.caught[kind].setdefault(layer, output.unflatten(-1, (heads, -1)).transpose(1, 2))

        return hook

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, masked: torch.Tensor | None = None) -> ModelOutputs:
        """Run the model.

        Args:
            ids: [batch, tokens].
            mask: attention mask [batch, tokens].
            masked: positions of the masked tokens in the flattened batch, for the logits.
        """
        for caught in self.caught.values():
            caught.clear()
        found = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        kept = [found[layer] for layer in self.layers]
        embedded = found[0] if self.needs.embedded else None
        logits = None
        if self.head is not None and masked is not None:
            embeddings = self.model.get_input_embeddings().weight
            logits = self.head(kept[-1].flatten(0, 1)[masked], embeddings)
        if self.projection is not None:
            kept = [self.projection(states) for states in kept]
            embedded = self.projection(embedded) if embedded is not None else None
        query, key, value = (list(caught.values()) for caught in self.caught.values())
        return ModelOutputs(kept, mask, query, key, value, embedded, logits)

    def release(self) -> PreTrainedModel:
        """Remove all hooks and return the model."""
        for hook in self.hooks:
            hook.remove()
        return self.model


def _projections(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """The projections of the queries, the keys and the values of all layers, lowest first."""
    family = family_of(model.config.model_type)
    modules, depth = dict(model.named_modules()), range(model.config.num_hidden_layers)
    names = {"query": family.query[0], "key": family.key[0], "value": family.value}
    return {
        kind: [next(m for n, m in modules.items() if n.endswith(f"{family.layers}.{i}.{name}")) for i in depth]
        for kind, name in names.items()
    }
