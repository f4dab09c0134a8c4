"""Size and speed of an encoder: parameters, megabytes, latency, throughput."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from kdlib.encoder import Encoder, pad
from kdlib.progress import track


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
    device = next(next(iter(encoders.values())).model.parameters()).device
    single = {name: [] for name in encoders}
    many = {name: [] for name in encoders}
    picked = [middle[i % len(middle)] for i in range(0, runs * 7, 7)]
    batches = [
        [ordered[(start + k * len(ordered) // batch) % len(ordered)] for k in range(batch)]
        for start in range(max(3, runs // 5))
    ]
    for encoder in encoders.values():
        _encode(encoder, batches[0])
    for text in track(picked, "latency"):
        for name, encoder in encoders.items():
            single[name].append(_seconds(encoder, [text], device) * 1000)
    for group in track(batches, "throughput"):
        for name, encoder in encoders.items():
            many[name].append(len(group) / _seconds(encoder, group, device))
    rows = []
    for metric, timings in (("latency_ms", single), ("sentences_per_second", many)):
        for name, values in timings.items():
            low, value, high = np.quantile(values, [0.25, 0.5, 0.75])
            rows.append(
                dict(model=name, metric=metric, method=device.type, value=value, low=low, high=high, n=len(values))
            )
    return rows


def _seconds(encoder: Encoder, texts: list[str], device: torch.device) -> float:
    start = time.perf_counter()
    _encode(encoder, texts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def _encode(encoder: Encoder, texts: list[str]) -> torch.Tensor:
    ids, mask = pad([e.ids for e in encoder.tokenize(texts)], encoder.tokenizer.pad_token_id)
    device = next(encoder.model.parameters()).device
    return encoder.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
