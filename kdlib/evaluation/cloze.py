"""What a masked-language head knows: pseudo-perplexity and cloze accuracy, every token guessed from all the others."""

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

SENTENCES = 50
WORD = "LMN"  # letters, marks, numbers: the Unicode categories that words are made of


@dataclass
class Guesses:
    """What the head says of tokens that were masked one at a time, each an array with a value for every place.

    text, token: which; loss: negative log probability of the right token, in nats; rank: how many tokens were held to
    be likelier; whole: whether the token is a whole word. words: of each text, how many words the tokens come from.
    """

    text: np.ndarray
    token: np.ndarray
    loss: np.ndarray
    rank: np.ndarray
    whole: np.ndarray
    words: np.ndarray


def pseudo_perplexity(encoder: Encoder, texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """How well texts are predicted (Salazar et al. 2020, eq. 3), by token and by word; less is better.

    Every token is masked in turn; exp of the mean negative log probability of what was there. Per token it compares
    models of one tokenizer; per word (runs of non-space) it compares tokenizers too, where their unknown tokens, which
    are not scored, are as rare. Returns value, low, high (bootstrap over texts) and n (tokens, words) under
    "pseudo_perplexity" and "pseudo_perplexity_word".
    Raises UserError without a head, without a mask token, or for texts without a token to guess.
    """
    return _pseudo_perplexity(guess(encoder, texts))


def cloze(encoder: Encoder, texts: Sequence[str], limit: int | None = None) -> dict[str, dict[str, float]]:
    """How often a masked word is guessed: value, low, high (Wilson 95%) and n under "cloze_top1" and "cloze_top5".

    The words (runs of letters, marks and digits) that are one token of the tokenizer are masked one at a time. limit:
    ask for so many of them at most, drawn evenly from all. Empty where no text has such a word; errors as above.
    """
    return _cloze(guess(encoder, texts, only_words=True, limit=limit))


def mlm_rows(encoder: Encoder, texts: Sequence[str], model_name: str, sentences: int = SENTENCES) -> list[dict]:
    """Rows of model, metric (pseudo_perplexity, pseudo_perplexity_word, cloze_top1, cloze_top5), value, low, high, n.

    sentences: how many of the texts are used, the same ones for every encoder. Each token costs a pass over its text.
    """
    chosen = np.random.default_rng(0).permutation(len(texts))[:sentences]
    guesses = guess(encoder, [texts[i] for i in sorted(chosen)])
    found = _pseudo_perplexity(guesses) | _cloze(guesses)
    return [dict(model=model_name, metric=metric, **values) for metric, values in found.items()]


@torch.inference_mode()
def guess(encoder: Encoder, texts: Sequence[str], only_words: bool = False, limit: int | None = None) -> Guesses:
    """Mask the tokens of `texts` (or only whole words; at most `limit` of them) one at a time and see what the head
    makes of each."""
    if encoder.head is None:
        raise UserError(f"{encoder.name} has no masked-language head; conditioning trains one (condition.use=true)")
    mask, pad_id = mask_id(encoder.tokenizer, encoder.name), encoder.tokenizer.pad_token_id
    device = encoder.model.device
    encodings = encoder.tokenize(list(texts))
    maskable = maskable_tokens(encoder.tokenizer, encodings, encoder.prefix)
    whole = [_whole_words(encoder.prefix + text, e, m) for text, e, m in zip(texts, encodings, maskable)]
    places = np.array(
        [(t, at) for t, row in enumerate(whole if only_words else maskable) for at in np.flatnonzero(row)]
    )
    if not len(places) and not only_words:
        raise UserError(f"{encoder.name}: the texts have no token to guess")
    places = places.reshape(-1, 2).astype(int)
    if limit is not None and len(places) > limit:
        places = places[np.sort(np.random.default_rng(0).permutation(len(places))[:limit])]
    losses, ranks = np.zeros(len(places)), np.zeros(len(places), int)
    embeddings = encoder.model.get_input_embeddings().weight
    plan = budget_batches([len(encodings[t].ids) for t, _ in places], tokens_per_batch())
    for batch in track(plan, f"{encoder.name}: guessing words"):
        ids, attention = (x.to(device) for x in pad([encodings[t].ids for t, _ in places[batch]], pad_id))
        rows, columns = torch.arange(len(batch), device=device), torch.tensor(places[batch, 1], device=device)
        targets = ids[rows, columns].unsqueeze(1)
        ids[rows, columns] = mask
        with autocast(device, encoder.bf16):
            states = encoder.model(input_ids=ids, attention_mask=attention).last_hidden_state[rows, columns]
            logits = encoder.head(states, embeddings).float()
        right = logits.gather(1, targets)
        losses[batch] = (logits.logsumexp(1) - right.squeeze(1)).cpu().numpy()
        ranks[batch] = (logits > right).sum(1).cpu().numpy()
    words = [_count_words(encoder.prefix + text, e, m) for text, e, m in zip(texts, encodings, maskable)]
    kind = np.array([whole[t][at] for t, at in places], bool)
    return Guesses(places[:, 0], places[:, 1], losses, ranks, kind, np.array(words, int))


def _pseudo_perplexity(guesses: Guesses) -> dict[str, dict[str, float]]:
    texts = len(guesses.words)
    losses = np.bincount(guesses.text, guesses.loss, texts)
    found = {}
    for metric, counts in (
        ("pseudo_perplexity", np.bincount(guesses.text, minlength=texts)),
        ("pseudo_perplexity_word", guesses.words),
    ):
        found[metric] = perplexity(np.stack([losses, counts], 1)) | {"n": int(counts.sum())}
    return found


def _cloze(guesses: Guesses) -> dict[str, dict[str, float]]:
    ranks = guesses.rank[guesses.whole]
    if not len(ranks):
        return {}
    return {f"cloze_top{k}": share_interval(ranks < k) | {"n": len(ranks)} for k in (1, 5)}


def _whole_words(text: str, encoding: Encoding, maskable: np.ndarray) -> np.ndarray:
    """Which maskable tokens are a whole word of the text: letters, marks and digits, and none on either side."""
    part = [unicodedata.category(char)[0] in WORD for char in text]
    whole = np.zeros(len(maskable), bool)
    for at in np.flatnonzero(maskable):
        start, end = encoding.offsets[at]
        while start < end and text[start].isspace():  # some tokenizers count the space before a word in
            start += 1
        inside = start < end and all(part[start:end])
        whole[at] = inside and not (start and part[start - 1]) and not (end < len(text) and part[end])
    return whole


def _count_words(text: str, encoding: Encoding, maskable: np.ndarray) -> int:
    """Runs of non-space that the maskable tokens come from."""
    word = np.cumsum([not char.isspace() and (i == 0 or text[i - 1].isspace()) for i, char in enumerate(text)])
    return len({int(word[encoding.offsets[at][1] - 1]) for at in np.flatnonzero(maskable)})
