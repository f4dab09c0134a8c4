"""A plain distillation loop, as the scripts of TinyBERT, and so of Cruz and Aji, go about it.

Every text is padded to 128 tokens, and padding is compared like text; the teacher runs at every step, in train mode and
with its graph built; all hidden states and all attention scores of both are kept; the student's states go through a
learned projection though it is as wide as its teacher; embeddings are the whole vocabulary's and trained; float32.
Where their optimiser loops over parameters in Python, torch's own AdamW is used, and nothing clips the gradients.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from kdlib.batching import pad

LENGTH, BATCH, RATE = 128, 32, 5e-5


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Attention that gives its scores before the softmax, which TinyBERT compares, where others give probabilities."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), scores


AttentionInterface.register("scores", _attend)
AttentionMaskInterface.register("scores", eager_mask)


class Loop:
    """teacher: a base model with the whole vocabulary; student: the same, with fewer layers that divide its own."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, projection: bool = True):
        self.teacher, self.student = copy.deepcopy(teacher).train(), student.train()
        for model in (self.teacher, self.student):
            model.requires_grad_(True)
            model.set_attn_implementation("scores")
        width = student.config.hidden_size
        self.fit_dense = nn.Linear(width, teacher.config.hidden_size) if projection else nn.Identity()
        parameters = [*self.student.named_parameters(), *self.fit_dense.named_parameters()]
        plain = [p for name, p in parameters if name.endswith("bias") or "LayerNorm" in name]
        others = [p for name, p in parameters if not (name.endswith("bias") or "LayerNorm" in name)]
        groups = [{"params": others, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE)

    def loss(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Sum over layers of the MSE of attention scores, and of hidden states from the embeddings on."""
        asked = {"input_ids": ids, "attention_mask": mask, "output_attentions": True, "output_hidden_states": True}
        mine, theirs = self.student(**asked), self.teacher(**asked)
        step = len(theirs.attentions) // len(mine.attentions)
        loss = 0.0
        for i, scores in enumerate(mine.attentions):
            target = theirs.attentions[(i + 1) * step - 1].detach()
            loss = loss + F.mse_loss(_real(scores), _real(target))
        for i, states in enumerate(mine.hidden_states):
            loss = loss + F.mse_loss(self.fit_dense(states), theirs.hidden_states[i * step].detach())
        return loss

    def step(self, ids: torch.Tensor, mask: torch.Tensor) -> float:
        loss = self.loss(ids, mask)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def _real(scores: torch.Tensor) -> torch.Tensor:
    return torch.where(scores <= -1e2, torch.zeros_like(scores), scores)


def batches(rows: Sequence[Sequence[int]], pad_id: int, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask, [32, 128] each, of texts in random order; without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            ids, mask = pad([rows[i][:LENGTH] for i in order[start : start + BATCH]], pad_id)
            room = (0, LENGTH - ids.shape[1])
            yield F.pad(ids, room, value=pad_id), F.pad(mask, room)
