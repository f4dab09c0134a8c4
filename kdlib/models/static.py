"""Static token vectors: an encoder without layers, whose state of a token is a row of a table."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import nn
from transformers import PreTrainedConfig

from kdlib.models.encoder import Encoder
from kdlib.models.sentence import SentenceVector

SIF = 1e-4  # a token weighs SIF / (SIF + its share of the running tokens)
WIDTH = 256  # dimensions that PCA keeps


class StaticModel(nn.Module):
    """A table of token vectors, called like a transformer. Its only hidden state is layer 0.

    Args:
        table: float [rows, width].
        settings: of the model that the table comes from.
    """

    def __init__(self, table: torch.Tensor, settings: PreTrainedConfig):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table, freeze=True)
        self.config = copy.deepcopy(settings)
        self.config.num_hidden_layers, self.config.hidden_size = 0, table.shape[1]

    def get_input_embeddings(self) -> nn.Embedding:
        """The table."""
        return self.table

    def forward(self, input_ids: torch.Tensor, **_) -> SimpleNamespace:
        """The vectors of token ids [batch, tokens]: [batch, tokens, width]."""
        states = self.table(input_ids)
        return SimpleNamespace(last_hidden_state=states, hidden_states=(states,))


def static_encoder(encoder: Encoder, counts: np.ndarray | None = None) -> Encoder:
    """The mean of an encoder's token vectors: what is left of it without its transformer layers.

    Args:
        encoder: its embeddings are read; it has no prefix here, and special tokens count as zero.
        counts: int [rows], how many times a text has each token. With them PCA reduces the vectors to `WIDTH`
            dimensions, and frequent tokens weigh less, as in model2vec.

    References:
        Arora et al. (2017), *A Simple but Tough-to-Beat Baseline for Sentence Embeddings*.
    """
    table = encoder.model.get_input_embeddings().get_parameter("weight").detach().float().cpu().clone()
    if counts is not None:
        weights = SIF / (SIF + counts / max(1, counts.sum()))
        reduced = PCA(min(WIDTH, *table.shape), random_state=0).fit_transform(table.numpy()) * weights[:, None]
        table = torch.from_numpy(reduced.astype(np.float32))
    table[[i for i in encoder.tokenizer.all_special_ids if i < len(table)]] = 0
    model = StaticModel(table, encoder.model.config).to(next(encoder.model.parameters()).device).eval()
    name = "static" if counts is None else "static SIF"
    plain = dict(prefix="", head=None, bf16=False, vector_cache=None, sentence=SentenceVector())
    return replace(encoder, model=model, name=name, **plain)  # pyright: ignore[reportArgumentType] - called like one
