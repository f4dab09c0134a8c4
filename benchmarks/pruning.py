"""Pruning an XLM-R's vocabulary: time and memory compared with the trimmers on PyPI, and whose results are right."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedConfig, XLMRobertaConfig

from benchmarks.common import HERE, WORK, PeerMissing, in_turns, main, peer, row, run_peer, workshop
from kdlib.data.corpus import sentences
from kdlib.files import new_folder, write_json
from kdlib.models import embedded_teacher
from kdlib.models.loading import load_encoder

TOOLS = ("textpruner", "vocabtrimmer")
BASE = {
    "vocab_size": 250_002, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TRIM, PRUNE = HERE / "peers" / "trim.py", HERE / "peers" / "prune.py"


def measure(quick: bool = False) -> list[dict]:
    study = workshop(1).study
    lines = sentences(study.corpus.train)
    sizes = BASE | SMALL if quick else BASE
    large = WORK / ("xlm-roberta small" if quick else "xlm-roberta")
    if not (large / "model.safetensors").is_file():
        unigram_model(large, XLMRobertaConfig(**sizes))
    ids, few = study.selection.ids, lines[: 20 if quick else 100]
    rounds = 1 if quick else 3
    work = WORK / "pruned"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    np.save(work / "ids.npy", ids)
    write_json(work / "texts.json", few)
    given = large, work / "ids.npy"

    def ours() -> dict:
        return run(sys.executable, PRUNE, given, work / "kdlib")

    what = f"XLM-R-base shapes, {sizes['vocab_size']:,} x {sizes['hidden_size']}, {sizes['num_hidden_layers']} layers"
    what += f", {len(ids):,} tokens kept; random weights, the embedded teacher's tokenizer; imports are not counted"
    try:
        python = peer("trimmers")
        run_peer(python, TRIM, "slow", large)
        jobs = {"kdlib": ours, "textpruner": lambda: run(python, TRIM, ("textpruner", *given), work / "textpruner")}
        reports = in_turns(jobs, rounds)
        reports["vocabtrimmer"] = [run(python, TRIM, ("vocabtrimmer", *given), work / "vocabtrimmer")]
        right = {name: check(python, large, work / name, work / "texts.json") for name in reports}
        wordpiece = right_on_wordpiece(python, lines, work)
    except PeerMissing as reason:
        mine = in_turns({"kdlib": ours}, rounds)["kdlib"]
        return [
            row("pruning, compared with the fastest right peer: time", column(mine, "seconds"), unit="s", at_least=10,
                missing=reason),
            row("pruning, compared with the fastest right peer: memory", column(mine, "megabytes"), unit="MB",
                at_least=3, missing=reason),
            *absolute(mine, what),
        ]  # fmt: skip
    mine = reports["kdlib"]
    proper = [tool for tool in TOOLS if is_right(right[tool])]
    fastest = min(proper, key=lambda tool: np.median(column(reports[tool], "seconds")), default=None)
    rows = []
    for tool in TOOLS:
        for key, unit, goal in (("seconds", "s", 10), ("megabytes", "MB", 3)):
            name = f"pruning, {'time' if unit == 's' else 'memory'}, compared with {tool}"
            name += " (the fastest with right results)" * (tool == fastest)
            rows.append(
                row(name, column(mine, key), column(reports[tool], key), unit, True,
                    at_least=goal if tool == fastest else None, peers=["vocabtrimmer", "textpruner"])
            )  # fmt: skip
    rows += absolute(mine, what)
    equal = right["kdlib"]
    rows += [
        row("pruning: texts with the tokens and hidden states of the full model, as transformers 4 reads them",
            min(equal["pieces"], equal["states"]), unit="share", at_least=1),
        row("pruning: largest difference of a hidden state from the full model's", equal["largest"], at_most=0),
    ]  # fmt: skip
    for kind, found in (("Unigram", right), ("WordPiece", wordpiece)):
        for tool in TOOLS:
            theirs, own = found[tool], found["kdlib"]
            rows.append(
                row(f"right results, {kind}: texts with the full model's tokens and states, compared with {tool}",
                    min(own["pieces"], own["states"]), min(theirs["pieces"], theirs["states"]), "share",
                    note=f"{tool}, {kind}: {theirs['error']}" if "error" in theirs else "",
                    peers=["vocabtrimmer", "textpruner"])
            )  # fmt: skip
    shutil.rmtree(work)
    return rows


def run(python, script: Path, given: tuple, out: Path) -> dict:
    """A tool's report; given: what comes before OUT and, last, after it."""
    *before, ids = given
    return run_peer(python, script, *before, out, ids)


def column(reports: list[dict], key: str) -> list[float]:
    return [report[key] for report in reports]


def absolute(mine: list[dict], what: str) -> list[dict]:
    return [
        row("pruning XLM-R-base: time", column(mine, "seconds"), unit="s", at_most=5, note=what),
        row("pruning XLM-R-base: memory", column(mine, "megabytes"), unit="MB", at_most=1500),
    ]


def check(python: Path, full: Path, pruned: Path, texts: Path) -> dict:
    """Shares of texts with the same pieces and states; 0 where the result cannot be used, with the error."""
    try:
        return run_peer(python, TRIM, "check", full, pruned, texts)
    except PeerMissing as reason:
        return {"pieces": 0.0, "states": 0.0, "largest": float("inf"), "error": str(reason)}


def is_right(found: dict) -> bool:
    return found["pieces"] == found["states"] == 1


def right_on_wordpiece(python: Path, lines: list[str], work: Path) -> dict[str, dict]:
    """Whose results are right for a small cased BERT: every tool's `check`."""
    folder = work / "bert"
    wordpiece_model(folder, lines)
    encoder = load_encoder(folder, "bert")
    ids = sorted({i for e in encoder.tokenize(lines[:2000]) for i in e.ids} | set(encoder.tokenizer.all_special_ids))
    np.save(work / "bert.npy", ids)
    found = {}
    for tool in ("kdlib", *TOOLS):
        out = work / f"bert {tool}"
        given = (folder, work / "bert.npy")
        try:
            if tool == "kdlib":
                run(sys.executable, PRUNE, given, out)
            else:
                run(python, TRIM, (tool, *given), out)
        except PeerMissing as reason:
            found[tool] = {"pieces": 0.0, "states": 0.0, "error": str(reason)}
            continue
        found[tool] = check(python, folder, out, work / "texts.json")
    return found


def unigram_model(folder: Path, settings: PreTrainedConfig) -> None:
    """A masked model of XLM-R's kind with random weights, and the embedded teacher's tokenizer."""
    source = embedded_teacher.folder()
    with new_folder(folder) as new:
        save_random(settings, new)
        shutil.copy(source / "tokenizer.json", new)
        spec = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
        write_json(new / "tokenizer_config.json", spec | {"tokenizer_class": "XLMRobertaTokenizer"})


def wordpiece_model(folder: Path, lines: list[str]) -> None:
    """A small cased masked BERT with random weights, and a tokenizer learnt from `lines`."""
    tokenizer = BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    tokenizer.train_from_iterator(lines, vocab_size=8000, show_progress=False)
    ends = [(piece, tokenizer.token_to_id(piece)) for piece in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = BertProcessing(*ends)  # transformers 4 takes the file as it is
    with new_folder(folder) as new:
        save_random(BertConfig(vocab_size=tokenizer.get_vocab_size(), **SMALL), new)
        tokenizer.save(str(new / "tokenizer.json"))
        tokenizer.save_model(str(new))
        write_json(
            new / "tokenizer_config.json",
            {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": False},
        )


def save_random(settings: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(settings).save_pretrained(folder)


if __name__ == "__main__":
    main(measure)
