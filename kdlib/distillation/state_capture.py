"""Capturing the hidden states, queries, keys, values and logits of a forward pass."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kdlib.distillation.objectives import ModelOutputs, RequiredOutputs
from kdlib.models.encoder import layer_states
from kdlib.models.families import LOCAL, Family, family_of, layer_kinds
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
        kinds = layer_kinds(model.config)
        self.reach = [
            model.config.sliding_window if kinds and kinds[layer - 1] == LOCAL else None for layer in self.layers
        ]
        self.caught: dict[str, dict[int, torch.Tensor]] = {"query": {}, "key": {}, "value": {}}
        self.rotations: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.hooks = []
        if needs.attention:
            # We record queries, keys and values at their projections. They give the scores before the softmax under
            # any attention implementation; `output_attentions` gives probabilities only, and nothing with sdpa.
            family, modules = family_of(model.config.model_type), dict(model.named_modules())
            for layer in layers:
                for kind, names in zip(self.caught, (family.query, family.key, (family.value,))):
                    if kind == "value" and not needs.values:
                        continue
                    at = _stem(family, names[0])
                    module = _ending(modules, f"{family.layers}.{layer - 1}.{at}")
                    part = (family.fused[at].index(names[0]), len(family.fused[at])) if at != names[0] else None
                    self.hooks.append(module.register_forward_hook(self._catch(kind, layer, part)))
                if family.rotary:
                    at = f"{family.layers}.{layer - 1}.{_stem(family, family.query[0]).rpartition('.')[0]}"
                    attention = _ending(modules, at)
                    self.hooks.append(attention.register_forward_pre_hook(self._rotation(layer), with_kwargs=True))

    def _rotation(self, layer: int) -> Callable:
        def hook(module, args, kwargs):  # cosines and sines of the layer, which differ by its kind in ModernBERT
            self.rotations[layer] = kwargs["position_embeddings"]

        return hook

    def _catch(self, kind: str, layer: int, part: tuple[int, int] | None) -> Callable:
        settings = self.model.config
        heads = settings.num_attention_heads
        own = heads if kind == "query" else getattr(settings, "num_key_value_heads", heads)

        def hook(module, inputs, output):  # DeBERTa projects the relative positions too, after the text
            if layer in self.caught[kind]:
                return
            found = output if part is None else output.chunk(part[1], -1)[part[0]]
            found = found.unflatten(-1, (own, -1)).transpose(1, 2)
            if layer in self.rotations and kind != "value":
                found = apply_rotary_pos_emb(found, found, *self.rotations[layer])[0]
            self.caught[kind][layer] = found if own == heads else found.repeat_interleave(heads // own, 1)

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
        found = layer_states(self.model, input_ids=ids, attention_mask=mask)
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
        return ModelOutputs(kept, mask, query, key, value, embedded, logits, reach=self.reach)

    def release(self) -> PreTrainedModel:
        """Remove all hooks and return the model."""
        for hook in self.hooks:
            hook.remove()
        return self.model


def _stem(family: Family, name: str) -> str:
    """The module that holds a projection, which may be fused with others."""
    return next((whole for whole, parts in family.fused.items() if name in parts), name)


def _ending(modules: dict[str, nn.Module], end: str) -> nn.Module:
    """The first module whose name ends so."""
    return next(module for name, module in modules.items() if name.endswith(end))
