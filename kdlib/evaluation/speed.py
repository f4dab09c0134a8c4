"""Size and speed of an encoder: parameters, megabytes, latency, throughput."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from kdlib.batching import pad
from kdlib.data.tasks import Task
from kdlib.evaluation.metrics import interval
from kdlib.evaluation.probing import linear_probe, similarity, task_vectors, train_targets
from kdlib.models.encoder import Encoder, text_vectors
from kdlib.models.onnx import FILES, FOLDER, load_exported
from kdlib.progress import track

LENGTHS = (8, 16, 32, 64, 128)


def export_rows(
    encoder: Encoder,
    folder: str | Path,
    task: Task,
    texts: Sequence[str],
    runs: int = 30,
    lengths: Sequence[int] = LENGTHS,
) -> list[dict]:
    """What the exported student in `folder` keeps and costs beside `encoder`, the student in torch.

    method says which: "torch fp32", "onnx fp32", "onnx int8". Metrics: a linear probe's on the task (95% interval over
    its test items); similarity, the mean cosine of the vectors of `texts` with torch's, centred; megabytes of the
    weights; latency_ms of one text and sentences_per_second of many, of real texts (`speed_rows`) and by the number of
    tokens, x (`length_rows`): median and quartiles.
    """
    encoders = {"torch fp32": encoder} | {kind: load_exported(folder, kind) for kind in FILES}
    texts = list(texts)
    reference = text_vectors(encoder, texts)[:, 0]
    rows = []
    for method, one in encoders.items():
        train, test, places = task_vectors(one, task)
        for metric in linear_probe(task, train[:, 0], train_targets(one, task), test[:, 0], places):
            low, high = interval([metric])
            rows.append(
                dict(
                    method=method,
                    task=task.name,
                    metric=metric.name,
                    value=metric.value,
                    low=low,
                    high=high,
                    n=len(task.test),
                )
            )
        same = similarity(text_vectors(one, texts)[:, 0], reference)
        size = encoder.parameters * 4 if one is encoder else (Path(folder) / FOLDER / FILES[method]).stat().st_size
        rows.append(dict(method=method, metric="similarity", value=same, n=len(texts)))
        rows.append(dict(method=method, metric="megabytes", value=size / 1e6))
    timed = speed_rows(encoders, texts, runs) + length_rows(encoders, texts, lengths, runs)
    return [dict(row, model="student") for row in rows + [dict(row, method=row["model"]) for row in timed]]


def size_rows(encoder: Encoder, name: str) -> list[dict]:
    """Parameters, megabytes of fp32 weights, and embedding rows."""
    parameters = encoder.parameters
    rows = {
        "parameters": parameters,
        "megabytes": parameters * 4 / 1e6,
        "rows": encoder.model.get_input_embeddings().weight.shape[0],
    }
    return [dict(model=name, metric=metric, value=value) for metric, value in rows.items()]


def speed_rows(encoders: dict[str, Encoder], texts: Sequence[str], runs: int = 30, batch: int = 32) -> list[dict]:
    """Latency of one text at a time and throughput at `batch` texts, tokenisation included, in fp32.

    The encoders take turns within each round, so that a noisy machine is noisy for all of them alike.
    latency_ms: median and quartiles over `runs` texts of middling length; sentences_per_second likewise over rounds.
    """
    ordered = sorted(texts, key=len)
    middle = ordered[len(ordered) // 4 : 3 * len(ordered) // 4] or ordered
    picked = [[middle[i % len(middle)]] for i in range(0, runs * 7, 7)]
    batches = [
        [ordered[(start + k * len(ordered) // batch) % len(ordered)] for k in range(batch)]
        for start in range(max(3, runs // 5))
    ]
    return _timed(encoders, picked, batches, lambda encoder, group: [e.ids for e in encoder.tokenize(group)])


def length_rows(
    encoders: dict[str, Encoder], texts: Sequence[str], lengths: Sequence[int], runs: int = 30, batch: int = 32
) -> list[dict]:
    """Latency and throughput as `speed_rows`, by length in tokens (x), tokenisation not included.

    What is timed are stretches of `texts` run together, as many tokens each; so the encoders must share a tokenizer.
    Lengths that an encoder does not take are left out.
    """
    first = next(iter(encoders.values()))
    running = np.concatenate([e.ids for e in first.tokenize(list(texts))])
    longest = min(encoder.max_length for encoder in encoders.values())
    rounds = max(3, runs // 5)
    rows = []
    for length in (n for n in lengths if n <= longest):
        stretches = np.resize(running, (runs + rounds * batch, length)).tolist()
        picked, rest = [[ids] for ids in stretches[:runs]], stretches[runs:]
        batches = [rest[start : start + batch] for start in range(0, len(rest), batch)]
        rows += [row | {"x": length} for row in _timed(encoders, picked, batches, lambda _, group: group)]
    return rows


def _timed(encoders: dict[str, Encoder], picked: list[list], batches: list[list], tokens: Callable) -> list[dict]:
    """Rows of latency over the groups `picked`, of one each, and throughput over `batches`.

    tokens: what makes token ids of an encoder and a group; its time counts.
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
        seconds(encoder, picked[0])
    single = {name: [] for name in encoders}
    many = {name: [] for name in encoders}
    for group in track(picked, "latency"):
        for name, encoder in encoders.items():
            single[name].append(seconds(encoder, group) * 1000)
    for group in track(batches, "throughput"):
        for name, encoder in encoders.items():
            many[name].append(len(group) / seconds(encoder, group))
    rows = []
    for metric, timings in (("latency_ms", single), ("sentences_per_second", many)):
        for name, values in timings.items():
            low, value, high = np.quantile(values, [0.25, 0.5, 0.75])
            rows.append(
                dict(model=name, metric=metric, method=device.type, value=value, low=low, high=high, n=len(values))
            )
    return rows


@torch.inference_mode()
def _forward(encoder: Encoder, ids: list[list[int]]) -> torch.Tensor:
    tokens, mask = pad(ids, encoder.tokenizer.pad_token_id)
    device = next(encoder.model.parameters()).device
    return encoder.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
