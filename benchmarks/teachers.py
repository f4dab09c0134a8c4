"""Pruning of teachers with the largest vocabularies, at their real sizes: processor time and memory, random weights.

python -m benchmarks.teachers [NAME ...]; `teachers.json`, and the table in docs/teachers.md. Names choose some of the
teachers; the results of the others are kept. The tokenizers have as many tokens as the real ones, made of words of
wordfreq in all its languages.
"""

import itertools
import json
import shutil
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import wordfreq
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, ModernBertConfig, PreTrainedConfig, PreTrainedTokenizerFast, XLMRobertaConfig

from benchmarks.common import HERE, WORK, machine, quiet, run_peer
from kdlib.files import new_file, write_json
from kdlib.models.tokenizer_files import save_tokenizer

RESULTS, PAGE = HERE / "teachers.json", HERE.parent / "docs" / "teachers.md"
MARKS = ("<!-- sizes: this table is written by benchmarks/teachers.py -->", "<!-- sizes: end -->")
CHOOSE, PRUNE = HERE / "peers" / "choose.py", HERE / "peers" / "prune.py"
ROUNDS = 3
XLMR = dict(
    num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=3072, type_vocab_size=1,
    max_position_embeddings=514, pad_token_id=1, bos_token_id=0, eos_token_id=2,
)  # fmt: skip


def tokens() -> Iterator[str]:
    """Words of all languages, the frequent ones first, each after its prefixes, as a BPE would have merged it."""
    lists = [wordfreq.top_n_list(code, 10**6, wordlist="best") for code in sorted(wordfreq.available_languages("best"))]
    seen = set("▁" + string.printable)
    yield from sorted(seen)
    for word in itertools.chain.from_iterable(itertools.zip_longest(*lists, fillvalue="")):
        for form in (f"▁{word}", word, f"▁{word.capitalize()}"):
            for end in range(1, len(form) + 1):
                if form[:end] not in seen:
                    seen.add(form[:end])
                    yield form[:end]


def unigram(rows: int) -> PreTrainedTokenizerFast:
    """XLM-R's kind of tokenizer: special tokens first, the mask last."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [(token, 0.0) for token in special]
    vocabulary += [(token, -5.0 - i / rows) for i, token in enumerate(itertools.islice(tokens(), rows - 5))]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        unk_token="<unk>", pad_token="<pad>", mask_token="<mask>",
    )  # fmt: skip


def fallback(rows: int) -> PreTrainedTokenizerFast:
    """Gemma's kind of tokenizer: BPE of characters, with 256 tokens for the bytes of unknown ones."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate(special)}
    merges = []
    for token in itertools.islice(tokens(), rows - len(special)):
        vocabulary[token] = len(vocabulary)
        if len(token) > 1 and token[-1] in vocabulary:
            merges.append((token[:-1], token[-1]))
    merges.sort(key=lambda pair: pair[0][0] != "▁")  # the starts of words first
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", pair="<eos> $A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", cls_token="<eos>", sep_token="<eos>",
        unk_token="<unk>", pad_token="<pad>", mask_token="<mask>",
    )  # fmt: skip


TEACHERS = {
    "mmBERT-small": (
        fallback,
        ModernBertConfig(
            vocab_size=256_000, hidden_size=384, num_hidden_layers=22, num_attention_heads=6, intermediate_size=1152,
            pad_token_id=0, eos_token_id=1, cls_token_id=1, sep_token_id=1, bos_token_id=2,
        ),
    ),
    "Glot500": (unigram, XLMRobertaConfig(vocab_size=401_145, **XLMR)),
    "XLM-V": (unigram, XLMRobertaConfig(vocab_size=901_629, **XLMR)),
}  # fmt: skip


def write(folder: Path, make, settings: PreTrainedConfig) -> None:
    """A model's folder with random weights."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModel.from_config(settings).state_dict().items()}
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    settings.save_pretrained(folder)
    save_file({n: torch.randn(shape) for n, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(make(settings.vocab_size), folder)


def measure(names: list[str]) -> list[dict]:
    rows = []
    for name in names:
        make, settings = TEACHERS[name]
        folder = WORK / "teachers"
        shutil.rmtree(folder, ignore_errors=True)
        write(folder / "full", make, settings)
        chosen = run_peer(sys.executable, CHOOSE, folder / "full", folder / "ids.npy")
        ids, out = folder / "ids.npy", folder / "pruned"
        pruned = [run_peer(sys.executable, PRUNE, folder / "full", out, ids) for _ in range(ROUNDS)]
        sizes = [(folder / part / "model.safetensors").stat().st_size / 1e6 for part in ("full", "pruned")]
        found = {
            "teacher": name, "layers": settings.num_hidden_layers, "hidden": settings.hidden_size,
            "rows": settings.vocab_size, "kept": chosen["kept"], "load_seconds": chosen["load"],
            "choose_seconds": chosen["choose"], "choose_megabytes": chosen["megabytes"],
            "prune_seconds": sorted(report["processor"] for report in pruned)[ROUNDS // 2],
            "prune_megabytes": max(report["megabytes"] for report in pruned),
            "full_megabytes": sizes[0], "pruned_megabytes": sizes[1], "machine": machine(),
        }  # fmt: skip
        print(json.dumps(found))
        rows.append(found)
        shutil.rmtree(folder)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    head = ["teacher", "layers x hidden", "rows", "kept", "tokenizer read", "tokens chosen", "memory", "files pruned"]
    lines = [[*head, "memory", "weights before", "after"], ["---"] * 11]
    for r in rows:
        lines.append(
            [r["teacher"], f"{r['layers']} x {r['hidden']}", f"{r['rows']:,}", f"{r['kept']:,}",
             *(f"{r[key]:.1f} s" for key in ("load_seconds", "choose_seconds")), f"{r['choose_megabytes']:,.0f} MB",
             f"{r['prune_seconds']:.1f} s",
             *(f"{r[key]:,.0f} MB" for key in ("prune_megabytes", "full_megabytes", "pruned_megabytes"))]
        )  # fmt: skip
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + f"\nOn {rows[0]['machine']}.\n"


def main() -> None:
    quiet()
    names = sys.argv[1:] or list(TEACHERS)
    before = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else []
    rows = [row for row in before if row["teacher"] not in names] + measure(names)
    rows.sort(key=lambda row: list(TEACHERS).index(row["teacher"]))
    write_json(RESULTS, rows)
    text = PAGE.read_text("utf-8")
    before, rest = text.split(MARKS[0], 1)
    with new_file(PAGE) as new:
        new.write_text(before + MARKS[0] + "\n" + table(rows) + MARKS[1] + rest.split(MARKS[1], 1)[1], "utf-8")


if __name__ == "__main__":
    main()
