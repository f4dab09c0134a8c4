"""What a student is distilled on: tokens, masks, and the teacher's cached states."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kdlib import config, distributed
from kdlib.batching import BudgetSampler, pad
from kdlib.distillation.objectives import RequiredOutputs
from kdlib.distillation.student_init import layer_map
from kdlib.distillation.teacher_cache import TeacherStates, teacher_states
from kdlib.errors import UserError
from kdlib.models import token_store
from kdlib.models.encoder import Encoder
from kdlib.models.masking import mask_tokens
from kdlib.models.token_store import Ragged


@dataclass
class TokenizedCorpus:
    """Tokenised texts and, where cached, the teacher's states for them. A torch data set of places in itself.

    ids: int32 [tokens] of each text; maskable: bool [tokens] of each, where masked-language objectives may mask, unless
    none is to.
    """

    ids: Ragged
    pad_id: int
    maskable: Ragged | None = None
    cached: TeacherStates | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> int:
        return i

    @property
    def tokens(self) -> int:
        """How many tokens all texts have."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text: int32 [texts]."""
        return self.ids.lengths

    def part(self, places: Sequence[int]) -> "TokenizedCorpus":
        """Some of the texts, sharing the cached states."""
        ids, maskable, cached = (found and found.part(places) for found in (self.ids, self.maskable, self.cached))
        return TokenizedCorpus(ids, self.pad_id, maskable, cached)

    def live(self) -> "TokenizedCorpus":
        """The same texts without cached states: the teacher runs at every step."""
        return replace(self, cached=None)

    def collate(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask, int64 [batch, tokens].

        If cached, for each layer its states, named "layer 3": float16 [batch, tokens, hidden].
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
    """Masks the tokens of batches, the same tokens for the same texts in the same epoch.

    So a resumed run sees what it would have seen. mask_id, rows, share: as `masking.mask_tokens` has them.
    """

    mask_id: int
    rows: int
    share: float
    seed: int

    def collate(
        self, texts: TokenizedCorpus, sampler: BudgetSampler, batch: Sequence[int], rows: slice = slice(None)
    ) -> dict[str, torch.Tensor]:
        """As `Texts.collate`, with masked input_ids.

        And masked, int64 [masked tokens], their places in the flattened batch, and targets, the tokens that
        were there. rows: of the masked batch, those that are wanted.
        """
        features = texts.collate(batch)
        ids = features["input_ids"]
        maskable = pad([texts.maskable[i] for i in batch], 0)[0].bool()
        name = f"{self.seed}-{sampler.epoch}-{list(batch)}"
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        generator = torch.Generator().manual_seed(number)
        hidden, chosen = mask_tokens(ids, maskable, self.mask_id, self.rows, self.share, generator=generator)
        ids, places = ids[rows].flatten(), chosen[rows].flatten().nonzero().squeeze(1)
        mask = features["attention_mask"][rows]
        return {"input_ids": hidden[rows], "attention_mask": mask, "masked": places, "targets": ids[places]}


@dataclass
class RankCollator:
    """Gives each of several processes its rows of every batch, every n-th of them."""

    texts: TokenizedCorpus
    sampler: BudgetSampler
    masking: Masking | None

    def collate(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """As `Texts.collate` or `Masking.collate`.

        A process for which a batch has no row gets one that counts for nothing: counted, int64 [1, tokens], is
        the mask that losses then go by, all 0.
        """
        rows = slice(distributed.rank(), None, distributed.world_size())
        spare = not batch[rows]
        if spare:
            rows = slice(0, 1)
        if self.masking is None:
            features = self.texts.collate(batch[rows])
        else:
            features = self.masking.collate(self.texts, self.sampler, batch, rows)
        if spare:
            features["counted"] = torch.zeros_like(features["attention_mask"])
            features |= {name: features[name][:0] for name in ("masked", "targets") if name in features}
        return features


def tokenise(
    encoder: Encoder, texts: Iterable[str], masks: bool = False, cache_root: Path | None = None
) -> TokenizedCorpus:
    """Token ids of every text, with the prefix, without the teacher's states; from the cache, where there is one.

    masks: also where they may be masked, which takes as long again.
    """
    found = token_store.tokenise(encoder, texts, ["maskable"] * masks, cache_root)
    return TokenizedCorpus(found["ids"], encoder.tokenizer.pad_token_id, found.get("maskable"))


def prepare(
    encoder: Encoder, texts: Iterable[str], spec: config.Distill, cache_root: Path | None, depth: int
) -> TokenizedCorpus:
    """Tokenise `texts` and get the teacher's states that a student of `depth` layers is compared with, from the cache.

    The teacher runs live, at every step, where the profile or its size budget forbids a cache, or where an objective
    needs what is not cached.
    """
    tokenised = tokenise(encoder, texts, RequiredOutputs.of(spec.objectives).masked, cache_root)
    if not len(tokenised):
        raise UserError("distillation: no texts")
    return with_states(tokenised, encoder, spec, cache_root, depth)


def with_states(
    texts: TokenizedCorpus, encoder: Encoder, spec: config.Distill, cache_root: Path | None, depth: int
) -> TokenizedCorpus:
    """The same texts with the states that `spec` asks for; see `prepare`. Layers already cached are not made again."""
    needs = RequiredOutputs.of(spec.objectives)
    if not spec.cache or cache_root is None or spec.teacher_noise or not needs.cacheable:
        return texts.live()
    layers = [0] * needs.embedded + compared_layers(needs, depth, encoder.layers)[1]
    return replace(texts, cached=teacher_states(cache_root, encoder, texts.ids, layers, spec.cache_gigabytes))


def training_size(train: TokenizedCorpus, spec: config.Distill, seed: int = 0) -> tuple[int, int]:
    """Steps and tokens of a whole training on `train`."""
    batches = len(BudgetSampler(train.lengths, spec.batch_tokens, seed))
    return int(batches * spec.epochs) or 1, round(train.tokens * spec.epochs)


def compared_layers(needs: RequiredOutputs, depth: int, teacher_depth: int) -> tuple[list[int], list[int]]:
    """Which layers of student and teacher are compared.

    All as TinyBERT does, student layer i with teacher layer i * L / l; the last ones alone where no objective asks
    for more.
    """
    if not needs.layers:
        return [depth], [teacher_depth]
    return list(range(1, depth + 1)), layer_map("alternate", depth, teacher_depth)
