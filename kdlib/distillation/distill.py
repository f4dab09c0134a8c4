"""Distillation: a `transformers.Trainer` that trains a student towards the teacher's hidden states."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from kdlib import config, distributed
from kdlib.batching import BudgetSampler, tokens_per_batch
from kdlib.device import autocast
from kdlib.distillation.objectives import ModelOutputs, RequiredOutputs, check_objectives, total_loss
from kdlib.distillation.state_capture import StateCapture
from kdlib.distillation.teacher_cache import TeacherStates, gigabytes
from kdlib.distillation.tokenized_corpus import Masking, RankCollator, TokenizedCorpus, compared_layers, training_size
from kdlib.errors import UserError
from kdlib.models.encoder import Encoder, layer_states
from kdlib.models.masking import mask_id
from kdlib.models.mlm_head import MaskedHead, new_head
from kdlib.models.sentence import SentenceVector
from kdlib.training import checkpoints
from kdlib.training.arguments import training_arguments, training_attention
from kdlib.training.callbacks import Curve
from kdlib.training.trainer import BudgetTrainer

log = logging.getLogger(__name__)
LOGS = 50  # points of the training curve
FIT_TOKENS = 4096  # texts that the projection's start is fitted on


class DistillTrainer(BudgetTrainer):
    """Trains a student under weighted objectives, in batches of a token budget.

    The teacher runs only where a batch has no cached states, in eval mode unless spec.teacher_noise is set. TinyBERT's
    script leaves the teacher in training mode.
    """

    def __init__(
        self,
        *,
        teacher: StateCapture | None,
        teacher_layers: list[int],
        spec: config.Distill,
        masking: Masking | None,
        bf16: bool,
        sentence: SentenceVector,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.teacher, self.teacher_layers, self.sentence = teacher, teacher_layers, sentence
        self.spec, self.masking, self.bf16 = spec, masking, bf16
        self.sums: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of the objectives."""
        target = self.target(inputs, noise=self.spec.teacher_noise and model.training)
        student = model(inputs["input_ids"], inputs["attention_mask"], inputs.get("masked"))
        student = replace(student, targets=inputs.get("targets"), mask=inputs.get("counted", student.mask))
        loss, parts = total_loss(
            self.spec.objectives, student, target, self.spec.temperature, self.spec.relation_heads, self.sentence
        )
        for name, value in {"loss": loss.detach(), **parts}.items():
            self.sums.setdefault(name, []).append(value)
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def target(self, inputs: dict[str, torch.Tensor], noise: bool = False) -> ModelOutputs | None:
        """The teacher's outputs for a batch, cached or live. None where no objective needs them."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        more = {name: inputs.get(name) for name in ("translation", "translated")}
        if "layer " + str(self.teacher_layers[-1]) in inputs:
            hidden = [inputs[f"layer {layer}"] for layer in self.teacher_layers]
            return ModelOutputs(hidden, mask, embedded=inputs.get("layer 0"), **more)
        if self.teacher is None:
            return None
        self.teacher.train(noise)
        with autocast(ids.device, self.bf16):
            return replace(self.teacher(ids, mask, inputs.get("masked")), **more)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a held-out batch."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def take_means(self) -> dict[str, float]:
        """Means of the losses since the last call, of all processes."""
        means = {name: float(distributed.mean(torch.stack(values).mean())) for name, values in self.sums.items()}
        self.sums = {}
        return means

    def get_train_dataloader(self) -> DataLoader:
        """The training batches."""
        return self._loader(self.train_dataset, self.spec.batch_tokens, self.args.seed)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """The held-out batches."""
        return self._loader(self.eval_dataset, max(self.spec.batch_tokens, tokens_per_batch()))

    def _loader(self, texts: TokenizedCorpus, budget: int, seed: int = 0) -> DataLoader:
        sampler = BudgetSampler(texts.lengths, budget, seed)
        collate = RankCollator(texts, sampler, self.masking).collate
        loader = DataLoader(
            texts, batch_sampler=sampler, collate_fn=collate, pin_memory=self.args.device.type == "cuda"
        )
        # As in a single process: accelerate would distribute whole batches, and their sizes differ.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)


class Stopped(Exception):
    """The training was stopped on request, at a checkpoint. A notebook shows one line and no traceback."""

    def __init__(self, step: int, steps: int):
        super().__init__(f"at step {step:,} of {steps:,}, with a checkpoint. Run the cell again to go on from there.")

    def _render_traceback_(self) -> list[str]:  # what IPython shows instead of a traceback
        return [f"Stopped {self}"]


class _History(Curve):
    """Records the training loss at LOGS steps and the held-out loss, and stops the training on request."""

    def __init__(
        self,
        trainer: DistillTrainer,
        label: str,
        on_point: Callable[[pd.DataFrame], None] | None,
        should_stop: Callable[[], bool] | None,
    ):
        super().__init__(trainer, label)
        self.on_point, self.should_stop = on_point, should_stop

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        sums = state.log_history[-1].get("sums", {}) if state.log_history else {}
        self.trainer.sums = {name: list(torch.tensor(values, device=args.device)) for name, values in sums.items()}
        if not self.points:
            self._evaluate(state)
        self._tell()

    def _evaluate(self, state):
        self.trainer.model.eval()
        pending, self.trainer.sums = self.trainer.sums, {}
        for batch in self.trainer.get_eval_dataloader():
            self.trainer.prediction_step(self.trainer.model, batch, True)
        self._add(state, "heldout")
        self.trainer.sums = pending
        self.trainer.model.train()

    def _add(self, state, split: str) -> None:
        means = self.trainer.take_means()
        if means:
            self.add(state, split, means)

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        known = len(self.points)
        if state.global_step % max(1, state.max_steps // LOGS) == 0:
            self._add(state, "train")
        if state.global_step % args.eval_steps == 0 or state.global_step == state.max_steps:
            self._evaluate(state)
        if len(self.points) > known:
            self._tell()
        if self.should_stop and state.global_step < state.max_steps and self.should_stop():
            control.should_save = control.should_training_stop = True
        if control.should_save:  # the losses since the last point go into the checkpoint, too
            sums = {name: torch.stack(values).tolist() for name, values in self.trainer.sums.items()}
            state.log_history.append({"seconds": self.seconds(), "sums": sums})

    def _tell(self) -> None:
        if self.on_point:
            self.on_point(self.curve())

    def curve(self) -> pd.DataFrame:
        return _curve(self.points, self.trainer.spec)


def _curve(points: list[dict], spec: config.Distill) -> pd.DataFrame:
    """The points as a table. Points from a checkpoint have sorted keys, so the columns are named here."""
    objectives = [name for name, weight in spec.objectives.items() if weight]
    return pd.DataFrame(points, columns=["split", "step", "seconds", "loss", *objectives])


@dataclass
class Outcome:
    """What distillation returns.

    Attributes:
        student: the distilled model.
        curve: a table of split, step, seconds, loss and each objective.
        facts: sizes and speeds.
        head: the student's masked-language head, where an objective trained one.
        sentence: how the student's vectors are made: as the teacher's. Dense layers of a narrower student contain the
            projection.
    """

    student: PreTrainedModel
    curve: pd.DataFrame
    facts: dict
    head: MaskedHead | None = None
    sentence: SentenceVector = field(default_factory=SentenceVector)


def distill(
    teacher: Encoder,
    student: PreTrainedModel,
    train: TokenizedCorpus,
    heldout: TokenizedCorpus,
    spec: config.Distill,
    work: Path,
    seed: int = 0,
    label: str = "distilling",
    on_point: Callable[[pd.DataFrame], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Distil `teacher` into `student`. An unfinished training under `work` is resumed.

    Several processes share every batch; the student is the one of a single process, up to rounding. Cached states are
    not used where an objective needs attention or masked text. A student of another width is compared through a
    learned projection. The objectives kl and mlm train a head, which starts as the teacher's where shapes fit.

    Args:
        teacher: the encoder, in the student's vocabulary.
        student: the model to train; it is changed.
        train: training texts, from `prepare`.
        heldout: held-out texts, from `prepare`.
        spec: objectives, learning rate, batches and the rest.
        work: folder of checkpoints.
        seed: of the order, the masks and a new head.
        label: name of the progress bar.
        on_point: called with the curve whenever it has a new point.
        should_stop: asked after every step.

    Returns:
        The student with its curve and facts.

    Raises:
        UserError: where student, teacher and objectives do not fit together.
        Stopped: when `should_stop` returned true; the next call resumes.

    References:
        Jiao et al. (2020), TinyBERT; Sanh et al. (2019), DistilBERT; Cruz and Aji (2025).

    Example:
        >>> import kdlib, tempfile
        >>> from kdlib.config import Distill, Student
        >>> from kdlib.distillation.tokenized_corpus import prepare
        >>> from kdlib.models import embedded_teacher
        >>> teacher = kdlib.load_encoder(embedded_teacher.folder())
        >>> student = kdlib.build_student(teacher.model, Student(layers=1))
        >>> spec = Distill(epochs=2)
        >>> texts = prepare(teacher, ["Kumain ng mangga ang bata.", "Umulan kagabi."], spec, None, depth=1)
        >>> outcome = kdlib.distill(teacher, student, texts, texts, spec, tempfile.mkdtemp())
        >>> outcome.student.config.num_hidden_layers, outcome.facts["steps"]
        (1, 2)
    """
    check_objectives(spec.objectives)
    needs = RequiredOutputs.of(spec.objectives)
    _check_pair(teacher, student, needs, spec)
    layers, teacher_layers = compared_layers(spec, student.config.num_hidden_layers, teacher.layers)
    if needs.translation and (train.translations is None or heldout.translations is None):
        raise ValueError("the texts were prepared for objectives that need no translations")
    train, heldout = (_usable(texts, needs, spec, teacher_layers) for texts in (train, heldout))
    if spec.freeze_embeddings:
        student.get_input_embeddings().weight.requires_grad_(False)
    dropouts = {m: m.p for m in student.modules() if isinstance(m, nn.Dropout)}
    for module in dropouts:  # no dropout: the target is exact, and noise in the student only blurs it
        module.p = 0.0
    device = next(teacher.model.parameters()).device
    student.to(device)
    watched = StateCapture(
        student, layers, needs,
        _projection(student, teacher, spec, seed) if needs.states else None,
        _head(student, teacher, seed) if needs.masked else None,
    )  # fmt: skip
    target = StateCapture(teacher.model, teacher_layers, needs, head=teacher.head if needs.soft else None)
    if needs.attention:
        _tell_kinds(watched, target)
    masking = None
    if needs.masked:
        if train.maskable is None or heldout.maskable is None:
            raise ValueError("the texts were prepared for objectives that mask nothing")
        masking = Masking(
            mask_id(teacher.tokenizer, teacher.name), len(student.get_input_embeddings().weight), spec.mask, seed
        )
    steps = training_size(train, spec, seed)[0]
    compile_ = spec.compile if spec.compile is not None else device.type == "cuda"
    arguments = training_arguments(
        work, steps, spec.learning_rate, device, seed, weight_decay=spec.weight_decay, adam_beta2=spec.beta2,
        warmup_steps=int(steps * spec.warmup), bf16=teacher.bf16, torch_compile=compile_,
        eval_steps=-(-steps // spec.evaluations),
        ddp_static_graph=True, ddp_find_unused_parameters=False,  # unused parameters are the same at every step
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one GPU a process: nn.DataParallel cannot split ModelOutputs
    trainer = DistillTrainer(
        model=watched, args=arguments, train_dataset=train, eval_dataset=heldout,
        callbacks=[checkpoints.Checkpoints(max(1, steps // LOGS))],
        curve=lambda trainer: _History(trainer, label, on_point, should_stop),
        teacher=target if needs.teacher else None, teacher_layers=teacher_layers, spec=spec, masking=masking,
        bf16=teacher.bf16, sentence=teacher.sentence.to(device),
    )  # fmt: skip
    with distributed.main_process_first():  # the first process removes torn ones
        last = checkpoints.newest(work)
    if watched.projection is not None and spec.projection == "auto" and last is None:
        _fit_projection(watched, trainer, train)
    try:
        with training_attention(student):
            curve = _curve(checkpoints.train(trainer, last), spec)
    finally:
        for watcher in (watched, target):
            watcher.release().eval()
        for module, p in dropouts.items():
            module.p = p
        student.requires_grad_(True)
    if trainer.state.global_step < steps:
        raise Stopped(trainer.state.global_step, steps)
    training = float(curve["seconds"].iloc[-1])
    cached = train.cached.layers if train.cached else {}
    facts = {
        "texts": len(train), "tokens": train.tokens, "steps": steps, "training_seconds": training,
        "tokens_per_second": train.tokens * spec.epochs / max(training, 1e-9),
        "cache_gigabytes": gigabytes(train.tokens, len(cached), teacher.hidden),
        "real_token_share": BudgetSampler(train.lengths, spec.batch_tokens, seed).real_share(),
    }  # fmt: skip
    sentence = teacher.sentence.after(student.config.hidden_size, watched.projection)
    return Outcome(student, curve, facts, watched.head, sentence)


def _tell_kinds(student: StateCapture, teacher: StateCapture) -> None:
    """Warn where attention objectives compare a layer of local attention with one of global attention."""
    differ = [
        f"{mine} with {theirs}"
        for mine, theirs, *reach in zip(student.layers, teacher.layers, student.reach, teacher.reach)
        if reach[0] != reach[1]
    ]
    if differ:
        log.warning(
            "attention objectives compare local with global attention (student with teacher layer: %s); "
            "distill.layers may name others", ", ".join(differ),
        )  # fmt: skip


def _check_pair(teacher: Encoder, student: PreTrainedModel, needs: RequiredOutputs, spec: config.Distill) -> None:
    """Raise UserError where the objectives cannot compare the two models."""
    if needs.masked:
        mask_id(teacher.tokenizer, teacher.name)
    mine, theirs = student.config.num_attention_heads, teacher.model.config.num_attention_heads
    if needs.heads and mine != theirs:
        raise UserError(
            f"attention objectives compare head by head: the student has {mine} heads, the teacher {theirs}"
        )
    widths = {"student": student.config.hidden_size, "teacher": teacher.hidden}
    for name, width in widths.items():
        if needs.values and width % spec.relation_heads:
            raise UserError(
                f"distill.relation_heads is {spec.relation_heads}, which does not divide the {name}'s width of {width}"
            )
    rows, teacher_rows = (len(m.get_input_embeddings().weight) for m in (student, teacher.model))
    if rows != teacher_rows:
        raise UserError(f"the student has {rows} embedding rows, the teacher {teacher_rows}: they must share ids")
    if needs.soft and teacher.head is None:
        raise UserError(
            f"objective kl: {teacher.name} has no masked-language head; condition the teacher first "
            "(condition.use=true), or take a teacher that has one"
        )


def _usable(texts: TokenizedCorpus, needs: RequiredOutputs, spec: config.Distill, layers: list[int]) -> TokenizedCorpus:
    """The texts with the cached states of the compared layers, or without any where the teacher runs live."""
    wanted = [0] * needs.embedded + layers
    if texts.cached is None or not needs.cacheable or spec.teacher_noise or not set(wanted) <= set(texts.cached.layers):
        return texts.live()
    return replace(texts, cached=TeacherStates({n: texts.cached.layers[n] for n in wanted}, texts.cached.starts))


def _projection(student: PreTrainedModel, teacher: Encoder, spec: config.Distill, seed: int) -> nn.Linear | None:
    """The projection to the teacher's width, where one is needed. It starts as TinyBERT's, normal(0, 0.02)."""
    width = student.config.hidden_size
    if width == teacher.hidden and spec.projection == "auto":
        return None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projection = nn.Linear(width, teacher.hidden)
        nn.init.normal_(projection.weight, std=0.02)
    nn.init.zeros_(projection.bias)
    return projection.to(student.device)


@torch.no_grad()
def _fit_projection(student: StateCapture, trainer: DistillTrainer, texts: TokenizedCorpus) -> None:
    """Start the projection at the least-squares fit from the student's states to the teacher's, over a few texts.

    Each layer is divided by the teacher's variance, as in `hidden_loss`.
    """
    places = np.linspace(0, len(texts) - 1, max(1, FIT_TOKENS * len(texts) // texts.tokens)).astype(int)
    left = right = 0.0
    for start in range(0, len(places), 32):
        inputs = trainer._prepare_inputs(texts.collate(places[start : start + 32]))
        keep, theirs = inputs["attention_mask"].bool(), trainer.target(inputs)
        mine = layer_states(student.model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        pairs = list(zip([mine[layer] for layer in student.layers], theirs.hidden, strict=True))
        pairs += [(mine[0], theirs.embedded)] if student.needs.embedded else []
        for x, y in pairs:
            x, y = F.pad(x[keep].double(), (0, 1), value=1.0), y[keep].double()
            weight = 1 / y.var().clamp(min=1e-6)
            left, right = left + weight * x.T @ x, right + weight * x.T @ y
    left.diagonal().add_(1e-6 * left.diagonal().mean())  # fewer tokens than dimensions still have a solution
    fitted = torch.linalg.solve(left, right)
    student.projection.weight.copy_(fitted[:-1].T)
    student.projection.bias.copy_(fitted[-1])


def _head(student: PreTrainedModel, teacher: Encoder, seed: int) -> MaskedHead:
    """A masked-language head for the student: the teacher's weights where shapes fit, new ones elsewhere."""
    head = new_head(student, seed=seed)
    if teacher.head is not None:
        mine, theirs = head.state_dict(), teacher.head.state_dict()
        head.load_state_dict({n: theirs[n] if theirs[n].shape == mine[n].shape else mine[n] for n in mine})
        head.activation = teacher.head.activation
    return head
