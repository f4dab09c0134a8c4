"""An encoder: a model and its tokenizer, and the vectors that they give texts and words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kdlib.batches import budget_batches
from kdlib.device import autocast
from kdlib.mlm import MaskedHead
from kdlib.progress import track

TOKENS_PER_BATCH = 4096


@dataclass
class Encoder:
    """model: a base model (AutoModel) in eval mode; prefix: put before every text; max_length: in tokens; head: the
    masked-language head, where the model has one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    prefix: str = ""
    max_length: int = 128
    bf16: bool = False
    head: MaskedHead | None = None

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def hidden(self) -> int:
        return self.model.config.hidden_size

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def tokenize(self, texts: Sequence) -> list:
        """Encodings of texts (str), pairs (str, str) or word lists, with the prefix, cut at max_length."""
        if not texts:
            return []
        if isinstance(texts[0], tuple):
            arguments = dict(text=[self.prefix + a for a, _ in texts], text_pair=[b for _, b in texts])
        elif isinstance(texts[0], list):
            arguments = dict(text=[self.prefix.split() + words for words in texts], is_split_into_words=True)
        else:
            arguments = dict(text=[self.prefix + text for text in texts])
        return self.tokenizer(**arguments, truncation=True, max_length=self.max_length).encodings

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder that transformers 5 and 4.4x load alike."""
        self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer without the truncation that calls left on, under a class name that transformers 4 knows too."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [batch, longest] and attention mask of the same shape, both int64."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = torch.as_tensor(row)
        mask[r, : len(row)] = 1
    return ids, mask


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the states over real tokens: [batch, tokens, hidden], [batch, tokens] -> [batch, hidden]."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


@torch.inference_mode()
def text_vectors(encoder: Encoder, texts: Sequence, layers: Sequence[int] | None = None, label: str = "") -> np.ndarray:
    """Mean-pooled hidden states: float32 [texts, layers, hidden].

    layers: which (0 = embeddings, n = after layer n); default the last only.
    """
    layers = [encoder.layers] if layers is None else list(layers)
    encodings = encoder.tokenize(list(texts))
    out = np.empty((len(encodings), len(layers), encoder.hidden), np.float32)
    for batch, states, mask in _run(encoder, [e.ids for e in encodings], label):
        for k, layer in enumerate(layers):
            out[batch, k] = mean_pool(states[layer].float(), mask).cpu().numpy()
    return out


@torch.inference_mode()
def word_vectors(
    encoder: Encoder, texts: Sequence[list[str]], layers: Sequence[int] | None = None, label: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """The state of every word's first token.

    Returns vectors float32 [words, layers, hidden] and places int [words, 2]: which text, which word of it. Words cut
    off by max_length are left out.
    """
    layers = [encoder.layers] if layers is None else list(layers)
    encodings = encoder.tokenize(list(texts))
    skip = len(encoder.prefix.split())
    firsts = [first_tokens(encoding.word_ids, skip) for encoding in encodings]
    places = np.array([(t, word) for t, words in enumerate(firsts) for word, _ in words], int).reshape(-1, 2)
    starts = np.cumsum([0] + [len(words) for words in firsts])
    out = np.empty((len(places), len(layers), encoder.hidden), np.float32)
    for batch, states, _ in _run(encoder, [e.ids for e in encodings], label):
        rows = torch.tensor([r for r, t in enumerate(batch) for _ in firsts[t]], dtype=torch.long)
        columns = torch.tensor([at for t in batch for _, at in firsts[t]], dtype=torch.long)
        target = np.concatenate([np.arange(starts[t], starts[t + 1]) for t in batch])
        for k, layer in enumerate(layers):
            out[target, k] = states[layer][rows, columns].float().cpu().numpy()
    return out, places


def first_tokens(word_ids: Sequence[int | None], skip: int) -> list[tuple[int, int]]:
    """(word, token) of the first token of every word, words counted without the first `skip` (the prefix)."""
    seen: dict[int, int] = {}
    for at, word in enumerate(word_ids):
        if word is not None and word >= skip:
            seen.setdefault(word - skip, at)
    return list(seen.items())


def _run(encoder: Encoder, ids: list[list[int]], label: str):
    """Forward passes over length-sorted batches: yields indices, hidden states of all layers, attention mask."""
    device = next(encoder.model.parameters()).device
    pad_id = encoder.tokenizer.pad_token_id
    batches = budget_batches([len(row) for row in ids], TOKENS_PER_BATCH)
    for batch in track(batches, label or f"{encoder.name}: encoding"):
        tokens, mask = pad([ids[i] for i in batch], pad_id)
        tokens, mask = tokens.to(device), mask.to(device)
        with autocast(device, encoder.bf16):
            output = encoder.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        yield batch, output.hidden_states, mask
