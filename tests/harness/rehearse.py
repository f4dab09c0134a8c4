"""The paper's profile rehearsed: every stage, arm and objective, small, on a CPU, against a stand-in hub on loopback.

    python tests/rehearse.py [--out FOLDER] [--teacher mBERT]

Teachers in the shape of mBERT, XLM-R and mDeBERTa (two random layers each), the baselines, a Wikipedia and the four
tasks are written in the hub's formats, under the names that the profile asks for; the profile is scaled down by
overrides alone. The first teacher runs all of it, the others all stages and objectives, without the baselines and the
arms that are no other for another teacher. Scores mean nothing here. Ends with the line "N passed, N failed".
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")

import datasets
import pandas as pd
import torch
from hubserver import HubServer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from transformers.utils import logging

from kdlib.config import load_profile
from kdlib.data import sources
from kdlib.data.corpus import load_corpus
from kdlib.data.tasks import DENGUE_LABELS, load_tasks
from kdlib.distillation.objectives import OBJECTIVES
from kdlib.study import arms as ablate
from kdlib.study.run import read_results
from kdlib.study.study import NOTEBOOKS, STAGES

ROOT = Path(__file__).parents[2]
HIDDEN, HEADS, FFN, ROWS = 48, 12, 96, 1500
SMALL = {"layers": 1, "hidden": HIDDEN, "ffn": FFN, "heads": HEADS}
NARROW = {"layers": 1, "hidden": 24, "ffn": 48, "heads": HEADS}


def student(sizes: dict, **more) -> dict:
    return {f"student.{name}": value for name, value in sizes.items()} | more


COMET = student(NARROW | {"heads": 6}) | {
    "distill.objectives": {"comet": 0.5, "kl": 0.5}
}  # fmt: skip
OVERRIDES = {  # all that is changed of the profile for the first teacher: sizes and counts, never what is done
    "student": {"init": "alternate", **SMALL},
    "students": {"tiny": student(NARROW), "base, not conditioned": {"condition.use": False}},
    "corpus.max_documents": 120,
    "teacher.max_length": 48,
    "condition": {"use": True, "epochs": 1, "max_texts": 60},
    "distill.epochs": 1,
    "distill.max_texts": 80,
    "distill.evaluations": 1,
    "probe": {"languages_rows": 40, "cka_sentences": 20, "train_rows": 40, "test_rows": 20, "cloze_sentences": 5},
    "benchmark.seeds": [0, 1],
    "benchmark.probe_test_rows": 40,
    "benchmark.finetune_rows": 32,
    "benchmark.finetune_test_rows": 20,
    "benchmark.finetune_epochs": 1,
    "benchmark.fewshot": [2, 4],
    "benchmark.fewshot_steps": 2,
    "benchmark.latency_runs": 3,
    "benchmark.bootstrap": 100,
    "ablations.epochs": 1,
    "ablations.max_texts": 50,
    "ablations.arms.epochs": {"1 epoch": {"distill.epochs": 1}, "2 epochs": {"distill.epochs": 2}},
    "ablations.arms.size": {
        "base": student(SMALL), "tiny": student(NARROW), "2 layers": {"student.layers": 2},
        "half of the neurons": {"student.ffn": FFN // 2, "student.narrow": "importance"},
    },
    "ablations.arms.similar work.AfroXLMR-Comet in its shape": COMET,
    "ablations.arms.similar work.AfroXLMR-Comet in its shape and 20000 rows":
        COMET | {"vocabulary.prune": True, "vocabulary.max_rows": 1000},
    "ablations.arms.start": {
        how: student(NARROW, **{"student.narrow": how}) for how in ("pca", "importance", "truncate", "random")
    },
    "ablations.arms.objective.scores of attention": {
        "distill.objectives": {"hidden": 1.0, "attention": 1.0},
        "distill.projection": "auto",
    },
    "ablations.arms.vocabulary": {
        "whole": {"vocabulary.prune": False},
        "1,000 rows": {"vocabulary.prune": True, "vocabulary.max_rows": 1000},
    },
}  # fmt: skip
FEWER = {  # besides, for the others
    "students": {"tiny": student(NARROW)},
    "baselines": {},
    "benchmark.fewshot": [2],
}
FAMILIES = ("conditioning", "objective", "similar work", "start", "vocabulary")  # of the arms that the others run
TEACHERS = {
    "mBERT": "google-bert/bert-base-multilingual-cased",
    "XLM-R": "FacebookAI/xlm-roberta-base",
    "mDeBERTa": "microsoft/mdeberta-v3-base",
}


def wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=ROWS, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def unigram(texts: list[str], special: list[str], mask: str) -> PreTrainedTokenizerFast:
    """special: the start, padding, end and unknown tokens, in the order of their ids."""
    start, padding, end, unknown = special
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=ROWS, special_tokens=[*special, mask], unk_token=unknown)
    backend.train_from_iterator(texts, trainer)
    ids = [(token, special.index(token)) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B {end}", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=padding, unk_token=unknown, cls_token=start, sep_token=end,
        mask_token=mask, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def byte_level(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=ROWS, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
        mask_token="<mask>", model_input_names=["input_ids", "attention_mask"], add_prefix_space=True,
    )  # fmt: skip


def write_models(root: Path, texts: list[str]) -> None:
    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=FFN,
        max_position_embeddings=130,
    )  # fmt: skip
    bert, roberta = wordpiece(texts), byte_level(texts)
    xlmr = unigram(texts, ["<s>", "<pad>", "</s>", "<unk>"], "<mask>")
    deberta = unigram(texts, ["[CLS]", "[PAD]", "[SEP]", "[UNK]"], "[MASK]")

    def ids(tokenizer: PreTrainedTokenizerFast) -> dict:
        found = dict(bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id)
        return found | dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)

    distil = dict(dim=HIDDEN, n_layers=2, n_heads=HEADS, hidden_dim=FFN, max_position_embeddings=130)
    made = {
        TEACHERS["mBERT"]: (bert, BertForMaskedLM(BertConfig(**sizes, **ids(bert)))),
        TEACHERS["XLM-R"]: (xlmr, XLMRobertaForMaskedLM(XLMRobertaConfig(**sizes, **ids(xlmr), type_vocab_size=1))),
        TEACHERS["mDeBERTa"]: (
            deberta,
            DebertaV2ForMaskedLM(
                DebertaV2Config(
                    **sizes, **ids(deberta), relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0,
                    position_biased_input=False, share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=32,
                )
            ),
        ),
        "distilbert/distilbert-base-multilingual-cased": (
            bert, DistilBertForMaskedLM(DistilBertConfig(**distil, **ids(bert))),
        ),
        "jcblaise/roberta-tagalog-base": (
            roberta, RobertaForMaskedLM(RobertaConfig(**sizes, **ids(roberta), type_vocab_size=1)),
        ),
    }  # fmt: skip
    for name, (tokenizer, model) in made.items():
        tokenizer.save_pretrained(root / "models" / name)
        model.save_pretrained(root / "models" / name)
    pickled = root / "models" / "jcblaise/roberta-tagalog-base"  # as it is on the hub: the profile allows it by name
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()


def parquet(file: Path, rows: list[dict], features: dict | None = None) -> None:
    table = datasets.Dataset.from_list(rows)
    table = table.cast(datasets.Features(table.features | (features or {})))
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(file)


def write_data(root: Path) -> list[str]:
    """Wikipedia and the four tasks, made of the embedded corpus and tasks; returns texts to train tokenizers on."""
    datasets.disable_progress_bars()
    home = root / "datasets"
    profile = load_profile("workshop")
    corpus = load_corpus(profile.corpus, profile.target, profile.seed)
    tasks = {task.name: task for task in load_tasks(profile.tasks, corpus)}
    pages = [
        {
            "id": d.id,
            "url": "",
            "title": d.id,
            "text": "\n\n".join([" ".join(d.sentences[:2]), " ".join(d.sentences[2:])]),
        }
        for d in corpus.train[:400]
    ]
    parquet(home / "wikimedia/wikipedia/20231101.tl/train-00000-of-00001.parquet", pages)
    (home / "wikimedia/wikipedia/README.md").write_text(
        "---\nconfigs:\n- config_name: 20231101.tl\n  data_files: [{split: train, path: 20231101.tl/train-*}]\n---\n"
    )

    def halves(name: str):
        for split, count in (("train", 160), ("test", 60)):
            part = getattr(tasks[name], split).take(count)
            yield split, list(zip(part.texts, part.targets))

    binary = datasets.ClassLabel(names=["0", "1"])
    for split, rows in halves("sentiment"):
        rows = [{"text": text, "label": str(target)} for text, target in rows]
        place = home / f"mteb/FilipinoHateSpeechClassification/data/{split}-00000-of-00001.parquet"
        parquet(place, rows, {"label": binary})
    for split, rows in halves("entailment"):
        rows = [{"premise": a, "hypothesis": b, "label": str(target)} for (a, b), target in rows]
        parquet(
            home / f"jcblaise/newsph_nli@refs/convert/parquet/default/{split}/0000.parquet", rows, {"label": binary}
        )
    tags = tasks["entities"].labels
    for split, rows in halves("entities"):
        rows = [{"tokens": words, "ner_tags": [tags[i] for i in target]} for words, target in rows]
        features = {"ner_tags": datasets.List(datasets.ClassLabel(names=tags))}
        parquet(home / f"ljvmiranda921/tlunified-ner/data/{split}-00000-of-00001.parquet", rows, features)
    (home / "jcblaise/newsph_nli").mkdir(parents=True)
    (home / "jcblaise/newsph_nli/newsph_nli.py").write_text("raise SystemExit('code of the hub was run')")
    (home / "jcblaise/dengue_filipino").mkdir(parents=True)
    with zipfile.ZipFile(home / "jcblaise/dengue_filipino/dengue_raw.zip", "w") as archive:
        for split, rows in halves("dengue"):
            table = pd.DataFrame([{"text": text, **dict(zip(DENGUE_LABELS, target))} for text, target in rows])
            out = io.StringIO()
            table.to_csv(out, index=False)
            archive.writestr(f"dengue/{split}.csv", out.getvalue())
    return [page["text"] for page in pages] + list(sources.embedded_rows("sentiment")["text"])


class Checks:
    """What was looked at, a line each; shown when all of it was, so that runs side by side do not mix."""

    def __init__(self):
        self.passed, self.failed, self.lines = 0, 0, []

    def __call__(self, what: str, holds: bool, why: str = "") -> None:
        self.passed, self.failed = self.passed + bool(holds), self.failed + (not holds)
        self.lines.append(f"  {'ok    ' if holds else 'FAILED'} {what}{'' if holds or not why else ': ' + why}")


def overrides_for(teacher: str) -> dict:
    overrides = OVERRIDES | {"teacher.source": TEACHERS[teacher]}
    if teacher == next(iter(TEACHERS)):
        return overrides
    arms = load_profile("paper", overrides).ablations.arms
    kept = {key: value for key, value in overrides.items() if not key.startswith("ablations.arms")}
    return kept | FEWER | {"ablations.arms": {family: arms[family] for family in FAMILIES}}


def kdlib(out: Path, teacher: str, environment: dict) -> subprocess.CompletedProcess:
    overrides = overrides_for(teacher)
    settings = [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "kdlib", "run", "--profile", "paper", "--out", str(out), *settings]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


def rehearse(teacher: str, out: Path, environment: dict) -> Checks:
    started, check = time.time(), Checks()
    result = kdlib(out, teacher, environment)
    inspect(teacher, out, result, check)
    print("\n".join([f"{teacher}: {time.time() - started:.0f} s", *check.lines]), flush=True)
    return check


def inspect(teacher: str, out: Path, result: subprocess.CompletedProcess, check: Checks) -> None:
    """Is everything there that a run is to leave?"""
    check("the run ends well", result.returncode == 0, (result.stderr or result.stdout)[-600:])
    table = read_results(out / "results.csv") if (out / "results.csv").is_file() else pd.DataFrame({"stage": []})
    for stage in STAGES:
        notebook = (out / "notebooks" / f"{NOTEBOOKS[stage]}.ipynb").is_file()
        check(f"stage {stage}", notebook and (stage == "figures" or (table["stage"] == stage).any()))
    if result.returncode:
        return
    profile = load_profile(out / "profile.yaml")
    arms = table[(table["stage"] == "ablations") & (table["metric"] == "heldout_loss") & table["value"].notna()]
    ran = {(row.method, row.arm) for row in arms.itertuples()}
    used: set[str] = set()
    for arm in ablate.arms(profile):
        used |= set(arm.profile.distill.objectives)
        check(f"arm {arm.family}/{arm.name}", (arm.family, arm.name) in ran)
    for objective in OBJECTIVES:
        check(f"objective {objective}", objective in used)
    bench = table[table["stage"] == "benchmark"]
    for method in ("probe", "finetune", "fewshot"):
        models = {"teacher", "student", *profile.students, *profile.baselines}
        mine = bench[(bench["method"] == method) & (bench["metric"] == "score")]
        check(f"{method} of {len(set(mine['model']))} models", models <= set(mine["model"]))
    check("paired tests", {"difference", "p_holm", "tost_p_holm"} <= set(bench["metric"]))
    perplexity = table[(table["stage"] == "condition") & (table["metric"] == "perplexity")]
    check("perplexity before and after conditioning", (perplexity["method"] == "heldout").sum() >= 2)
    check("cloze", table["metric"].isin(["cloze_top1", "pseudo_perplexity"]).any())
    check("main table", (out / "figures" / "main_table.csv").is_file())
    read = json.loads((out / "sources.json").read_text())
    check("what was read is on record", all(o["sha256"] and o["rows"] for o in read["tasks"].values()))
    check("commits are on record", bool(read["corpus"]["revision"]))
    loads = (
        "from transformers import AutoModel, AutoTokenizer as T; AutoModel.from_pretrained('.'); T.from_pretrained('.')"
    )
    plain = subprocess.run([sys.executable, "-c", loads], cwd=out / "student", capture_output=True, text=True)
    check("the student loads with plain transformers", plain.returncode == 0, plain.stderr[-300:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="where the runs lie; default a temporary folder")
    parser.add_argument("--teacher", choices=TEACHERS, action="append", help="only this one; repeatable")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        hub, out = temporary / "hub", (arguments.out or temporary / "runs").resolve()
        write_models(hub, write_data(hub))
        teachers = arguments.teacher or list(TEACHERS)
        for teacher in teachers:
            shutil.rmtree(out / teacher, ignore_errors=True)  # models of another rehearsal
        with HubServer(hub) as server, ThreadPoolExecutor(os.cpu_count()) as pool:
            one = {"OMP_NUM_THREADS": "1"}  # models so small run no faster on more; teachers side by side do
            environment = server.environment(temporary / "home") | one
            runs = [pool.submit(rehearse, teacher, out / teacher, environment) for teacher in teachers]
            missing = pool.submit(kdlib, out / "missing", teachers[0], server.environment(temporary / "empty", True))
            checks = [run.result() for run in runs]
        again = kdlib(out / teachers[0], teachers[0], server.environment(temporary / "home", offline=True) | one)
        lines = missing.result().stderr.strip().splitlines()
        check = Checks()
        check("offline, from the cache: nothing is done again", again.stdout.count("done before") == len(STAGES))
        refused = missing.result().returncode == 2 and len(lines) == 1 and "embedded" in lines[0]
        check("no hub: one line that says how to go on", refused)
        print("\n".join(check.lines))
    checks.append(check)
    passed, failed = sum(c.passed for c in checks), sum(c.failed for c in checks)
    print(f"{passed} passed, {failed} failed")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
