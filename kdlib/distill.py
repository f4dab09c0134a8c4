"""Distillation: a `transformers.Trainer` that trains a student to have the teacher's states."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kdlib import config
from kdlib.batches import BudgetSampler
from kdlib.cache import TeacherStates, gigabytes, teacher_states
from kdlib.device import autocast, training_attention
from kdlib.encoder import Encoder, pad
from kdlib.errors import UserError
from kdlib.objectives import States, check_objectives, total_loss
from kdlib.progress import Progress
from kdlib.student import layer_map

PROJECTIONS = (
    ("attention.self.query", "attention.self.key"),
    ("attention.self.query_proj", "attention.self.key_proj"),
    ("attention.q_lin", "attention.k_lin"),
)
LOGS = 50  # points of the training curve


def forward_states(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int], attention: bool
) -> States:
    """One forward pass, keeping the states of `layers` (1 = first) and, if asked, their queries and keys.

    Queries and keys are caught where they are projected: the scores before the softmax follow from them under any
    attention implementation, whereas `output_attentions` gives probabilities, and an empty tuple with sdpa.
    """
    base = getattr(model, "module", model)
    caught: dict[str, list[torch.Tensor]] = {"query": [], "key": []}
    hooks = []
    if attention:
        heads = base.config.num_attention_heads

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        for kind, modules in zip(("query", "key"), _projections(base)):
            for layer in layers:
                hooks.append(
                    modules[layer - 1].register_forward_hook(
                        lambda m, i, out, kind=kind: caught[kind].append(split(out))
                    )
                )
    try:
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    return States([output.hidden_states[layer] for layer in layers], mask, caught["query"], caught["key"])


def _projections(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The query and the key projections of all layers, lowest first."""
    modules = dict(model.named_modules())
    for query, key in PROJECTIONS:
        found = [[m for n, m in modules.items() if n.endswith(name)] for name in (query, key)]
        if len(found[0]) == len(found[1]) == model.config.num_hidden_layers:
            return found[0], found[1]
    raise UserError(
        f"the attention objective does not know where a {model.config.model_type} model keeps its queries and keys"
    )


@dataclass
class Texts:
    """Tokenised texts and, where cached, the teacher's states for them. A torch data set of places in itself."""

    ids: list[np.ndarray]
    cached: TeacherStates | None
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> int:
        return i

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def part(self, places: Sequence[int]) -> "Texts":
        """Some of the texts, sharing the cached states."""
        cached = TeacherStates(self.cached.states, self.cached.starts[list(places)]) if self.cached else None
        return Texts([self.ids[i] for i in places], cached, self.pad_id)

    def live(self) -> "Texts":
        """The same texts without cached states: the teacher runs at every step."""
        return Texts(self.ids, None, self.pad_id)

    def collate(self, batch: list[int]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [batch, tokens]; if cached, teacher_states.

        teacher_states: float16 [batch, tokens, layers, hidden].
        """
        ids, mask = pad([self.ids[i] for i in batch], self.pad_id)
        features = {"input_ids": ids, "attention_mask": mask}
        if self.cached is not None:
            states = np.zeros((*ids.shape, *self.cached.states.shape[1:]), np.float16)
            for r, i in enumerate(batch):
                states[r, : len(self.ids[i])] = self.cached.rows(i, len(self.ids[i]))
            features["teacher_states"] = torch.from_numpy(states)
        return features


class DistillTrainer(Trainer):
    """Trains `model` (the student) towards `teacher` under weighted objectives, in batches of a token budget.

    teacher: a model in the student's vocabulary, kept in eval mode (TinyBERT's script forgot); used only where a
    batch brings no cached states. student_layers, teacher_layers: which layers are compared, 1 = first.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        student_layers: list[int],
        teacher_layers: list[int],
        weights: dict[str, float],
        batch_tokens: int,
        bf16: bool,
        **kwargs,
    ):
        super().__init__(data_collator=kwargs["train_dataset"].collate, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.student_layers, self.teacher_layers = student_layers, teacher_layers
        self.weights, self.batch_tokens, self.bf16 = weights, batch_tokens, bf16
        self.attention = bool(weights.get("attention"))
        self.sums: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if "teacher_states" in inputs:
            target = States(list(inputs["teacher_states"].unbind(2)), mask, [], [])
        else:
            with torch.no_grad(), autocast(ids.device, self.bf16):
                target = forward_states(self.teacher, ids, mask, self.teacher_layers, self.attention)
        student = forward_states(model, ids, mask, self.student_layers, self.attention)
        loss, parts = total_loss(self.weights, student, target)
        for name, value in {"loss": loss.detach(), **parts}.items():
            self.sums.setdefault(name, []).append(value)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def take_means(self) -> dict[str, float]:
        """Means of the losses since the last call."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.sums.items()}
        self.sums = {}
        return means

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.args.seed)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return self._loader(self.eval_dataset, 0)

    def _loader(self, texts: Texts, seed: int) -> DataLoader:
        sampler = BudgetSampler([len(row) for row in texts.ids], self.batch_tokens, seed)
        loader = DataLoader(
            texts, batch_sampler=sampler, collate_fn=texts.collate, pin_memory=self.args.device.type == "cuda"
        )
        return self.accelerator.prepare(loader)


class _History(TrainerCallback):
    """Keeps the curve of the training and held-out loss, shows progress, and tells whoever draws."""

    def __init__(self, label: str, on_point: Callable[[pd.DataFrame], None] | None):
        self.label, self.on_point, self.points = label, on_point, []
        self.trainer: DistillTrainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress, self.started = Progress(self.label, state.max_steps), time.time()
        self.seconds_before = state.log_history[-1].get("seconds", 0.0) if state.log_history else 0.0
        self.points = [point for point in state.log_history if "split" in point]
        if not self.points:
            self._evaluate(state)

    def _evaluate(self, state):
        self.trainer.model.eval()
        pending, self.trainer.sums = self.trainer.sums, {}
        for batch in self.trainer.get_eval_dataloader():
            self.trainer.prediction_step(self.trainer.model, batch, True)
        self._add("heldout", state)
        self.trainer.sums = pending
        self.trainer.model.train()

    def _add(self, split: str, state) -> None:
        means = self.trainer.take_means()
        if means:
            seconds = self.seconds_before + time.time() - self.started
            point = {"split": split, "step": state.global_step, "seconds": round(seconds, 2), **means}
            self.points.append(point)
            state.log_history.append(point)

    def on_step_end(self, args, state, control, **kwargs):
        train = next((p["loss"] for p in reversed(self.points) if p["split"] == "train"), None)
        self.progress.update(state.global_step, f"loss {train:.3f}" if train is not None else "")
        if state.global_step % max(1, state.max_steps // LOGS) == 0:
            self._add("train", state)
        if state.global_step % args.eval_steps == 0 or state.global_step == state.max_steps:
            self._evaluate(state)
            if self.on_point:
                self.on_point(self.curve())

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.close()

    def curve(self) -> pd.DataFrame:
        return pd.DataFrame(self.points)


@dataclass
class Outcome:
    """student: the distilled model; curve: split, step, seconds, loss and each objective; facts: sizes and speeds."""

    student: PreTrainedModel
    curve: pd.DataFrame
    facts: dict


def tokenise(encoder: Encoder, texts: list[str]) -> list[np.ndarray]:
    """Token ids of every text, with the prefix, as small integer arrays."""
    rows = []
    for start in range(0, len(texts), 8192):
        rows += [np.asarray(e.ids, np.int32) for e in encoder.tokenize(texts[start : start + 8192])]
    return rows


def prepare(encoder: Encoder, texts: list[str], spec: config.Distill, cache_root: Path | None, depth: int) -> Texts:
    """Tokenise `texts` and get the teacher's states that a student of `depth` layers is compared with, from the cache.

    The teacher runs live, at every step, where the profile or its size budget forbids a cache.
    """
    layers = layer_map("alternate", depth, encoder.layers)
    if not texts:
        raise UserError("distillation: no texts")
    ids = tokenise(encoder, texts)
    usable = spec.cache and cache_root is not None
    cached = teacher_states(cache_root, encoder, ids, layers, spec.cache_gigabytes) if usable else None
    return Texts(ids, cached, encoder.tokenizer.pad_token_id)


def distill(
    teacher: Encoder,
    student: PreTrainedModel,
    train: Texts,
    heldout: Texts,
    spec: config.Distill,
    work: Path,
    seed: int = 0,
    label: str = "distilling",
    on_point: Callable[[pd.DataFrame], None] | None = None,
) -> Outcome:
    """Distil `teacher` (in the student's vocabulary) into `student`; goes on from the last checkpoint under `work`.

    train, heldout: from `prepare`. Cached states are left aside where an objective needs what is not cached
    (attention). Layers are compared as TinyBERT does: student layer i with teacher layer i * L / l. on_point: called
    with the curve so far after every held-out evaluation.
    """
    check_objectives(spec.objectives)
    depth = student.config.num_hidden_layers
    layers = layer_map("alternate", depth, teacher.layers)
    if (
        spec.objectives.get("attention")
        and student.config.num_attention_heads != teacher.model.config.num_attention_heads
    ):
        raise UserError("the attention objective compares head by head: student and teacher need as many heads")
    if student.config.hidden_size != teacher.hidden:
        raise UserError(
            f"the student is {student.config.hidden_size} wide, the teacher {teacher.hidden}; "
            "objectives compare equal widths"
        )
    if spec.objectives.get("attention"):
        train, heldout = train.live(), heldout.live()
    if spec.freeze_embeddings:
        student.get_input_embeddings().weight.requires_grad_(False)
    dropouts = {m: m.p for m in student.modules() if isinstance(m, nn.Dropout)}
    for module in dropouts:  # the target is exact: noise in the student only blurs it
        module.p = 0.0
    device = next(teacher.model.parameters()).device
    steps = int(len(BudgetSampler([len(r) for r in train.ids], spec.batch_tokens, seed)) * spec.epochs) or 1
    compile_ = spec.compile if spec.compile is not None else device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=steps, learning_rate=spec.learning_rate, weight_decay=spec.weight_decay,
        warmup_steps=int(steps * spec.warmup), lr_scheduler_type="linear", optim="adamw_torch_fused", max_grad_norm=1.0,
        bf16=teacher.bf16, use_cpu=device.type == "cpu", torch_compile=compile_, seed=seed, data_seed=seed,
        eval_steps=-(-steps // spec.evaluations), eval_strategy="no", logging_strategy="no",
        save_strategy="steps", save_steps=-(-steps // 4), save_total_limit=1,
        report_to=[], disable_tqdm=True, remove_unused_columns=False, label_names=[],
    )  # fmt: skip
    history = _History(label, on_point)
    trainer = DistillTrainer(
        model=student, args=arguments, train_dataset=train, eval_dataset=heldout, teacher=teacher.model,
        callbacks=[history], student_layers=list(range(1, depth + 1)), teacher_layers=layers, weights=spec.objectives,
        batch_tokens=spec.batch_tokens, bf16=teacher.bf16,
    )  # fmt: skip
    history.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    last = get_last_checkpoint(str(work)) if Path(work).is_dir() else None
    try:
        with training_attention(student):
            trainer.train(resume_from_checkpoint=last)
    except (OSError, SafetensorError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and "PytorchStreamWriter" not in str(error)
            and "unexpected pos" not in str(error)
        ):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{work}: a checkpoint could not be written ({reason})") from error
    for module, p in dropouts.items():
        module.p = p
    student.requires_grad_(True).eval()
    curve = history.curve()
    training = float(curve["seconds"].iloc[-1])
    facts = {
        "texts": len(train), "tokens": train.tokens, "steps": steps, "training_seconds": training,
        "tokens_per_second": train.tokens * spec.epochs / max(training, 1e-9),
        "cache_gigabytes": gigabytes(train.tokens, len(layers), teacher.hidden) if train.cached else 0.0,
        "real_token_share": BudgetSampler([len(r) for r in train.ids], spec.batch_tokens, seed).real_share(),
    }  # fmt: skip
    return Outcome(student, curve, facts)
