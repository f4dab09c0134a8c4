"""One epoch of TextBrewer in an environment of its own: python brew.py FOLDER; prints what it measured as JSON.

FOLDER holds teacher/, student/ and job.pt: batches (input_ids, attention_mask), pairs of compared layers, rate, clip.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from transformers import AutoModel

folder = Path(sys.argv[1])
job = torch.load(folder / "job.pt", weights_only=True)
teacher = AutoModel.from_pretrained(folder / "teacher", attn_implementation="sdpa")
student = AutoModel.from_pretrained(folder / "student", attn_implementation="eager")  # the faster one to train on a CPU
student.get_input_embeddings().weight.requires_grad_(False)


def adapt(batch, outputs):
    return {"hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}


matches = [
    {"layer_T": theirs, "layer_S": mine, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    for mine, theirs in job["layers"]
]
trained = [p for p in student.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=job["decay"], fused=True)
with tempfile.TemporaryDirectory() as out:
    distiller = GeneralDistiller(
        TrainingConfig(device="cpu", output_dir=out, log_dir=None),
        DistillationConfig(intermediate_matches=matches),
        teacher, student, adapt, adapt,
    )  # fmt: skip
    asked = {"output_hidden_states": True}
    with distiller, torch.no_grad():
        first = float(distiller.train_on_batch(dict(job["batches"][0]), asked)[0])
    start = time.perf_counter()
    with distiller:
        distiller.train(optimizer, job["batches"], num_epochs=1, max_grad_norm=job["clip"], **asked)
    seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "first_loss": first}))
