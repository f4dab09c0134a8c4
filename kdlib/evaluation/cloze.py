"""What a masked-language head knows: pseudo-perplexity and cloze accuracy, each token guessed from all the others."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Encoding

from kdlib.batching import budget_batches, pad, tokens_per_batch
from kdlib.device import autocast
from kdlib.errors import UserError
from kdlib.evaluation.metrics import share_interval
from kdlib.models.encoder import Encoder
from kdlib.models.masking import mask_id, maskable_tokens
from kdlib.models.mlm_head import perplexity
from kdlib.progress import track

WORD = "LMN"  # letters, marks, numbers: the Unicode categories that words are made of


@dataclass
class Guesses:
    """How well a head guesses tokens that are masked one at a time: arrays with a value for each token.

    Args:
        text: the text of the token.
        loss: negative log probability of the right token, in nats.
        rank: how many tokens the head finds more likely.
        whole: whether the token is a whole word.
        words: for each text, how many words its tokens come from.
    """

    text: np.ndarray
    loss: np.ndarray
    rank: np.ndarray
    whole: np.ndarray
    words: np.ndarray


def mlm_rows(encoder: Encoder, texts: Sequence[str], model_name: str, sentences: int = 50) -> list[dict]:
    """Rows of pseudo-perplexity and cloze accuracy, with model, metric, value, low, high and n.

    pseudo_perplexity (per token) compares models of one tokenizer, pseudo_perplexity_word (per run of non-space) also
    models of several, where unknown tokens, which are not scored, are as rare; their intervals are bootstraps over
    texts. cloze_top1 and cloze_top5 say how often the right word is among the first guesses, for words (runs of
    letters, marks and digits) that are one token, with Wilson intervals; no rows where there is no such word.

    Args:
        encoder: with a masked-language head.
        texts: what is guessed. Each token costs a pass over its text.
        model_name: what the rows call the encoder.
        sentences: how many of the texts are used; the same ones for each encoder.

    Raises:
        UserError: without a head, without a mask token, or for texts without a token to guess.

    References:
        Salazar et al. (2020), *Masked Language Model Scoring*, eq. 3.
    """
    chosen = sorted(np.random.default_rng(0).permutation(len(texts))[:sentences])
    guesses = guess(encoder, [texts[int(i)] for i in chosen])
    losses = np.bincount(guesses.text, guesses.loss, len(chosen))
    found = {}
    for metric, counts in (
        ("pseudo_perplexity", np.bincount(guesses.text, minlength=len(chosen))),
        ("pseudo_perplexity_word", guesses.words),
    ):
        found[metric] = perplexity(np.stack([losses, counts], 1)) | {"n": int(counts.sum())}
    if len(ranks := guesses.rank[guesses.whole]):
        found |= {f"cloze_top{k}": share_interval(ranks < k) | {"n": len(ranks)} for k in (1, 5)}
    return [dict(model=model_name, metric=metric, **values) for metric, values in found.items()]


@torch.inference_mode()
def guess(encoder: Encoder, texts: Sequence[str]) -> Guesses:
    """Mask every token of `texts` but special, unknown and prefix ones, one at a time, and let the head guess it.

    Raises:
        UserError: as `mlm_rows`.
    """
    if encoder.head is None:
        raise UserError(f"{encoder.name} has no masked-language head; conditioning trains one (condition.use=true)")
    mask, pad_id = mask_id(encoder.tokenizer, encoder.name), encoder.tokenizer.pad_token_id
    device = encoder.model.device
    encodings = encoder.tokenize(list(texts))
    maskable = maskable_tokens(encoder.tokenizer, encodings, encoder.prefix)
    places = np.array([(t, at) for t, row in enumerate(maskable) for at in np.flatnonzero(row)], int)
    if not len(places):
        raise UserError(f"{encoder.name}: the texts have no token to guess")
    losses, ranks = np.zeros(len(places)), np.zeros(len(places), int)
    embeddings = encoder.model.get_input_embeddings().weight
    plan = budget_batches([len(encodings[t].ids) for t, _ in places], tokens_per_batch())
    for batch in track(plan, f"{encoder.name}: guessing words"):
        rows = [encodings[t].ids for t, _ in places[batch]]
        ids, attention = (x.to(device) for x in pad(rows, pad_id))  # pyright: ignore[reportArgumentType] - an int
        at = torch.arange(len(batch), device=device), torch.tensor(places[batch, 1], device=device)
        targets = ids[at].unsqueeze(1)
        ids[at] = mask
        with autocast(device, encoder.bf16):
            states = encoder.model(input_ids=ids, attention_mask=attention).last_hidden_state[at]
            logits = encoder.head(states, embeddings).float()
        right = logits.gather(1, targets)
        losses[batch] = (logits.logsumexp(1) - right.squeeze(1)).cpu().numpy()
        ranks[batch] = (logits > right).sum(1).cpu().numpy()
    read = [(encoder.prefix + text, e, row) for text, e, row in zip(texts, encodings, maskable, strict=True)]
    whole, words = [_whole_words(*one) for one in read], [_count_words(*one) for one in read]
    return Guesses(places[:, 0], losses, ranks, np.array([whole[t][at] for t, at in places]), np.array(words))


def _whole_words(text: str, encoding: Encoding, maskable: np.ndarray) -> np.ndarray:
    """Which maskable tokens are a whole word of the text: letters, marks and digits, with none on either side."""
    part = [unicodedata.category(char)[0] in WORD for char in text]
    whole = np.zeros(len(maskable), bool)
    for at in np.flatnonzero(maskable):
        start, end = encoding.offsets[at]
        while start < end and text[start].isspace():  # some tokenizers include the space before a word
            start += 1
        inside = start < end and all(part[start:end])
        whole[at] = inside and not (start and part[start - 1]) and not (end < len(text) and part[end])
    return whole


def _count_words(text: str, encoding: Encoding, maskable: np.ndarray) -> int:
    """Runs of non-space that the maskable tokens come from."""
    word = np.cumsum([not char.isspace() and (i == 0 or text[i - 1].isspace()) for i, char in enumerate(text)])
    return len({int(word[encoding.offsets[at][1] - 1]) for at in np.flatnonzero(maskable)})
