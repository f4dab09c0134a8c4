"""Check that pruning changed nothing."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from kdlib.batching import budget_batches, model_inputs, tokens_per_batch
from kdlib.data.lazy import parts
from kdlib.models.encoder import Encoder


def verify(full: Encoder, pruned: Encoder, ids: np.ndarray, texts: Sequence[str], states_of: int = 100) -> pd.DataFrame:
    """Compare a pruned encoder with the full one.

    Args:
        full: the unpruned encoder.
        pruned: the pruned encoder.
        ids: the kept ids of the full tokenizer, ascending.
        texts: texts whose token ids are compared, mapped back.
        states_of: number of texts whose hidden states are compared, bit for bit, in fp32.

    Returns:
        A table of claim, checked, holds: token ids, weights (of tables by vocabulary the kept rows) and hidden states.
    """
    same = 0
    for part in parts(texts):
        before, after = (encoder.tokenize(part) for encoder in (full, pruned))
        same += sum(np.array_equal(ids[b.ids], a.ids) for a, b in zip(before, after))
    small, rows = pruned.model.state_dict(), torch.as_tensor(np.asarray(ids).copy())
    weights = sum(_same_weights(name, value, small.get(name), rows) for name, value in full.model.state_dict().items())
    sample = texts[:states_of]
    claims = [
        ("texts whose token ids map exactly", len(texts), same),
        ("weight tensors that are the teacher's", len(full.model.state_dict()), weights),
        ("texts whose hidden states are equal bit for bit", len(sample), _same_states(full, pruned, sample)),
    ]
    return pd.DataFrame(claims, columns=["claim", "checked", "holds"])


@torch.inference_mode()
def _same_states(full: Encoder, pruned: Encoder, texts: Sequence[str]) -> int:
    """How many texts have the same states in both encoders, at every token and layer."""
    ids = [[encoding.ids for encoding in encoder.tokenize(texts)] for encoder in (full, pruned)]
    alike = [i for i, (before, after) in enumerate(zip(*ids)) if len(before) == len(after)]
    equal = 0
    for batch in budget_batches([len(ids[0][i]) for i in alike], tokens_per_batch()):
        states = []
        for encoder, rows in zip((full, pruned), ids):
            inputs = model_inputs([rows[alike[i]] for i in batch], None, encoder.tokenizer.pad_token_id)
            inputs = {name: value.to(encoder.model.device) for name, value in inputs.items()}
            states.append(encoder.model(**inputs, output_hidden_states=True).hidden_states)
        layers = [(before == after).flatten(1).all(1) for before, after in zip(*states)]
        equal += int(torch.stack(layers).all(0).sum())
    return equal


def _same_weights(name: str, full: torch.Tensor, pruned: torch.Tensor | None, rows: torch.Tensor) -> bool:
    if pruned is not None and full.shape != pruned.shape:
        # RoBERTa's positions count from the pad id and move with it.
        full = full[-len(pruned) :] if "position_embeddings" in name else full[rows.to(full.device)]
    return pruned is not None and torch.equal(full, pruned)
