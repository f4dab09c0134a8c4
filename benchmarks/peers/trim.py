"""Vocabulary trimmers, in an environment of their own (transformers 4); each prints what it measured as JSON.

python trim.py slow FOLDER            writes the SentencePiece file of a folder's Unigram tokenizer, for slow tokenizers
python trim.py TOOL FOLDER OUT IDS    keeps the pieces IDS (.npy) of the model in FOLDER with TOOL, and writes OUT
python trim.py check FOLDER OUT TEXTS are the pieces and hidden states of OUT those of FOLDER, on each text (.json)?
"""

import json
import logging
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, XLMRobertaTokenizer

from benchmarks.peak import peak_megabytes

logging.disable(logging.WARNING)


def slow(folder: Path) -> dict:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    file = proto.ModelProto()
    file.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
    file.trainer_spec.unk_id, file.trainer_spec.bos_id, file.trainer_spec.eos_id = 0, 1, 2
    file.trainer_spec.pad_id = -1
    piece = proto.ModelProto.SentencePiece
    for name, kind in (("<unk>", piece.UNKNOWN), ("<s>", piece.CONTROL), ("</s>", piece.CONTROL)):
        file.pieces.add(piece=name, score=0.0, type=kind)
    for name, score in model["vocab"][4:-1]:  # fairseq's order: <s> <pad> </s> <unk> pieces <mask>
        file.pieces.add(piece=name, score=score, type=piece.NORMAL)
    (folder / "sentencepiece.bpe.model").write_bytes(file.SerializeToString())
    return {}


def vocabtrimmer(folder: Path, out: Path, ids: list[int]) -> None:
    from vocabtrimmer import VocabTrimmer

    trimmer = VocabTrimmer(str(folder))
    chosen = out.with_name("chosen.json")  # where it looks for the result of its own mining
    chosen.write_text(json.dumps(dict(zip(trimmer.tokenizer.convert_ids_to_tokens(ids), ids))))
    trimmer.trim_vocab("tl", str(out), cache_file_vocab=str(chosen))


def textpruner(folder: Path, out: Path, ids: list[int]) -> None:
    from textpruner import GeneralConfig, VocabularyPruner

    bert = json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    tokenizer = (BertTokenizer if bert else XLMRobertaTokenizer).from_pretrained(folder)
    pruner = VocabularyPruner(
        AutoModelForMaskedLM.from_pretrained(folder), tokenizer, general_config=GeneralConfig("cpu", str(out.parent))
    )
    pruner.prune(additional_token_ids=ids, save_model=False)
    pruner.save_model(out.name)


def check(folder: Path, out: Path, texts: list[str]) -> dict:
    """Shares of texts with the same pieces, and with hidden states within 1e-5; the largest difference of those."""
    encoders = [(AutoTokenizer.from_pretrained(f), AutoModel.from_pretrained(f).eval()) for f in (folder, out)]
    pieces, close, worst = 0, 0, 0.0
    for text in texts:
        tokens, states = [], []
        for tokenizer, model in encoders:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            tokens.append(tokenizer.convert_ids_to_tokens(ids[0].tolist()))
            if int(ids.max()) < model.config.vocab_size:
                with torch.no_grad():
                    states.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
        pieces += tokens[0] == tokens[1]
        if len(states) == 2 and states[0].shape == states[1].shape:
            gap = float((states[0] - states[1]).abs().max())
            close += gap < 1e-5
            worst = max(worst, gap)
    return {"pieces": pieces / len(texts), "states": close / len(texts), "largest": worst}


def main() -> None:
    what, folder, *rest = sys.argv[1:]
    folder = Path(folder)
    if what == "slow":
        report = slow(folder)
    elif what == "check":
        report = check(folder, Path(rest[0]), json.loads(Path(rest[1]).read_text("utf-8")))
    else:
        out, ids = Path(rest[0]), np.load(rest[1]).tolist()
        tool = {"vocabtrimmer": vocabtrimmer, "textpruner": textpruner}[what]
        shutil.rmtree(out, ignore_errors=True)
        __import__(what)  # imports are not counted
        start = time.perf_counter()
        tool(folder, out, ids)
        report = {"seconds": time.perf_counter() - start}
    print("\n" + json.dumps({**report, "megabytes": peak_megabytes()}))


main()
