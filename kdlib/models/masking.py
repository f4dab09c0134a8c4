"""Masking: the tokens that masked language modelling hides."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from kdlib.errors import UserError


def mask_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """The id of the mask token. Raises UserError with the model's name where the tokenizer has none."""
    if tokenizer.mask_token_id is None:
        raise UserError(f"{name}: its tokenizer has no mask token; masked-language modelling needs one")
    return tokenizer.mask_token_id


def maskable_tokens(tokenizer: PreTrainedTokenizerFast, encodings: Sequence, prefix: str = "") -> list[np.ndarray]:
    """The tokens of single texts that may be masked: bool [tokens] for each encoding of `Encoder.tokenize`.

    Special tokens, the unknown token and the tokens of the prefix are never masked.
    """
    special = np.array(tokenizer.all_special_ids)
    out = []
    for encoding in encodings:
        ends = np.array([end for _, end in encoding.offsets], int)
        out.append(~np.isin(np.array(encoding.ids, int), special) & (ends > len(prefix)))
    return out


def word_numbers(encodings: Sequence) -> list[np.ndarray]:
    """The word of its text that each token belongs to: int [tokens] for each encoding, -1 for none."""
    return [np.array([-1 if word is None else word for word in e.word_ids], int) for e in encodings]


def seeded_generator(key: str) -> torch.Generator:
    """A generator whose draws depend on nothing but `key`, so that a resumed run draws the same masks."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))


def mask_tokens(
    ids: torch.Tensor,
    maskable: torch.Tensor,
    mask_id: int,
    rows: int,
    share: float = 0.15,
    words: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking: of the chosen tokens 80% become the mask, 10% a random token, 10% stay.

    Draws are made on the CPU, so that a generator gives the same masks on every device.

    Args:
        ids: [batch, tokens].
        maskable: bool [batch, tokens], False at special tokens and padding.
        mask_id: id of the mask token.
        rows: rows of the vocabulary, from which random tokens are drawn.
        share: chance that a token is chosen.
        words: int [batch, tokens], the word of each token (-1: none); then whole words are chosen.
        generator: of the draws.

    Returns:
        The masked ids and a bool mask of the targets. A batch without a chosen token gets one, or one word.

    References:
        Devlin et al. (2019), section 3.1.
    """

    def draw(shape: Sequence[int]) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(ids.device)

    if words is None:
        drawn = draw(ids.shape)
    else:  # every token of a word takes the draw of its word
        owner = words.clamp(min=0)
        drawn = draw((len(ids), int(owner.max()) + 1)).gather(1, owner)
    drawn = drawn.masked_fill(~maskable, 2.0)  # beyond any share
    least = drawn == drawn.min()  # at least one token, so that there is something to learn
    chosen = ((drawn < share) | least) & maskable
    fate = draw(ids.shape)
    noise = torch.randint(0, rows, ids.shape, generator=generator).to(ids.device)
    masked = torch.where(chosen & (fate < 0.8), mask_id, ids)
    return torch.where(chosen & (fate >= 0.9), noise, masked), chosen
