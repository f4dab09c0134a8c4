"""Tiny models and a tokenizer, made in a moment, for tests that need real ones."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from kdlib import config
from kdlib.data.corpus import load_corpus
from kdlib.data.tasks import Split, Task
from kdlib.models.encoder import Encoder

WORDS = (
    "ang ng sa mga ay na at si ako ikaw bata aso pusa bahay araw gabi ulan tubig "
    "kumain natulog tumakbo maganda malaki maliit"
).split()


def tokenizer():
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def encoder(layers=4, hidden=32, seed=0, attn="sdpa", **extra):
    torch.manual_seed(seed)
    tok = tokenizer()
    config = BertConfig(
        vocab_size=len(tok), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, attn_implementation=attn,
    )  # fmt: skip
    model = BertModel(config)
    for parameter in model.parameters():  # larger than the default start, so that layers do something
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return Encoder(model.eval(), tok, "tiny", max_length=32, **extra)


def texts(count, seed=0, length=6):
    import random

    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, length))) for _ in range(count)]


def corpus_of(profile, cache=None):
    """The corpus of a profile."""
    return load_corpus(profile.corpus, profile.target, profile.seed, cache)


SPEC = config.Benchmark(
    seeds=[0, 1, 2], finetune_epochs=12.0, finetune_rate=5e-3, finetune_batch=16, bootstrap=100, latency_runs=3
)


def task(kind):
    """A task of a kind that a tiny encoder can learn: 100 rows to train on, 40 to test."""
    rows = texts(140)
    labels, targets = ["short", "long"], [int(len(text.split()) > 3) for text in rows]
    if kind == "tokens":
        rows, labels = [text.split() for text in rows], ["O", "B-ANIMAL"]
        targets = [[int(word in ("aso", "pusa")) for word in words] for words in rows]
    elif kind == "multilabel":
        labels = ["aso", "ang"]
        targets = [[int(word in text.split()) for word in labels] for text in rows]
    elif kind == "pair":
        rows, labels = list(zip(rows, texts(140, 5, 3))), ["no", "yes"]
    return Task(f"{kind} task", kind, labels, Split(rows[:100], targets[:100]), Split(rows[100:], targets[100:]))
