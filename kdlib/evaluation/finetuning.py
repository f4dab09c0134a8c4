"""Fine-tuning: an encoder and a new task head are trained together and scored on the task's test rows."""

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from kdlib import config
from kdlib.batching import BudgetSampler, budget_batches, model_inputs, tokens_per_batch
from kdlib.data.tasks import Split, Task
from kdlib.device import autocast
from kdlib.evaluation.metrics import Metric, score
from kdlib.evaluation.probing import PENALTY, train_targets
from kdlib.models.encoder import Encoder, first_tokens, text_vectors, word_vectors
from kdlib.models.families import positions
from kdlib.models.sentence import mean_pool
from kdlib.training import checkpoints
from kdlib.training.arguments import training_arguments, training_attention
from kdlib.training.callbacks import Curve
from kdlib.training.trainer import BudgetTrainer

IGNORE = -100
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
HEAD_STEPS = 100  # steps of L-BFGS at most, for the start of a head
TEXTS_AT_ONCE = 4096  # texts tokenised in one call: a tokenizer's records need a hundred times the memory of the ids


class TaskModel(nn.Module):
    """An encoder with a linear head: on the pooled state of a text, or on every token (kind tokens)."""

    def __init__(self, encoder: nn.Module, kind: str, labels: int, pool: Callable = mean_pool):
        super().__init__()
        self.encoder, self.kind, self.pool = encoder, kind, pool
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None):
        """Logits of a batch and, with labels, the loss."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        states = states if self.kind == "tokens" else self.pool(states, attention_mask)
        logits = self.head(self.dropout(states)).float()
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `label_loss`."""
        return label_loss(self.kind, logits, labels)


def label_loss(kind: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, mean over texts or words; for kind multilabel of each label."""
    if kind == "multilabel":
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


@dataclass
class _Tokenised:
    """A text as token ids and token types (int32 [tokens]), and the (word, token) of each word's first token."""

    ids: np.ndarray
    types: np.ndarray | None
    firsts: list[tuple[int, int]] | None


class Tokens:
    """Texts as an encoder tokenises them. Each text is tokenised once, in however many runs it is drawn.

    Args:
        encoder: its tokenizer is used.
        max_length: tokens per text instead of the encoder's limit, up to the model's positions.
    """

    def __init__(self, encoder: Encoder, max_length: int | None = None):
        limit = min(max_length, positions(encoder.model.config)) if max_length else encoder.max_length
        self.encoder = replace(encoder, max_length=limit)
        self._known: dict[str | tuple[str, ...], _Tokenised] = {}

    def of(self, texts: Sequence) -> list[_Tokenised]:
        """Tokenise texts: str, (str, str), or lists of words."""
        keys = [tuple(text) if isinstance(text, list) else text for text in texts]
        new = list({key: text for key, text in zip(keys, texts) if key not in self._known}.items())
        skip = len(self.encoder.prefix.split())
        for start in range(0, len(new), TEXTS_AT_ONCE):
            part = new[start : start + TEXTS_AT_ONCE]
            for (key, text), encoding in zip(part, self.encoder.tokenize([text for _, text in part])):
                self._known[key] = _Tokenised(
                    np.array(encoding.ids, np.int32),
                    np.array(encoding.type_ids, np.int32) if self.encoder.token_types else None,
                    first_tokens(encoding.word_ids, skip) if isinstance(text, list) else None,
                )
        return [self._known[key] for key in keys]


class Rows:
    """A split as tokenised rows with targets. A target is None where the row has no label."""

    def __init__(self, tokens: Tokens, kind: str, split: Split):
        self.kind, self.pad_id, self.targets = kind, tokens.encoder.tokenizer.pad_token_id, split.targets
        self.labels = next((len(target) for target in split.targets if target is not None and kind == "multilabel"), 0)
        self.rows = tokens.of(split.texts)
        self.words = [len(text) for text in split.texts] if kind == "tokens" else []
        self.lengths = [len(row.ids) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> int:
        return i

    def sampler(self, texts: int, seed: int) -> BudgetSampler:
        """Batches of texts of similar length, each of as many tokens as `texts` texts of mean length have."""
        budget = max(max(self.lengths), round(texts * sum(self.lengths) / len(self)))
        return BudgetSampler(self.lengths, budget, seed)

    def collate(self, batch: list[int]) -> dict[str, torch.Tensor]:
        """A padded batch of these rows with their labels; IGNORE, or NaN for kind multilabel, where there is none."""
        rows = [self.rows[i] for i in batch]
        types = None if rows[0].types is None else [row.types for row in rows]
        inputs = model_inputs([row.ids for row in rows], types, self.pad_id)
        if self.kind == "tokens":
            labels = torch.full_like(inputs["input_ids"], IGNORE)
            for r, i in enumerate(batch):
                if self.targets[i] is not None:
                    for word, at in rows[r].firsts:
                        labels[r, at] = self.targets[i][word]
        else:
            labels = torch.tensor([self._target(i) for i in batch], dtype=_label_type(self.kind))
        return inputs | {"labels": labels}

    def _target(self, i: int) -> int | list:
        if self.targets[i] is not None:
            return self.targets[i]
        return [math.nan] * self.labels if self.kind == "multilabel" else IGNORE


def _label_type(kind: str) -> torch.dtype:
    return torch.float32 if kind == "multilabel" else torch.long


def finetune(
    encoder: Encoder,
    task: Task,
    spec: config.Benchmark,
    seed: int = 0,
    tokens: Tokens | None = None,
    min_steps: int = 0,
    work: Path | None = None,
) -> list[Metric]:
    """Train a copy of the encoder and a new head on the task's training rows. Returns metrics on its test rows.

    Args:
        encoder: it is not changed.
        task: what is trained and tested on.
        spec: settings.
        seed: of the head, dropout and the order of the rows.
        tokens: tokenised texts, to be shared by runs of the same encoder.
        min_steps: more epochs where those of the profile are fewer steps.
        work: folder of checkpoints, from which a stopped training resumes; the caller removes it.

    References:
        Cruz and Aji (2025): a random head, learning rate 2e-5, 3 epochs, 32 texts a step, unless the profile differs.
    """
    tokens = tokens or Tokens(encoder, spec.finetune_max_length)
    model = trained(encoder, task, spec, seed, tokens, min_steps, work)
    return score(task, predict(model, Rows(tokens, task.kind, task.test), task, encoder.bf16))


def trained(
    encoder: Encoder,
    task: Task,
    spec: config.Benchmark,
    seed: int,
    tokens: Tokens,
    min_steps: int = 0,
    work: Path | None = None,
) -> TaskModel:
    """A copy of the encoder and a new head, trained on the task's training rows, in eval mode. See `finetune`."""
    set_seed(seed)
    device = next(encoder.model.parameters()).device
    model = TaskModel(copy.deepcopy(encoder.model), task.kind, len(task.labels), encoder.sentence.pool).to(device)
    if spec.finetune_head == "probe":
        fit_head(model, tokens.encoder, task)
    label = f"{encoder.name}: fine-tuning on {task.name}, seed {seed}"
    rows = Rows(tokens, task.kind, task.train)
    train(model, model.encoder, rows, spec, seed, label, encoder.bf16, spec.finetune_epochs, None, min_steps, work)
    return model


def train(
    model: nn.Module,
    body: PreTrainedModel,
    rows: Rows,
    spec: config.Benchmark,
    seed: int,
    label: str,
    bf16: bool,
    epochs: float,
    rate: float | None = None,
    min_steps: int = 0,
    work: Path | None = None,
) -> None:
    """Train a model on rows; it is in eval mode then.

    Args:
        model: it is called with the parts of a batch, and returns its loss.
        body: the encoder in it.
        rows: what it is trained on.
        spec: settings of the fine-tuning.
        seed: of dropout and the order of the rows.
        label: name of the progress bar.
        bf16: whether to compute in bfloat16.
        epochs: passes over the rows.
        rate: highest learning rate; None: that of the fine-tuning.
        min_steps: more epochs where these are fewer steps.
        work: folder of checkpoints, from which a stopped training resumes; the caller removes it.
    """
    device = next(body.parameters()).device
    if spec.freeze_embeddings:
        body.get_input_embeddings().weight.requires_grad_(False)
    sampler = rows.sampler(spec.finetune_batch, seed)
    fp16 = spec.finetune_fp16 and device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(
            work or scratch, max(min_steps, math.ceil(epochs * len(sampler))), rate or spec.finetune_rate, device,
            seed, warmup_steps=0.1, fp16=fp16, bf16=bf16 and not fp16, label_names=["labels"],
        )  # fmt: skip
        trainer = BudgetTrainer(
            lambda trainer: Curve(trainer, label), sampler,
            model=model, args=arguments, train_dataset=rows, data_collator=rows.collate,
            callbacks=[checkpoints.Checkpoints(at_end=False)] if work else [],
        )  # fmt: skip
        with training_attention(body):
            checkpoints.train(trainer, checkpoints.newest(work) if work else None)
    model.eval()


def fit_head(model: TaskModel, encoder: Encoder, task: Task) -> None:
    """Set the head to the linear probe of the untrained encoder on the task's training rows.

    A random head would disturb the encoder. The probe is a logistic regression on standardised states, with the penalty
    of `probing.linear_probe`, fitted by L-BFGS.

    References:
        Kumar et al. (2022), *Fine-Tuning can Distort Pretrained Features*.
    """
    texts, device = task.train.texts, model.head.weight.device
    if task.kind == "tokens":
        states, labels = word_vectors(encoder, texts)[0], train_targets(encoder, task)
    else:
        states, labels = text_vectors(encoder, texts, [encoder.layers]), np.asarray(task.train.targets)
    states = torch.from_numpy(states[:, 0]).to(device)
    labels = torch.as_tensor(labels, dtype=_label_type(task.kind), device=device)
    fit_linear(model.head, model.kind, states, labels)


def fit_linear(head: nn.Linear, kind: str, states: torch.Tensor, labels: torch.Tensor) -> None:
    """Set a layer to the logistic regression of labels on its standardised input [items, features]."""
    mean, scale = states.mean(0), states.std(0, correction=0).clamp(min=1e-6)
    states, weight, bias = (states - mean) / scale, head.weight, head.bias
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
    # Loss and penalty as in scikit-learn: each label of several by itself; for two classes the difference.
    share = len(weight) if kind == "multilabel" else 1
    penalty = (2 if kind != "multilabel" and len(weight) == 2 else 1) / (2 * PENALTY * len(states))
    solver = torch.optim.LBFGS([weight, bias], max_iter=HEAD_STEPS, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        solver.zero_grad()
        loss = share * label_loss(kind, head(states), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(step)
    solver.zero_grad()
    with torch.no_grad():
        weight /= scale
        bias -= weight @ mean


@torch.inference_mode()
def outputs(model: nn.Module, rows: Rows, bf16: bool) -> list[np.ndarray]:
    """The logits of each row: float32 [labels]; of kind tokens [words, labels], NaN for a truncated word."""
    device = next(model.parameters()).device
    out: list = [None] * len(rows)
    for batch in budget_batches(rows.lengths, tokens_per_batch()):
        features = {name: value.to(device) for name, value in rows.collate(batch).items() if name in INPUTS}
        with autocast(device, bf16):
            logits = model(**features)["logits"].float().cpu().numpy()
        for r, i in enumerate(batch):
            out[i] = logits[r]
            if rows.kind == "tokens":
                out[i] = np.full((rows.words[i], logits.shape[-1]), np.nan, np.float32)
                for word, at in rows.rows[i].firsts:
                    out[i][word] = logits[r, at]
    return out


def predict(model: nn.Module, rows: Rows, task: Task, bf16: bool) -> list | np.ndarray:
    """Predictions for rows, in the form that `metrics.score` takes. A truncated word gets the first label."""
    return answers(outputs(model, rows, bf16), task.kind)


def answers(logits: Sequence[np.ndarray], kind: str) -> list | np.ndarray:
    """The most probable labels of `outputs`, in the form that `metrics.score` takes."""
    if kind == "tokens":
        return [np.nan_to_num(words, nan=-np.inf).argmax(1).tolist() for words in logits]
    found = np.stack(list(logits))
    return (found > 0).astype(int) if kind == "multilabel" else found.argmax(1)
