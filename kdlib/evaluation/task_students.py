"""A model for one task: a student learns from labels and from the teacher's soft labels for texts without labels.

The result is a plain transformers model. It reads texts without a prefix, so that a pipeline can use it as it is.
"""

import copy
import functools
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel, set_seed

from kdlib import config
from kdlib.data.tasks import Split, Task
from kdlib.errors import UserError
from kdlib.evaluation.benchmark import Trial, load_metrics, save_metrics
from kdlib.evaluation.finetuning import IGNORE, Rows, Tokens, answers, fit_linear, label_loss, outputs, train, trained
from kdlib.evaluation.metrics import Metric, score
from kdlib.evaluation.tf_idf import tf_idf
from kdlib.files import fingerprint, new_file, read_or_none
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.models.sentence import SentenceVector, mean_pool

log = logging.getLogger(__name__)
SOFT, HARD = "student on soft labels", "student on labels"  # names in results
PROBLEMS = {"multilabel": "multi_label_classification", "tokens": None}


@dataclass
class SoftLabels:
    """What the teacher says of texts.

    Args:
        texts: as in a `Split`.
        logits: float32 [labels] of each text; of kind tokens [words, labels], NaN for a truncated word.
        vectors: float32 [texts, hidden] or [texts, 0], the fine-tuned teacher's vectors of the texts.
    """

    texts: list
    logits: list[np.ndarray]
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def pick(self, places: Sequence[int]) -> "SoftLabels":
        """The texts with these numbers."""
        found = [self.texts[i] for i in places], [self.logits[i] for i in places]
        return SoftLabels(*found, self.vectors[list(places)])


def teach(
    teacher: Encoder,
    task: Task,
    texts: Sequence,
    spec: config.Benchmark,
    seed: int,
    hidden: bool = False,
    work: Path | None = None,
) -> tuple[list | np.ndarray, SoftLabels]:
    """Fine-tune the teacher on a task's training rows.

    Args:
        teacher: it is not changed.
        task: its training rows are what the teacher learns.
        texts: of the task's kind, without labels.
        spec: settings of the fine-tuning; at least `fewshot_steps` steps.
        seed: of the head, dropout and order.
        hidden: whether to compute vectors; without, they have width 0.
        work: folder of checkpoints; the caller removes it.

    Returns:
        Its predictions for the test rows, and its soft labels for the training rows and the texts, in this order.
    """
    tokens = Tokens(teacher, spec.finetune_max_length)
    model = trained(teacher, task, spec, seed, tokens, spec.fewshot_steps, work)
    found = [*task.train.texts, *texts]
    test, read = (Rows(tokens, task.kind, Split(some, [None] * len(some))) for some in (task.test.texts, found))
    vectors = np.empty((len(found), 0), np.float32)
    if hidden:
        tuned = replace(tokens.encoder, model=model.encoder, vector_cache=None, sentence=SentenceVector())
        vectors = text_vectors(tuned, found, label=f"{teacher.name}: labelling for {task.name}")[:, 0]
    soft = SoftLabels(found, outputs(model, read, teacher.bf16), vectors)
    return answers(outputs(model, test, teacher.bf16), task.kind), soft


def confidence(logits: np.ndarray, kind: str) -> float:
    """The probability of the most probable label: the mean over words (tokens), or over labels (multilabel)."""
    if kind == "multilabel":
        sure = 1 / (1 + np.exp(-np.abs(logits)))
        return float(sure.mean())
    logits = logits[~np.isnan(logits).any(-1)] if kind == "tokens" else logits
    shifted = np.exp(logits - logits.max(-1, keepdims=True)) if logits.size else np.ones(1)
    return float((1 / shifted.sum(-1)).mean())


def chosen(soft: SoftLabels, task: Task, spec: config.TaskStudent, seed: int) -> SoftLabels:
    """The soft labels of which the teacher is sure, and with `spec.balance` as many texts of every class.

    Args:
        soft: of texts without labels.
        task: says what the classes are.
        spec: its confidence and balance.
        seed: draws the texts of the larger classes.
    """
    sure = [i for i, logits in enumerate(soft.logits) if confidence(logits, task.kind) >= spec.confidence]
    found = soft.pick(sure)
    if not sure or not spec.balance:
        return found
    labels = [np.asarray(label).tolist() for label in answers(found.logits, task.kind)]
    counts = Counter(name for label in labels for name in task.classes(label))
    numbered = replace(task, train=Split(list(range(len(found))), labels))
    return found.pick(numbered.few(math.ceil(len(found) / len(counts)), None, seed).train.texts)


class SoftRows(Rows):
    """Labelled rows, and texts that have soft labels only.

    Args:
        tokens: of the student.
        task: its training rows are the labelled rows.
        soft: soft labels of the training rows and, after them, of other texts; None: the labels alone.
    """

    def __init__(self, tokens: Tokens, task: Task, soft: SoftLabels | None):
        texts = list(soft.texts) if soft else task.train.texts
        targets = [*task.train.targets, *[None] * (len(texts) - len(task.train))]
        super().__init__(tokens, task.kind, Split(texts, targets))
        self.soft = soft

    def collate(self, batch: list[int]) -> dict[str, torch.Tensor]:
        """A padded batch with labels, soft labels (NaN for tokens that have none) and the teacher's vectors."""
        inputs = super().collate(batch)
        if self.soft is None:
            return inputs
        logits = [torch.from_numpy(self.soft.logits[i]) for i in batch]
        if self.kind == "tokens":
            soft = torch.full((*inputs["input_ids"].shape, logits[0].shape[-1]), math.nan)
            for r, i in enumerate(batch):
                for word, at in self.rows[i].firsts:
                    soft[r, at] = logits[r][word]
        else:
            soft = torch.stack(logits)
        return inputs | {"soft": soft, "vectors": torch.from_numpy(self.soft.vectors[batch])}


class Learner(nn.Module):
    """A plain transformers model with the loss of labels and soft labels.

    loss = (1 - share) * label loss + share * soft loss + hidden * distance of vectors; without soft labels the label
    loss alone.

    Args:
        model: a model for sequence or token classification.
        kind: of the task.
        spec: settings of the losses.
    """

    def __init__(self, model: PreTrainedModel, kind: str, spec: config.TaskStudent):
        super().__init__()
        self.model, self.kind, self.spec = model, kind, spec

    def forward(
        self, input_ids, attention_mask, token_type_ids=None, labels=None, soft=None, vectors=None
    ) -> dict[str, torch.Tensor]:
        """Logits of a batch and, with labels, the loss."""
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask)
        inputs |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(**inputs, output_hidden_states=soft is not None and self.spec.hidden > 0)
        logits = output.logits.float()
        if labels is None:
            return {"logits": logits}
        known = ~labels.isnan().any(-1) if self.kind == "multilabel" else labels != IGNORE
        loss = label_loss(self.kind, logits[known], labels[known]) if known.any() else 0 * logits.sum()
        if soft is not None:
            loss = (1 - self.spec.share) * loss
            loss = loss + self.spec.share * soft_loss(self.kind, logits, soft, self.spec.temperature)
            if self.spec.hidden:
                own = mean_pool(output.hidden_states[-1].float(), attention_mask)
                loss = loss + self.spec.hidden * nn.functional.mse_loss(own, vectors) / vectors.var()
        return {"loss": loss, "logits": logits}


def soft_loss(kind: str, logits: torch.Tensor, soft: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence of the teacher's probabilities at a temperature T from the student's, times T squared.

    Args:
        kind: of the task; for multilabel each label is a probability of its own, and the mean is over labels too.
        logits: the student's [..., labels].
        soft: the teacher's logits [..., labels]; where they are NaN nothing is compared.
        temperature: T; both logits are divided by it.

    References:
        Hinton, Vinyals and Dean (2015), *Distilling the Knowledge in a Neural Network*, section 2.
    """
    known = ~soft.isnan().any(-1)
    student, teacher = logits[known] / temperature, soft[known] / temperature
    if not len(student):
        return 0 * logits.sum()
    if kind == "multilabel":
        entropy = nn.functional.binary_cross_entropy_with_logits
        found = entropy(student, teacher.sigmoid()) - entropy(teacher, teacher.sigmoid())
    else:
        given = (student.log_softmax(-1), teacher.log_softmax(-1))
        found = nn.functional.kl_div(*given, reduction="batchmean", log_target=True)
    return temperature**2 * found


def plain_auto(kind: str) -> type:
    """The class of transformers that loads the model of a kind of task."""
    return AutoModelForTokenClassification if kind == "tokens" else AutoModelForSequenceClassification


def plain_model(encoder: Encoder, task: Task) -> PreTrainedModel:
    """The encoder as a plain transformers model for a task, with label names and a new random head.

    Raises:
        UserError: for a family that has no such model.
    """
    settings = copy.deepcopy(encoder.model.config)
    settings.id2label = dict(enumerate(task.labels))
    settings.label2id = {label: i for i, label in enumerate(task.labels)}
    settings.problem_type = PROBLEMS.get(task.kind, "single_label_classification")
    auto = plain_auto(task.kind)
    try:
        model = auto.from_config(settings)
    except ValueError:
        raise UserError(f"{encoder.name}: transformers has no {auto.__name__[9:]} of {settings.model_type}") from None
    weights = encoder.model.state_dict()
    if absent := [name for name in model.base_model.load_state_dict(weights, strict=False)[0] if "pooler" not in name]:
        raise UserError(f"{encoder.name}: weights are missing, such as {absent[0]}")
    return model.to(encoder.model.device)


def fit_start(model: PreTrainedModel, rows: Rows) -> None:
    """Set the head to the logistic regression of its own features on labelled rows, as `finetuning.fit_head` does.

    A square layer of the head starts as the identity, so that the features are the encoder's states.
    """
    body = {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_modules() if "pooler" not in name}
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name not in body]
    for layer in layers[:-1]:
        if layer.in_features == layer.out_features:
            nn.init.eye_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    found, labels, last = [], [], layers[-1]
    hook = last.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            batch = rows.collate(list(range(start, min(start + 16, len(rows)))))
            labels.append(batch.pop("labels"))
            model.eval()(**{name: value.to(model.device) for name, value in batch.items()})
    hook.remove()
    if rows.kind == "tokens":
        known = [label != IGNORE for label in labels]
        found = [part[mask.to(part.device)] for part, mask in zip(found, known)]
        labels = [label[mask] for label, mask in zip(labels, known)]
    states, targets = torch.cat(found).float().clone(), torch.cat(labels).to(model.device)
    fit_linear(last, rows.kind, states, targets)


def learn(
    student: Encoder,
    task: Task,
    soft: SoftLabels | None,
    spec: config.TaskStudent,
    tuning: config.Benchmark,
    seed: int,
    work: Path | None = None,
) -> tuple[PreTrainedModel, list | np.ndarray]:
    """Train a student for a task.

    Args:
        student: it is not changed.
        task: its training rows have labels.
        soft: soft labels of the training rows and of other texts, from `teach`; None: the labels alone.
        spec: settings.
        tuning: batch size, frozen embeddings and the start of the head; at least `fewshot_steps` steps.
        seed: of dropout, order and drawn texts.
        work: folder of checkpoints; the caller removes it.

    Returns:
        The model, and its predictions for the test rows.

    Raises:
        UserError: for a family without such models, or another width than the teacher's with `spec.hidden`.
    """
    set_seed(seed)
    tokens = Tokens(replace(student, prefix=""), tuning.finetune_max_length)
    labelled, steps = len(task.train), tuning.fewshot_steps
    if soft is not None:
        if spec.hidden and soft.vectors.shape[1] != student.hidden:
            raise UserError("task_student.hidden: needs a student as wide as the teacher; set it to 0")
        others = chosen(soft.pick(range(labelled, len(soft))), task, spec, seed)
        known = soft.pick(range(labelled))
        vectors = np.concatenate([known.vectors, others.vectors])
        soft = SoftLabels([*known.texts, *others.texts], [*known.logits, *others.logits], vectors)
        if spec.share == 0 and not spec.hidden:  # the labels alone, for as many steps
            steps = max(
                steps, math.ceil(spec.epochs * len(SoftRows(tokens, task, soft).sampler(tuning.finetune_batch, seed)))
            )
            soft = None
    model = plain_model(student, task)
    if tuning.finetune_head == "probe":
        fit_start(model, SoftRows(tokens, task, None))
    label = f"{student.name}: {task.name}, {'soft labels' if soft else 'labels'}, seed {seed}"
    learner, rows = Learner(model, task.kind, spec), SoftRows(tokens, task, soft)
    train(
        learner, model.base_model, rows, tuning, seed, label, student.bf16, spec.epochs, spec.learning_rate, steps, work
    )
    tested = Rows(tokens, task.kind, task.test)
    return model, answers(outputs(learner, tested, student.bf16), task.kind)


def save_soft(file: Path, soft: SoftLabels, predicted: list | np.ndarray) -> None:
    """Write the teacher's soft labels, without their texts, and its predictions for the test rows."""
    rows = [np.atleast_2d(logits) for logits in soft.logits]
    answer = [np.atleast_1d(np.asarray(label)) for label in predicted]
    with new_file(file) as path:
        np.savez_compressed(
            path, logits=np.concatenate(rows), counts=[len(row) for row in rows], vectors=soft.vectors,
            predicted=np.concatenate(answer), answers=[len(row) for row in answer],
        )  # fmt: skip


def load_soft(file: Path, texts: list, kind: str) -> tuple[list | np.ndarray, SoftLabels]:
    """Read what `save_soft` wrote: the predictions, and the soft labels of these texts."""
    with np.load(file, allow_pickle=False) as kept:
        logits = np.split(kept["logits"], np.cumsum(kept["counts"])[:-1])
        predicted = np.split(kept["predicted"], np.cumsum(kept["answers"])[:-1])
        vectors = kept["vectors"]
    if kind == "tokens":
        return [words.tolist() for words in predicted], SoftLabels(texts, logits, vectors)
    given = np.stack(predicted) if kind == "multilabel" else np.concatenate(predicted)
    return given, SoftLabels(texts, [row[0] for row in logits], vectors)


def task_trials(
    teacher: Callable[[], Encoder],
    student: Callable[[], Encoder],
    task: Task,
    texts: Callable[[], list],
    spec: config.TaskStudent,
    tuning: config.Benchmark,
    x: int,
    seed: int,
    arms: Sequence[str],
    folder: Path,
    key: str,
) -> list[Trial]:
    """Learn a task from `x` labelled rows per class: tf-idf, the teacher, and the student with and without soft labels.

    All have the same labelled rows and test rows, so the trials are paired. Each is kept in `folder` once it is done.

    Args:
        teacher: gives the teacher; called when a trial needs it.
        student: gives the student.
        task: the whole task.
        texts: gives the texts without labels.
        spec: settings of the student.
        tuning: settings of the fine-tuning.
        x: labelled rows per class.
        seed: draws the labelled rows; also of heads, dropout and order.
        arms: names of the arms in `spec.arms` that are learned too.
        folder: where trials and soft labels are kept.
        key: a fingerprint of all that the trials depend on besides `spec`, `x` and `seed`.
    """
    few = task.few(x, tuning.finetune_test_rows, seed)
    hidden = spec.hidden > 0 or any(spec.arm(name).hidden for name in arms)
    work = folder / f"{fingerprint(key, x, seed)}-checkpoints"

    @functools.cache
    def taught() -> tuple[list | np.ndarray, SoftLabels]:
        file = folder / f"{fingerprint(key, 'soft', x, seed, hidden)}.npz"
        given = texts()
        read = [*few.train.texts, *given]
        found = read_or_none(file, lambda path: load_soft(path, read, task.kind), "the texts are labelled again")
        if found is None:
            found = teach(teacher(), few, given, tuning, seed, hidden, work)
            save_soft(file, found[1], found[0])
            shutil.rmtree(work, ignore_errors=True)
        return found

    def student_of(settings: config.TaskStudent, soft: bool) -> list[Metric]:
        given = taught()[1] if soft else None
        return score(few, learn(student(), few, given, settings, tuning, seed, work)[1])

    plain = spec.model_copy(update={"rows": [], "arms": {}})
    makers: dict[str, tuple[Callable[[], list[Metric]], config.TaskStudent | None]] = {
        "tf-idf": (lambda: tf_idf(few)(seed), None),
        "teacher": (lambda: score(few, taught()[0]), None),
        HARD: (lambda: student_of(plain, False), plain),
        SOFT: (lambda: student_of(plain, True), plain),
    }
    for name in arms:
        arm = spec.arm(name).model_copy(update={"rows": []})
        makers[f"{SOFT}: {name}"] = (lambda arm=arm: student_of(arm, True), arm)
    trials = []
    for name, (make, settings) in makers.items():
        kind = name if settings is None else name == HARD
        file = folder / f"{fingerprint(key, kind, settings and settings.model_dump(), x, seed)}.npz"
        metrics = load_metrics(file)
        if metrics is None:
            metrics = make()
            save_metrics(file, metrics, dict(model=name, task=task.name, method="task", x=x, seed=seed))
            shutil.rmtree(work, ignore_errors=True)
        trials.append(Trial(name, task.name, "task", seed, metrics, x))
    return trials
