"""The model card that a student folder carries."""

import json
from pathlib import Path

import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluation.metrics import headline
from kdlib.files import new_file, read_json, write_json
from kdlib.models import embedded_teacher
from kdlib.models.loading import prefix_of
from kdlib.models.safetensors_files import HEAD_FILE
from kdlib.study.run import Run


def write_card(folder: Path, run: Run) -> None:
    """Write README.md and the sentence-transformers settings into a student's folder.

    Numbers come from the run's table of results; those not yet measured are left out, so write it again after the
    benchmark.
    """
    profile = run.profile
    teacher = embedded_teacher.NAME if profile.teacher.source == "embedded" else profile.teacher.source
    prefix = prefix_of(profile.teacher)
    licence = "mit" if profile.teacher.source == "embedded" else "other"
    corpus = (
        "the kit's own Tagalog corpus: CC0, machine-written, reread in part, "
        "not reviewed as a whole by a native speaker"
        if profile.corpus.source == "embedded"
        else profile.corpus.source
    )
    use = f'texts = ["{prefix}" + text for text in ["..."]]' if prefix else 'texts = ["..."]'
    head = f"""
Its masked-language head, trained with it, is `{HEAD_FILE}`. `kdlib.models.loading.load_encoder(".", "student").head` reads it;
plain transformers leaves it aside.
"""
    head = head if (folder / HEAD_FILE).is_file() else ""
    scripts = " (characters: scripts)" if profile.vocabulary.characters == "scripts" else ""
    text = f"""---
language: "{profile.language}"
license: {licence}
base_model: {teacher}
library_name: transformers
pipeline_tag: feature-extraction
tags: [distillation, vocabulary-pruning]
---

# A small {profile.language} encoder, distilled from {teacher}

{_counted(profile.student.layers, "layer")} started from the teacher ({profile.student.init}), \
a vocabulary pruned to the language, and
{_counted(profile.distill.epochs, "pass", "passes")} of distillation \
(objectives {", ".join(profile.distill.objectives)}) over {corpus}.
After Cruz and Aji 2025 (arXiv 2501.12660).

## Use

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained(".")
{use}
batch = tokenizer(texts, padding=True, truncation=True, max_length={profile.teacher.max_length}, return_tensors="pt")
with torch.inference_mode():
    states = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
vectors = (states * mask).sum(1) / mask.sum(1)
```

With sentence-transformers (mean pooling{" and the prefix" if prefix else ""} are set):

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer(".").encode(["..."])
```

Where this is a repository of the hub, put its name in place of the dot.

{head}
## Data

{_data(run)}

## Numbers

{_numbers(run.results())}

## Limits

- One language. Text in other scripts than the corpus's falls to the unknown token{scripts}.
- It repeats what the teacher got wrong, and knows less of rare words and long texts \
(states were compared up to {profile.teacher.max_length} tokens).
- The numbers above are of small tests; look at the intervals before choosing between models.
- Licence: the teacher's ({licence}) and the corpus's bind whoever uses it.
"""
    with new_file(folder / "README.md") as path:
        path.write_text(text, "utf-8")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    prompts = {"prompts": {"query": prefix}, "default_prompt_name": "query"} if prefix else {}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": profile.teacher.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": prompts,
    }
    for name, content in files.items():
        write_json(folder / name, content)


def _data(run: Run) -> str:
    """A line for the corpus and each task: source, commit, sizes, sha256 of the content."""
    try:
        read = read_json(run.path / "sources.json")
    except UserError:
        return "No text was read yet."
    lines = ["| what | source | commit | sizes | sha256 |", "| --- | --- | --- | --- | --- |"]
    for name, origin in {"corpus (documents)": read["corpus"], **read["tasks"]}.items():
        sizes = ", ".join(f"{split} {count:,}" for split, count in origin["rows"].items())
        lines.append(
            f"| {name} | {origin['source']} | {(origin['revision'] or '')[:12]} | {sizes} | {origin['sha256'][:12]} |"
        )
    return "\n".join(lines)


def _numbers(results: pd.DataFrame) -> str:
    rows = results[
        (results["stage"] == "benchmark") & results["model"].isin(["teacher", "student"]) & results["seed"].isna()
    ]
    rows = rows[rows["method"].isin(["probe", "finetune"])]
    best = {"score"} | {headline(kind) for kind in ("classify", "multilabel", "tokens")}
    rows = rows[rows["metric"].isin(best)].drop_duplicates(["model", "method", "task"])
    if rows.empty:
        return "Not measured yet: run the benchmark (notebook 04)."
    lines = ["| how | task | metric | teacher | student | test items |", "| --- | --- | --- | --- | --- | --- |"]
    for (method, task), group in rows.groupby(["method", "task"], sort=False):
        by = {row.model: f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in group.itertuples()}
        first = group.iloc[0]
        lines.append(
            f"| {method} | {task} | {first['metric']} | {by.get('teacher', '')} | {by.get('student', '')} "
            f"| {first['n']} |"
        )
    return "\n".join(lines) + "\n\nBrackets: 95% bootstrap intervals over seeds and test items."


def _counted(number: float, one: str, more: str = "") -> str:
    return f"{number:g} {one if number == 1 else more or one + 's'}"
