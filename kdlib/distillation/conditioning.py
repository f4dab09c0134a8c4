"""Conditioning: train the teacher further on the target language by masked language modelling (Cruz and Aji 2025)."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from kdlib import config
from kdlib.batching import BudgetSampler, budget_batches, pad, tokens_per_batch
from kdlib.device import autocast
from kdlib.errors import UserError
from kdlib.models.encoder import Encoder
from kdlib.models.masking import mask_id, mask_tokens, seeded_generator
from kdlib.models.mlm_head import MaskedHead, new_head, perplexity
from kdlib.models.token_store import tokenise
from kdlib.training import checkpoints
from kdlib.training.arguments import training_arguments, training_attention
from kdlib.training.callbacks import Curve
from kdlib.training.trainer import BudgetTrainer

WARMUP = 0.1  # share of the steps in which the learning rate rises
EVALUATIONS = 2  # held-out evaluations after the first, evenly spaced
LOGS = 50  # points of the training curve
STATES = 2**30  # bytes of the frozen encoder's states that are kept: later passes of a new head are then cheap
UNSEEN = 0.1  # added to the count of every token, so that no frequency is 0


@dataclass
class Outcome:
    """What conditioning returns.

    Attributes:
        encoder: the conditioned teacher with its head.
        curve: a table of split, step, seconds, loss, perplexity, and the bounds low and high of held-out perplexity.
        facts: sizes, seconds and perplexities.
    """

    encoder: Encoder
    curve: pd.DataFrame
    facts: dict


class MaskedModel(nn.Module):
    """An encoder with its masked-language head. The head's output matrix is the encoder's own embeddings."""

    def __init__(self, encoder: PreTrainedModel, head: MaskedHead):
        super().__init__()
        self.encoder, self.head, self.frozen = encoder.requires_grad_(True), head.requires_grad_(True), False

    def freeze(self, frozen: bool) -> None:
        """Train the head alone (without its output matrix, the embeddings), or the whole model."""
        self.frozen = frozen
        self.encoder.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "MaskedModel":
        """Switch to training mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The encoder's states [chosen tokens, hidden] where `chosen` (bool [batch, tokens]) is true."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states.flatten(0, 1).index_select(0, chosen.flatten().nonzero().squeeze(1))

    def forward(self, states: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits [chosen tokens, vocabulary] in float32, from `states`, or from the method's inputs."""
        states = self.states(**inputs) if states is None else states
        return self.head(states, self.encoder.get_input_embeddings().weight).float()


class MaskedTexts:
    """A torch data set of tokenised texts, with the tokens that may be masked. Texts without one are left out."""

    def __init__(self, encoder: Encoder, texts: Iterable[str], whole_words: bool, cache_root: Path | None = None):
        self.pad_id, self.mask_id = encoder.tokenizer.pad_token_id, mask_id(encoder.tokenizer, encoder.name)
        self.rows = len(encoder.model.get_input_embeddings().weight)
        found = tokenise(encoder, texts, ["maskable", *["words"] * whole_words], cache_root)
        kept = np.array([i for i, row in enumerate(found["maskable"]) if row.any()], int)
        self.ids, self.maskable = (found[name].part(kept) for name in ("ids", "maskable"))
        self.words = found["words"].part(kept) if whole_words else None
        self.lengths = self.ids.lengths
        if not len(self.ids):
            raise UserError("conditioning: the texts have no token to mask")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> int:
        return i

    def frequencies(self) -> np.ndarray:
        """The share of each vocabulary row among the maskable tokens: all above 0, with sum 1."""
        counts = np.full(self.rows, UNSEEN)
        for ids, maskable in zip(self.ids, self.maskable):
            np.add.at(counts, ids[maskable], 1)
        return counts / counts.sum()

    def collate(self, batch: list[int]) -> dict[str, torch.Tensor]:
        """Pad texts without masking them.

        Returns:
            The text numbers [batch], and input_ids, attention_mask, maskable and perhaps words, each [batch, tokens].
        """
        ids, mask = pad([self.ids[i] for i in batch], self.pad_id)
        maskable = pad([self.maskable[i] for i in batch], 0)[0].bool()
        features = {"texts": torch.tensor(batch), "input_ids": ids, "attention_mask": mask, "maskable": maskable}
        if self.words is not None:
            features["words"] = pad([self.words[i] for i in batch], -1)[0]
        return features

    def mask(self, features: dict[str, torch.Tensor], share: float, key: str) -> dict[str, torch.Tensor]:
        """Mask a batch; `key` and the batch's shape decide the draw. Returns a MaskedModel's inputs and its targets."""
        ids, generator = features["input_ids"], seeded_generator(key)
        masked, chosen = mask_tokens(
            ids, features["maskable"], self.mask_id, self.rows, share, features.get("words"), generator
        )
        inputs = {"input_ids": masked, "attention_mask": features["attention_mask"], "chosen": chosen}
        return inputs | {"targets": ids[chosen]}


class ConditionTrainer(BudgetTrainer):
    """Trains a MaskedModel on MaskedTexts.

    The masks depend on the seed and the step. Under a frozen encoder they depend on the seed and the batch, so every
    pass has the same states, which are computed once and kept.
    """

    def __init__(self, *, share: float, batch_tokens: int, bf16: bool, **kwargs):
        rows = kwargs["train_dataset"]
        sampler = BudgetSampler(rows.lengths, batch_tokens, kwargs["args"].seed)
        super().__init__(sampler=sampler, data_collator=rows.collate, **kwargs)
        self.share, self.bf16 = share, bf16
        self.losses: list[torch.Tensor] = []
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of the masked tokens."""
        if self.model.frozen:
            states, targets = self._frozen(inputs)
            loss = F.cross_entropy(model(states=states), targets)
        else:
            inputs = self.train_dataset.mask(inputs, self.share, f"{self.args.seed}-{self.state.global_step}")
            targets = inputs.pop("targets")
            loss = F.cross_entropy(model(**inputs), targets)
        self.losses.append(loss.detach())
        return (loss, None) if return_outputs else loss

    def _frozen(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The frozen encoder's states at the chosen tokens of a batch, and the targets there."""
        first = int(inputs["texts"][0])  # each text is in one batch
        if first in self.kept:
            return self.kept[first]
        inputs = self.train_dataset.mask(inputs, self.share, f"{self.args.seed}-frozen-{first}")
        targets = inputs.pop("targets")
        with torch.no_grad(), autocast(targets.device, self.bf16):
            states = self.model.states(**inputs)
        if states.nbytes + sum(kept.nbytes for kept, _ in self.kept.values()) <= STATES:
            self.kept[first] = states, targets
        return states, targets


class ConditionCurve(Curve):
    """Records the training loss at LOGS steps and the held-out loss where `evaluate` asks for it."""

    def __init__(
        self,
        trainer: ConditionTrainer,
        split: str,
        label: str,
        evaluate: Callable[[], dict[str, float]] | None = None,
        on_point: Callable[[list[dict]], None] | None = None,
    ):
        super().__init__(trainer, label, split)
        self.evaluate, self.on_point = evaluate, on_point

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure the perplexity before the first step."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.evaluate and not self.points:
            self.add(state, "heldout", self.evaluate())

    def on_step_end(self, args, state, control, **kwargs):
        """Measure the perplexity where a point of the curve is due."""
        super().on_step_end(args, state, control, **kwargs)
        end = state.global_step == state.max_steps
        if end or state.global_step % max(1, state.max_steps // LOGS) == 0:
            loss = float(torch.stack(self.trainer.losses).mean())
            self.trainer.losses.clear()
            self.add(state, self.split, {"loss": loss, "perplexity": float(np.exp(loss))})
        if self.evaluate and (end or state.global_step % args.eval_steps == 0):
            self.add(state, "heldout", self.evaluate())
            if self.on_point:
                self.on_point(self.points)


def condition(
    teacher: Encoder,
    train: Iterable[str],
    heldout: Iterable[str],
    spec: config.Condition,
    work: Path,
    seed: int = 0,
    label: str = "conditioning",
    on_point: Callable[[pd.DataFrame], None] | None = None,
    cache_root: Path | None = None,
) -> Outcome:
    """Train a copy of the teacher on `train` by BERT's masking. An unfinished training under `work` is resumed.

    All weights are trained, the embeddings too. A teacher without a head gets a new tied one, whose bias is the log
    frequency of the tokens. The new head is first trained alone; its curve points have the split "warm-up". Held-out
    loss is measured on the same masked tokens every time. "perplexity_unigram" is what token frequencies alone reach.

    Args:
        teacher: the encoder, with or without a masked-language head.
        train: training texts; all are used.
        heldout: texts of the held-out loss.
        spec: settings; max_texts is left to the caller.
        work: folder of checkpoints.
        seed: of the order, the masks and a new head.
        label: name of the progress bar.
        on_point: called with the curve after every held-out evaluation but the first.
        cache_root: folder of tokenised texts; None keeps them in memory.

    Raises:
        UserError: for a tokenizer without a mask token, texts without a maskable token, or a full disk.

    References:
        Devlin et al. (2019), section 3.1; Cruz and Aji (2025).
    """
    rows, held = (MaskedTexts(teacher, texts, spec.whole_words, cache_root) for texts in (train, heldout))
    model = MaskedModel(
        copy.deepcopy(teacher.model), copy.deepcopy(teacher.head) or new_head(teacher.model, rows.frequencies(), seed)
    )
    batches = len(BudgetSampler(rows.lengths, spec.batch_tokens, seed))

    def run(part: str, epochs: float, rate: float, curve: Callable[[BudgetTrainer], Curve]) -> list[dict]:
        steps = round(batches * epochs) or 1
        arguments = training_arguments(
            Path(work) / part, steps, rate, teacher.model.device, seed, warmup_steps=round(steps * WARMUP),
            bf16=teacher.bf16, eval_steps=-(-steps // EVALUATIONS),
        )  # fmt: skip
        trainer = ConditionTrainer(
            model=model, args=arguments, train_dataset=rows, share=spec.mask, batch_tokens=spec.batch_tokens,
            bf16=teacher.bf16, callbacks=[checkpoints.Checkpoints(max(1, steps // LOGS))], curve=curve,
        )  # fmt: skip
        with training_attention(model.encoder):
            return checkpoints.train(trainer, checkpoints.newest(arguments.output_dir))

    warm = []
    if teacher.head is None and spec.head_epochs:
        model.freeze(True)
        warm = run(
            "head", spec.head_epochs, spec.head_rate, lambda t: ConditionCurve(t, "warm-up", f"{label}: a new head")
        )
        model.freeze(False)
    prepared = masked_batches(held, spec.mask)

    def evaluate() -> dict[str, float]:
        return heldout_perplexity(model, prepared, len(held), teacher.bf16)

    def tell(points: list[dict]) -> None:
        if on_point:
            on_point(pd.DataFrame(warm + points))

    main = run("all", spec.epochs, spec.learning_rate, lambda t: ConditionCurve(t, "train", label, evaluate, tell))
    encoder = Encoder(
        model.encoder.eval(), teacher.tokenizer, "conditioned teacher", teacher.prefix, teacher.max_length,
        teacher.bf16, model.head.eval(), sentence=teacher.sentence,
    )  # fmt: skip
    targets = np.concatenate([inputs["targets"].numpy() for _, inputs in prepared])
    facts = {
        "texts": len(rows), "tokens": int(rows.lengths.sum(dtype=np.int64)),
        "steps": main[-1]["step"], "seconds": main[-1]["seconds"],
        "new_head": teacher.head is None, "head_steps": warm[-1]["step"] if warm else 0,
        "head_seconds": warm[-1]["seconds"] if warm else 0.0,
        "heldout_texts": len(held), "heldout_masked": len(targets),
        "perplexity_unigram": float(np.exp(-np.log(rows.frequencies()[targets]).mean())),
    }  # fmt: skip
    watched = [point for point in main if point["split"] == "heldout"]
    for name, point in (("perplexity_before", watched[0]), ("perplexity_after", watched[-1])):
        facts |= {name: point["perplexity"], f"{name}_low": point["low"], f"{name}_high": point["high"]}
    return Outcome(encoder, pd.DataFrame(warm + main), facts)


def masked_batches(texts: MaskedTexts, share: float) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
    """The held-out texts in batches. Their masks never change."""
    plan = budget_batches(texts.lengths, tokens_per_batch())
    return [(batch, texts.mask(texts.collate(batch), share, f"heldout-{n}")) for n, batch in enumerate(plan)]


def heldout_perplexity(
    model: MaskedModel, batches: list[tuple[list[int], dict[str, torch.Tensor]]], texts: int, bf16: bool
) -> dict[str, float]:
    """Loss (nats) and perplexity over all masked tokens, with a 95% bootstrap interval over texts."""
    training, device = model.training, model.encoder.device
    model.eval()
    sums = np.zeros((texts, 2))  # of each text: losses, tokens
    for batch, inputs in batches:
        inputs = {name: value.to(device) for name, value in inputs.items()}
        targets = inputs.pop("targets")
        with torch.no_grad(), autocast(device, bf16):
            losses = F.cross_entropy(model(**inputs), targets, reduction="none")
        owners = np.asarray(batch)[inputs["chosen"].nonzero()[:, 0].cpu().numpy()]
        np.add.at(sums, owners, np.stack([losses.cpu().numpy(), np.ones(len(losses))], 1))
    model.train(training)
    found = perplexity(sums)
    return {
        "loss": float(np.log(found["value"])), "perplexity": found["value"], "low": found["low"], "high": found["high"]
    }  # fmt: skip
