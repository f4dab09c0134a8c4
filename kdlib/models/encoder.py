"""An encoder: a model and its tokenizer, and the vectors they give to texts and words."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Encoding, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kdlib.batching import budget_batches, model_inputs, tokens_per_batch
from kdlib.device import autocast
from kdlib.models.build import save_model
from kdlib.models.families import FAMILIES
from kdlib.models.mlm_head import MaskedHead, save_head
from kdlib.models.safetensors_files import HEAD_FILE
from kdlib.models.sentence import SentenceVector, save_sentence
from kdlib.models.tokenizer_files import save_tokenizer
from kdlib.models.vector_cache import VectorCache
from kdlib.progress import track

NORM_EPS = 1e-6  # of the norm of states between layers


@dataclass
class Encoder:
    """A model with its tokenizer.

    Attributes:
        model: a base model (AutoModel) in eval mode.
        prefix: text before every text.
        max_length: tokens per text; longer texts are truncated.
        head: the trained masked-language head, where there is one.
        vector_cache: the vectors of texts already read, where they are kept.
        sentence: how a text's vector is made from its states.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    prefix: str = ""
    max_length: int = 128
    bf16: bool = False
    head: MaskedHead | None = None
    vector_cache: VectorCache | None = None
    sentence: SentenceVector = field(default_factory=SentenceVector)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.model.config.num_hidden_layers

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.model.config.hidden_size

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def megabytes(self) -> float:
        """Size of the weights, in 32 bits unless a subclass knows better."""
        return self.parameters * 4 / 1e6

    @property
    def token_types(self) -> bool:
        """Whether the model distinguishes the texts of a pair by token types, as BERT does.

        Two rows of token types are not enough: some such models were trained with XLM-R's tokenizer, on one type.
        """
        rows = getattr(self.model.config, "type_vocab_size", 0)
        return rows > 1 and "token_type_ids" in self.tokenizer.model_input_names

    def tokenize(self, texts: Sequence) -> list[Encoding]:
        """Tokenise texts (str), pairs (str, str) or word lists, with the prefix, truncated at max_length."""
        if not texts:
            return []
        if isinstance(texts[0], tuple):
            arguments = dict(text=[self.prefix + a for a, _ in texts], text_pair=[b for _, b in texts])
        elif isinstance(texts[0], list):
            arguments = dict(text=[self.prefix.split() + words for words in texts], is_split_into_words=True)
        else:
            arguments = dict(text=[self.prefix + text for text in texts])
        with _spaced(self.tokenizer) if isinstance(texts[0], list) else contextlib.nullcontext():
            return self.tokenizer(**arguments, truncation=True, max_length=self.max_length).encodings

    def to(self, device: torch.device | str) -> "Encoder":
        """Move model and head to a device; returns the encoder itself."""
        self.model.to(device)
        self.sentence.to(device)
        if self.head is not None:
            self.head.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder that transformers 5 and 4.4x load, and sentence-transformers, too.

        The head, if any, is beside it.
        """
        save_model(self.model, folder)
        save_tokenizer(self.tokenizer, folder)
        save_sentence(self.sentence, folder, self.hidden, self.max_length, self.prefix)
        if self.head is not None:
            save_head(self.head, Path(folder) / HEAD_FILE)


@contextlib.contextmanager
def _spaced(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Tokenise word lists as the model expects them.

    In byte-level BPE a word begins with the space before it; words of a list have none unless add_prefix_space is on.
    """
    step = tokenizer.backend_tokenizer.pre_tokenizer
    steps = list(step) if isinstance(step, pre_tokenizers.Sequence) else [step]
    bare = [step for step in steps if isinstance(step, pre_tokenizers.ByteLevel) and not step.add_prefix_space]
    for step in bare:
        step.add_prefix_space = True
    try:
        yield
    finally:
        for step in bare:
            step.add_prefix_space = False


def layer_states(model: PreTrainedModel, **inputs: torch.Tensor) -> Any:
    """The hidden states of all layers, 0 = embeddings: [batch, tokens, hidden] each.

    In families whose layers begin with a norm, states between layers have no norm yet: a few dimensions are hundreds of
    times as large as others. These states are normalised here, without gains, so that they can be compared. The last
    state has the model's own norm.
    """
    states = model(**inputs, output_hidden_states=True).hidden_states
    kind = FAMILIES[model.config.model_type].states if model.config.model_type in FAMILIES else ""
    if not kind or isinstance(states, dict):  # ONNX files have the last state alone
        return states
    normalise = F.layer_norm if kind == "layer" else F.rms_norm
    return tuple(normalise(state, state.shape[-1:], eps=NORM_EPS) for state in states[:-1]) + states[-1:]


@torch.inference_mode()
def text_vectors(encoder: Encoder, texts: Sequence, layers: Sequence[int] | None = None, label: str = "") -> np.ndarray:
    """Vectors of texts.

    Args:
        encoder: the model.
        texts: texts, pairs or word lists.
        layers: pooled states of these layers: 0 = embeddings, n = after layer n. None: the encoder's sentence vectors,
            which are the pooled states of the last layer after its dense layers, if it has some.
        label: name of the progress bar; "" shows none.

    Returns:
        float32 [texts, layers, hidden]; where `layers` is None [texts, 1, width].
    """
    if layers is None:
        last = text_vectors(encoder, texts, [encoder.layers], label)
        if encoder.sentence.plain:
            return last
        device = next(encoder.model.parameters()).device
        return encoder.sentence.to(device).finish(torch.from_numpy(last).to(device)).cpu().numpy()
    layers = list(layers)
    encodings = encoder.tokenize(list(texts))

    def pooled(places: Sequence[int], layers: Sequence[int]) -> np.ndarray:
        out = np.empty((len(places), len(layers), encoder.hidden), np.float32)
        for batch, states, mask in run_batches(encoder, [encodings[i] for i in places], label):
            for k, layer in enumerate(layers):
                out[batch, k] = encoder.sentence.pool(states[layer].float(), mask).cpu().numpy()
        return out

    if encoder.vector_cache is None:
        return pooled(range(len(encodings)), layers)
    shape = (encoder.layers + 1, encoder.hidden)
    return encoder.vector_cache.vectors([encoding.ids for encoding in encodings], layers, shape, pooled)


@torch.inference_mode()
def word_vectors(
    encoder: Encoder, texts: Sequence[list[str]], layers: Sequence[int] | None = None, label: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """The state of every word's first token.

    Args:
        encoder: the model.
        texts: lists of words.
        layers: 0 = embeddings, n = after layer n; default the last one.
        label: name of the progress bar; "" shows none.

    Returns:
        Vectors float32 [words, layers, hidden], and int [words, 2]: text number and word number. Truncated words are
            left
        out.
    """
    layers = [encoder.layers] if layers is None else list(layers)
    encodings = encoder.tokenize(list(texts))
    skip = len(encoder.prefix.split())
    firsts = [first_tokens(encoding.word_ids, skip) for encoding in encodings]
    places = np.array([(t, word) for t, words in enumerate(firsts) for word, _ in words], int).reshape(-1, 2)
    rows, starts = [encoding.ids for encoding in encodings], [[at for _, at in words] for words in firsts]

    def states_of(some: Sequence[int]) -> np.ndarray:
        ends = np.cumsum([0] + [len(starts[i]) for i in some])
        out = np.empty((ends[-1], len(layers), encoder.hidden), np.float32)
        for batch, states, _ in run_batches(encoder, [encodings[i] for i in some], label):
            at = [starts[some[b]] for b in batch]
            lines = torch.tensor([r for r, words in enumerate(at) for _ in words], dtype=torch.long)
            columns = torch.tensor([column for words in at for column in words], dtype=torch.long)
            target = np.concatenate([np.arange(ends[b], ends[b + 1]) for b in batch])
            for k, layer in enumerate(layers):
                out[target, k] = states[layer][lines, columns].float().cpu().numpy()
        return out

    if encoder.vector_cache is not None and layers == [encoder.layers]:
        return encoder.vector_cache.words(rows, starts, lambda some: states_of(some)[:, 0])[:, None], places
    out = states_of(range(len(rows)))
    if encoder.vector_cache is not None and layers[-1] == encoder.layers:
        encoder.vector_cache.keep_words(rows, starts, out[:, -1])
    return out, places


def first_tokens(word_ids: Sequence[int | None], skip: int) -> list[tuple[int, int]]:
    """(word, token) of the first token of every word. The first `skip` words, those of the prefix, do not count."""
    seen: dict[int, int] = {}
    for at, word in enumerate(word_ids):
        if word is not None and word >= skip:
            seen.setdefault(word - skip, at)
    return list(seen.items())


def run_batches(encoder: Encoder, encodings: list[Encoding], label: str):
    """Forward passes over length-sorted batches: yields indices, all states and attention mask."""
    device = next(encoder.model.parameters()).device
    ids = [e.ids for e in encodings]
    types = [e.type_ids for e in encodings] if encoder.token_types else None
    batches = budget_batches([len(row) for row in ids], tokens_per_batch())
    for batch in track(batches, label or f"{encoder.name}: encoding"):
        chosen = types and [types[i] for i in batch]
        inputs = model_inputs([ids[i] for i in batch], chosen, encoder.tokenizer.pad_token_id)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with autocast(device, encoder.bf16):
            states = layer_states(encoder.model, **inputs)
        yield batch, states, inputs["attention_mask"]
