"""Fast students: the student in ONNX Runtime, float32 and 8-bit, compared with torch: latency, throughput, accuracy."""

import shutil

import pandas as pd

from benchmarks.common import WORK, main, row, workshop
from kdlib.data.corpus import sentences
from kdlib.distillation.tokenized_corpus import with_states
from kdlib.evaluation.speed import export_rows
from kdlib.models.encoder import Encoder
from kdlib.models.onnx import export_student

TORCH, KINDS = "torch fp32", ("onnx fp32", "onnx int8")


def measure(quick: bool = False) -> list[dict]:
    job = workshop(64 if quick else 512)
    study, source = job.study, job.study.source
    model, depth = job.student(), study.profile.student.layers
    job.epoch(with_states(job.train, source, job.spec, study.run.path / "cache", depth), model)
    student = Encoder(model.eval(), source.tokenizer, "student", source.prefix, source.max_length)
    folder = WORK / "fast"
    shutil.rmtree(folder, ignore_errors=True)
    export_student(student, folder)
    task = next(task for task in study.tasks if task.name == "topic")
    lengths = (8, 32) if quick else (8, 32, 128)
    found = pd.DataFrame(
        export_rows(student, folder, task, sentences(study.corpus.heldout)[:200], 6 if quick else 30, lengths)
    )
    shutil.rmtree(folder)

    def both(kind: str, metric: str, length: int | None = None) -> tuple[float, float]:
        rows = found[found.metric == metric]
        rows = rows[rows.x.isna()] if length is None else rows[rows.x == length]
        values = rows.set_index("method").value
        return float(values[kind]), float(values[TORCH])

    metric = found[found.task == task.name].metric.iloc[0]
    how = f"a student after one epoch on {len(job.texts)} texts; {metric} of a linear probe on {task.name}"
    rows = []
    for kind in KINDS:
        rows += [
            row(
                f"{kind}: latency of one text, compared with {TORCH}",
                *both(kind, "latency_ms"),
                "ms",
                True,
                at_least=1,
                note=how,
            ),
            row(
                f"{kind}: texts in batches of 32, compared with {TORCH}", *both(kind, "sentences_per_second"), "texts/s"
            ),
        ]
        for length in lengths:
            rows.append(
                row(f"{kind}: batches of 32 texts of {length} tokens, compared with {TORCH}",
                    *both(kind, "sentences_per_second", length), "texts/s")
            )  # fmt: skip
        rows.append(row(f"{kind}: size", *both(kind, "megabytes"), "MB", True))
        rows.append(
            row(f"{kind}: {metric}, {task.name}, compared with {TORCH}", *both(kind, metric), metric, at_least=0.97)
        )
    return rows


if __name__ == "__main__":
    main(measure)
