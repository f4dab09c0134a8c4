"""The data a student is distilled on: tokens, masks, and the teacher's cached states."""

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdlib import config, distributed
from kdlib.batching import BudgetSampler, pad
from kdlib.data.lazy import Lazy
from kdlib.distillation.objectives import OBJECTIVES, RequiredOutputs
from kdlib.distillation.student_init import layer_map
from kdlib.distillation.teacher_cache import TeacherStates, teacher_states
from kdlib.errors import UserError
from kdlib.models import token_store
from kdlib.models.encoder import Encoder
from kdlib.models.masking import mask_tokens, seeded_generator
from kdlib.models.token_store import Ragged


class Pairs(NamedTuple):
    """Texts with their translations, and the model that reads those: the teacher with its whole vocabulary."""

    texts: Sequence[str]
    translations: Sequence[str]
    reader: Encoder


@dataclass
class Translations:
    """The teacher's last states of the translations that some texts have.

    Attributes:
        numbers: int [texts], the translation of each text; -1 for none.
        lengths: int [translations], their tokens.
        states: of the translations, one layer.
    """

    numbers: np.ndarray
    lengths: np.ndarray
    states: TeacherStates
    temporary: tempfile.TemporaryDirectory | None = field(default=None, compare=False, repr=False)  # goes with it

    def part(self, places: Sequence[int]) -> "Translations":
        """Those of some of the texts."""
        return replace(self, numbers=self.numbers[np.asarray(places, int)])

    def batch(self, texts: Sequence[int]) -> dict[str, torch.Tensor]:
        """`translation` and `translated` of `ModelOutputs` for some texts, the states in float16."""
        numbers = self.numbers[np.asarray(texts, int)]
        lengths = np.where(numbers < 0, 0, self.lengths[numbers])
        (states,) = self.states.layers.values()
        out = np.zeros((len(texts), max(1, lengths.max()), states.shape[1]), np.float16)
        for row, start, length in zip(out, self.states.starts[numbers], lengths):
            row[:length] = states[start : start + length]
        mask = np.arange(out.shape[1]) < lengths[:, None]
        return {"translation": torch.from_numpy(out), "translated": torch.from_numpy(mask).long()}


@dataclass
class TokenizedCorpus:
    """A torch data set of tokenised texts and, where cached, the teacher's states for them.

    Attributes:
        ids: int32 [tokens] of each text.
        maskable: bool [tokens] of each text, which tokens masked-language objectives may mask; None without such.
    """

    ids: Ragged
    pad_id: int
    maskable: Ragged | None = None
    cached: TeacherStates | None = None
    translations: Translations | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> int:
        return i

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text: int32 [texts]."""
        return self.ids.lengths

    def part(self, places: Sequence[int]) -> "TokenizedCorpus":
        """Some of the texts, sharing the cached states."""
        found = (self.ids, self.maskable, self.cached, self.translations)
        ids, maskable, cached, translations = (one and one.part(places) for one in found)
        return TokenizedCorpus(ids, self.pad_id, maskable, cached, translations)

    def live(self) -> "TokenizedCorpus":
        """The same texts without cached states: the teacher runs at every step."""
        return replace(self, cached=None)

    def collate(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """Pad texts.

        Returns:
            input_ids and attention_mask, int64 [batch, tokens], and cached states of each layer, named "layer 3".
        """
        rows = [self.ids[i] for i in batch]
        ids, mask = pad(rows, self.pad_id)
        features = {"input_ids": ids, "attention_mask": mask}
        if self.cached is not None:
            lengths = [len(row) for row in rows]
            for layer in self.cached.layers:
                features[f"layer {layer}"] = self.cached.batch(layer, batch, lengths)
        return features


@dataclass
class Masking:
    """Masks the tokens of batches. A text has the same masks whenever an epoch is repeated, so a run can resume."""

    mask_id: int
    rows: int
    share: float
    seed: int

    def collate(
        self, texts: TokenizedCorpus, sampler: BudgetSampler, batch: Sequence[int], rows: slice = slice(None)
    ) -> dict[str, torch.Tensor]:
        """Pad and mask texts.

        Returns:
            As `TokenizedCorpus.collate`, with masked input_ids; masked, int64 [masked tokens], their positions in
            the flattened batch; and targets, the tokens before masking. `rows` selects rows of the masked batch.
        """
        features = texts.collate(batch)
        ids = features["input_ids"]
        maskable = pad([texts.maskable[i] for i in batch], 0)[0].bool()
        generator = seeded_generator(f"{self.seed}-{sampler.epoch}-{list(batch)}")
        hidden, chosen = mask_tokens(ids, maskable, self.mask_id, self.rows, self.share, generator=generator)
        ids, places = ids[rows].flatten(), chosen[rows].flatten().nonzero().squeeze(1)
        mask = features["attention_mask"][rows]
        return {"input_ids": hidden[rows], "attention_mask": mask, "masked": places, "targets": ids[places]}


@dataclass
class RankCollator:
    """Gives each of several processes every n-th row of a batch."""

    texts: TokenizedCorpus
    sampler: BudgetSampler
    masking: Masking | None

    def collate(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """As `TokenizedCorpus.collate` or `Masking.collate`, with `Translations.batch` where a text has one.

        A process without a row gets one that does not count: then `counted`, int64 [1, tokens], is the mask of the
        losses, all 0.
        """
        rows = slice(distributed.rank(), None, distributed.world_size())
        spare = not batch[rows]
        if spare:
            rows = slice(0, 1)
        if self.masking is None:
            features = self.texts.collate(batch[rows])
        else:
            features = self.masking.collate(self.texts, self.sampler, batch, rows)
        translations = self.texts.translations
        if translations is not None and (translations.numbers[batch] >= 0).any():  # the same in every process
            features |= translations.batch(batch[rows])
        if spare:
            features["counted"] = torch.zeros_like(features["attention_mask"])
            features |= {name: features[name][:0] for name in ("masked", "targets") if name in features}
        return features


def tokenise(
    encoder: Encoder, texts: Iterable[str], masks: bool = False, cache_root: Path | None = None
) -> TokenizedCorpus:
    """Tokenise every text with the prefix, from the cache where there is one. `masks`: also what may be masked."""
    found = token_store.tokenise(encoder, texts, ["maskable"] * masks, cache_root)
    return TokenizedCorpus(found["ids"], encoder.tokenizer.pad_token_id, found.get("maskable"))


def prepare(
    encoder: Encoder,
    texts: Sequence[str],
    spec: config.Distill,
    cache_root: Path | None,
    depth: int,
    pairs: Pairs | None = None,
) -> TokenizedCorpus:
    """Tokenise `texts` and get the teacher's states that a student of `depth` layers is compared with, from the cache.

    The teacher runs live where the profile or its size limit forbids a cache, or an objective needs uncached outputs.
    Where objectives compare with translations, pairs replace some of the texts, see `mixed`; the teacher reads the
    translations now, once.
    """
    needs, numbers = RequiredOutputs.of(spec.objectives), None
    if needs.translation:
        if pairs is None or not pairs.texts:
            raise UserError("objectives crosslingual and transport need texts with translations")
        texts, numbers = mixed(texts, pairs.texts, spec)
    tokenised = tokenise(encoder, texts, needs.masked, cache_root)
    if not len(tokenised):
        raise UserError("distillation: no texts")
    if numbers is not None:
        tokenised = replace(tokenised, translations=translated(pairs, numbers, spec, cache_root))
    return with_states(tokenised, encoder, spec, cache_root, depth)


def mixed(texts: Sequence[str], pairs: Sequence[str], spec: config.Distill) -> tuple[Sequence[str], np.ndarray]:
    """As many texts as before, with those of pairs among them, so that objectives take equally many steps.

    Returns:
        The texts, and the number of the pair of each, -1 for none. Where all objectives need translations, these are
        the pairs, in turn as often as needed. Otherwise the pairs take the place of the last texts, of half at most.
    """
    count = len(texts)
    if all(OBJECTIVES[name].needs.translation for name, weight in spec.objectives.items() if weight):
        numbers = np.arange(count) % len(pairs)
        return Lazy(lambda: (pairs[i] for i in numbers), count), numbers
    replaced = min(len(pairs), max(1, count // 2))
    numbers = np.concatenate([np.full(count - replaced, -1), np.arange(replaced)])
    return Lazy(lambda: itertools.chain(itertools.islice(texts, count - replaced), pairs[:replaced]), count), numbers


def translated(pairs: Pairs, numbers: np.ndarray, spec: config.Distill, cache_root: Path | None) -> Translations:
    """The teacher's last states of the translations of texts; `numbers` are the texts' pairs, -1 for none."""
    temporary = None if cache_root else tempfile.TemporaryDirectory(prefix="kdlib-")
    root, reader = cache_root or Path(temporary.name), pairs.reader
    ids = tokenise(reader, pairs.translations[: numbers.max() + 1], cache_root=cache_root).ids
    states = teacher_states(root, reader, ids, [reader.layers], spec.cache_gigabytes)
    if states is None:
        raise UserError("the teacher's states of the translations do not fit; set distill.cache_gigabytes higher")
    return Translations(numbers, ids.lengths, states, temporary)


def with_states(
    texts: TokenizedCorpus, encoder: Encoder, spec: config.Distill, cache_root: Path | None, depth: int
) -> TokenizedCorpus:
    """The same texts with the states that `spec` needs; see `prepare`. Cached layers are reused."""
    needs = RequiredOutputs.of(spec.objectives)
    if not spec.cache or cache_root is None or spec.teacher_noise or not needs.cacheable:
        return texts.live()
    layers = [0] * needs.embedded + compared_layers(spec, depth, encoder.layers)[1]
    return replace(texts, cached=teacher_states(cache_root, encoder, texts.ids, layers, spec.cache_gigabytes))


def training_size(train: TokenizedCorpus, spec: config.Distill, seed: int = 0) -> tuple[int, int]:
    """Steps and tokens of a whole training on `train`."""
    batches = len(BudgetSampler(train.lengths, spec.batch_tokens, seed))
    return int(batches * spec.epochs) or 1, round(train.tokens * spec.epochs)


def compared_layers(spec: config.Distill, depth: int, teacher_depth: int) -> tuple[list[int], list[int]]:
    """The layers of student and teacher that are compared: those of `spec.layers`, or the last where that is enough."""
    if not RequiredOutputs.of(spec.objectives).layers:
        return [depth], [teacher_depth]
    return list(range(1, depth + 1)), layer_map(spec.layers, depth, teacher_depth, "distill.layers")
