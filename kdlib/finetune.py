"""Fine-tuning: an encoder with a fresh task head, trained end to end by the Trainer, scored on the task's test rows."""

import copy
import tempfile

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from kdlib import config
from kdlib.batches import BudgetSampler, budget_batches
from kdlib.device import autocast, training_attention
from kdlib.encoder import TOKENS_PER_BATCH, Encoder, first_tokens, mean_pool, pad
from kdlib.metrics import Metric, score
from kdlib.progress import Progress
from kdlib.tasks import Split, Task

IGNORE = -100


class TaskModel(nn.Module):
    """An encoder under a linear head: on the mean-pooled state of a text, or on every token (kind tokens)."""

    def __init__(self, encoder: nn.Module, kind: str, labels: int):
        super().__init__()
        self.encoder, self.kind = encoder, kind
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids, attention_mask, labels=None):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states = states if self.kind == "tokens" else mean_pool(states, attention_mask)
        logits = self.head(self.dropout(states)).float()
        if labels is None:
            return {"logits": logits}
        if self.kind == "multilabel":
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        else:
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)
        return {"loss": loss, "logits": logits}


class _Rows:
    """A split as tokenised rows with targets; words keep the place of their first token."""

    def __init__(self, encoder: Encoder, kind: str, split: Split):
        encodings = encoder.tokenize(split.texts)
        skip = len(encoder.prefix.split())
        self.kind, self.pad_id, self.targets = kind, encoder.tokenizer.pad_token_id, split.targets
        self.ids = [e.ids for e in encodings]
        self.firsts = [first_tokens(e.word_ids, skip) for e in encodings] if kind == "tokens" else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> int:
        return i

    def collate(self, batch: list[int]) -> dict[str, torch.Tensor]:
        ids, mask = pad([self.ids[i] for i in batch], self.pad_id)
        if self.kind == "tokens":
            labels = torch.full_like(ids, IGNORE)
            for r, i in enumerate(batch):
                for word, at in self.firsts[i]:
                    labels[r, at] = self.targets[i][word]
        else:
            dtype = torch.float32 if self.kind == "multilabel" else torch.long
            labels = torch.tensor([self.targets[i] for i in batch], dtype=dtype)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _Trainer(Trainer):
    """Batches of texts of like length, as many tokens as `train_batch_size` texts of mean length have."""

    def get_train_dataloader(self) -> DataLoader:
        rows = self.train_dataset
        lengths = [len(row) for row in rows.ids]
        budget = max(max(lengths), round(self.args.train_batch_size * sum(lengths) / len(lengths)))
        sampler = BudgetSampler(lengths, budget, self.args.seed)
        return self.accelerator.prepare(DataLoader(rows, batch_sampler=sampler, collate_fn=rows.collate))


class _Report(TrainerCallback):
    def __init__(self, label: str):
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress = Progress(self.label, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.close()


def finetune(encoder: Encoder, task: Task, spec: config.Benchmark, seed: int = 0) -> list[Metric]:
    """Train a copy of the encoder and a new head on the task; the task's metrics on its test rows.

    Settings: Cruz and Aji 2025 (learning rate 2e-5, 3 epochs, 32 texts a step) unless the profile says otherwise.
    `seed` draws the head, the order and, with spec.finetune_rows, the training rows. spec.finetune_test_rows are the
    same for every seed.
    """
    set_seed(seed)
    device = next(encoder.model.parameters()).device
    small = task.small(spec.finetune_rows, spec.finetune_test_rows, seed)
    model = TaskModel(copy.deepcopy(encoder.model), task.kind, len(task.labels)).to(device)
    if spec.freeze_embeddings:
        model.encoder.get_input_embeddings().weight.requires_grad_(False)
    train = _Rows(encoder, task.kind, small.train)
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            output_dir=work, num_train_epochs=spec.finetune_epochs, learning_rate=spec.finetune_rate,
            per_device_train_batch_size=spec.finetune_batch, weight_decay=0.01, warmup_steps=0.1,
            optim="adamw_torch_fused", bf16=encoder.bf16, use_cpu=device.type == "cpu", seed=seed, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
        )  # fmt: skip
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            data_collator=train.collate,
            callbacks=[_Report(f"{encoder.name}: fine-tuning on {task.name}, seed {seed}")],
        )
        trainer.remove_callback(PrinterCallback)
        with training_attention(model.encoder):
            trainer.train()
    return score(small, predict(model.eval(), _Rows(encoder, task.kind, small.test), small, encoder.bf16))


@torch.inference_mode()
def predict(model: TaskModel, rows: _Rows, task: Task, bf16: bool) -> list | np.ndarray:
    """Predictions for the test rows, in the form `metrics.score` takes.

    A word that was cut off counts as the first label.
    """
    device = model.head.weight.device
    out: list = [None] * len(rows)
    for batch in budget_batches([len(row) for row in rows.ids], TOKENS_PER_BATCH):
        features = rows.collate(batch)
        with autocast(device, bf16):
            logits = model(features["input_ids"].to(device), features["attention_mask"].to(device))["logits"].cpu()
        for r, i in enumerate(batch):
            if task.kind == "tokens":
                out[i] = [0] * len(task.test.texts[i])
                for word, at in rows.firsts[i]:
                    out[i][word] = int(logits[r, at].argmax())
            else:
                out[i] = (logits[r] > 0).int().tolist() if task.kind == "multilabel" else int(logits[r].argmax())
    return out if task.kind == "tokens" else np.array(out)
