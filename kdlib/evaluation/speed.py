"""Size and speed of an encoder: parameters, megabytes, latency, throughput."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from kdlib.batching import pad
from kdlib.data.tasks import Task
from kdlib.evaluation.metrics import summary
from kdlib.evaluation.probing import linear_probe, similarity, task_vectors, train_targets
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.models.onnx import FILES, OnnxEncoder, load_exported
from kdlib.progress import track

LENGTHS = (8, 16, 32, 64, 128)


def export_rows(
    encoder: Encoder,
    folder: str | Path,
    task: Task,
    texts: Sequence[str],
    runs: int = 30,
    lengths: Sequence[int] = LENGTHS,
    kinds: Sequence[str] = tuple(FILES),
) -> list[dict]:
    """Compare an exported student with the student in torch.

    Args:
        encoder: the student in torch.
        folder: where `models.onnx.export_student` wrote it.
        task: what it is probed on.
        texts: real texts, for similarity and times.
        runs: texts that are timed one at a time.
        lengths: in tokens; see `length_rows`.
        kinds: the files to compare, "onnx fp32" and "onnx int8".

    Returns:
        Rows whose method is "torch fp32" or one of `kinds`: the metrics of a linear probe with 95% intervals over test
            items;
        similarity, the mean cosine with torch's vectors, centred; megabytes of the weights; latency_ms and
        sentences_per_second of real texts (`speed_rows`) and by length (`length_rows`).
    """
    encoders = {"torch fp32": encoder} | {kind: load_exported(folder, kind) for kind in kinds}
    texts = list(texts)
    reference = text_vectors(encoder, texts)[:, 0]
    rows = []
    for method, one in encoders.items():
        train, test, places = task_vectors(one, task)
        metrics = linear_probe(task, train[:, 0], train_targets(one, task), test[:, 0], places)
        rows += [dict(method=method, task=task.name) | summary([metric]) for metric in metrics]
        same = similarity(text_vectors(one, texts)[:, 0], reference)
        rows.append(dict(method=method, metric="similarity", value=same, n=len(texts)))
        rows.append(dict(method=method, metric="megabytes", value=one.megabytes))
    timed = speed_rows(encoders, texts, runs) + length_rows(encoders, texts, lengths, runs)
    return [dict(row, model="student") for row in rows + [dict(row, method=row["model"]) for row in timed]]


def size_rows(encoder: Encoder, name: str) -> list[dict]:
    """Parameters and embedding rows, and megabytes of the weights; of an ONNX file its megabytes alone."""
    sizes = {"megabytes": encoder.megabytes}
    if not isinstance(encoder, OnnxEncoder):
        rows = len(encoder.model.get_input_embeddings().get_parameter("weight"))
        sizes = {"parameters": encoder.parameters, **sizes, "rows": rows}
    return [dict(model=name, metric=metric, value=value) for metric, value in sizes.items()]


def speed_rows(encoders: dict[str, Encoder], texts: Sequence[str], runs: int = 30, batch: int = 32) -> list[dict]:
    """Latency of one text at a time and throughput in batches, tokenisation included, in fp32.

    The encoders take turns within each round, so that noise of the machine is the same for all of them.

    Args:
        encoders: by display name.
        texts: what is timed; for latency those of middling length.
        runs: texts that are timed one at a time; of batches, a fifth as many and at least 3.
        batch: texts in a batch.

    Returns:
        Rows of latency_ms and sentences_per_second: median (value) and quartiles (low, high).
    """
    ordered = sorted(texts, key=len)
    middle = ordered[len(ordered) // 4 : 3 * len(ordered) // 4] or ordered
    singles = [[middle[i % len(middle)]] for i in range(0, runs * 7, 7)]
    batches = [
        [ordered[(start + k * len(ordered) // batch) % len(ordered)] for k in range(batch)]
        for start in range(max(3, runs // 5))
    ]
    return _timed(encoders, singles, batches, lambda encoder, group: [e.ids for e in encoder.tokenize(group)])


def length_rows(
    encoders: dict[str, Encoder], texts: Sequence[str], lengths: Sequence[int], runs: int = 30, batch: int = 32
) -> list[dict]:
    """Latency and throughput as in `speed_rows`, by length in tokens (x), tokenisation not included.

    All `texts` are joined and divided into inputs of the same number of tokens, so the encoders must share a tokenizer.
    Lengths that one of the encoders does not take are left out.
    """
    first = next(iter(encoders.values()))
    running = np.concatenate([e.ids for e in first.tokenize(list(texts))])
    longest = min(encoder.max_length for encoder in encoders.values())
    rounds = max(3, runs // 5)
    rows = []
    for length in (n for n in lengths if n <= longest):
        inputs = np.resize(running, (runs + rounds * batch, length)).tolist()
        singles, rest = [[ids] for ids in inputs[:runs]], inputs[runs:]
        batches = [rest[start : start + batch] for start in range(0, len(rest), batch)]
        rows += [row | {"x": length} for row in _timed(encoders, singles, batches, lambda _, group: group)]
    return rows


def _timed(encoders: dict[str, Encoder], singles: list[list], batches: list[list], tokens: Callable) -> list[dict]:
    """Rows of latency over `singles`, groups of one, and throughput over `batches`.

    tokens: called with an encoder and a group; gives token ids. Its time counts.
    """
    device = next(next(iter(encoders.values())).model.parameters()).device

    def seconds(encoder: Encoder, group: list) -> float:
        start = time.perf_counter()
        _forward(encoder, tokens(encoder, group))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for encoder in encoders.values():  # the first pass is slower
        seconds(encoder, batches[0])
        seconds(encoder, singles[0])
    rows = []
    for metric, groups in (("latency_ms", singles), ("sentences_per_second", batches)):
        timings: dict[str, list[float]] = {name: [] for name in encoders}
        for group in track(groups, "latency" if groups is singles else "throughput"):
            for name, encoder in encoders.items():
                taken = seconds(encoder, group)
                timings[name].append(taken * 1000 if groups is singles else len(group) / taken)
        for name, values in timings.items():
            low, value, high = np.quantile(values, [0.25, 0.5, 0.75])
            shared = dict(model=name, metric=metric, method=device.type, n=len(values))
            rows.append(shared | dict(value=value, low=low, high=high))
    return rows


@torch.inference_mode()
def _forward(encoder: Encoder, ids: list[list[int]]) -> torch.Tensor:
    tokens, mask = pad(ids, encoder.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType] - an int
    device = next(encoder.model.parameters()).device
    return encoder.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
