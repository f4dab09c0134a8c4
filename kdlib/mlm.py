"""Masked language modelling: the head that turns states into logits over the vocabulary, and masking."""

import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100


class MaskedHead(nn.Module):
    """dense, GELU, LayerNorm, then the product with the input embeddings plus a bias: the head that BERT, RoBERTa,
    XLM-R, DistilBERT and DeBERTa-v2 share under different names.

    The embedding matrix is not part of the head (it is tied): whoever calls brings it.
    """

    def __init__(self, hidden: int, embedding: int, rows: int, eps: float = 1e-12):
        super().__init__()
        self.dense = nn.Linear(hidden, embedding)
        self.norm = nn.LayerNorm(embedding, eps=eps)
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """States [..., hidden], embeddings [rows, embedding] -> logits [..., rows]."""
        return F.linear(self.norm(F.gelu(self.dense(states))), embeddings, self.bias)


def mask_tokens(
    ids: torch.Tensor,
    maskable: torch.Tensor,
    mask_id: int,
    rows: int,
    share: float = 0.15,
    words: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking (Devlin et al. 2019): of the chosen tokens 80% become the mask, 10% a random token, 10% stay.

    ids: [batch, tokens]; maskable: bool of that shape, False at special tokens and padding; share: chance that a token
    is chosen; words: int [batch, tokens], which word a token belongs to (-1: none): then whole words are chosen.
    Returns the masked ids and where the targets are (bool); a batch without a chosen token gets one.
    """
    drawn = torch.rand(ids.shape, generator=generator)
    if words is not None:  # every token of a word takes the draw of the word's first token
        owner = words.clamp(min=0)
        drawn = torch.rand((len(ids), int(owner.max()) + 1), generator=generator).gather(1, owner)
    chosen = (drawn < share) & maskable
    if not chosen.any() and maskable.any():
        row, column = maskable.nonzero()[0]
        chosen[row, column] = True
    fate = torch.rand(ids.shape, generator=generator)
    noise = torch.randint(0, rows, ids.shape, generator=generator)
    masked = torch.where(chosen & (fate < 0.8), mask_id, ids)
    return torch.where(chosen & (fate >= 0.9), noise, masked), chosen
