"""Memory against the size of the text: reading, splitting, tokenising and distilling generated text of several sizes.

    python -m benchmarks.memory 10 100 1000

Sizes are in megabytes. Each is done in a process of its own. What is counted is the memory that only the process can
hold (RssAnon of Linux): pages of files that are mapped, which the system takes back when it needs room, are not in it.
Teacher and tokenizer are tiny, so that the text is what takes time and room.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

STEPS = 20  # of the distillation
STAGES = ("start", "reading", "counting", "tokenising", "distilling")
SYLLABLES = "ba be bi ka ke ki la le li ma me mi na ne ni pa pe pi sa se si ta te ti".split()


def generate(file: Path, megabytes: float) -> None:
    """Documents of 5 to 15 sentences of made-up words, a line a sentence."""
    rng, left = random.Random(0), megabytes * 1e6
    words = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in ("", *SYLLABLES[:12])]
    with file.open("w", encoding="utf-8") as out:
        while left > 0:
            lines = [" ".join(rng.choices(words, k=rng.randint(6, 18))) + "." for _ in range(rng.randint(5, 15))]
            left -= out.write("\n".join(lines) + "\n\n")


class Watch:
    """The most memory that was held in each stage, in megabytes, and its seconds."""

    def __init__(self):
        self.peaks, self.seconds, self.stage, self.began = {}, {}, STAGES[0], time.perf_counter()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._note()
            time.sleep(0.02)

    def _note(self) -> None:
        held = next(line for line in Path("/proc/self/status").open() if line.startswith("RssAnon"))
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), int(held.split()[1]) / 1024)

    def enter(self, stage: str) -> None:
        self._note()
        self.seconds[self.stage] = time.perf_counter() - self.began
        print(
            f"{self.stage}: {self.peaks[self.stage]:.0f} MB, {self.seconds[self.stage]:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        self.stage, self.began = stage, time.perf_counter()


def encoder():
    """A small BERT of random weights with a WordPiece tokenizer of syllables."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from kdlib.models.encoder import Encoder

    torch.manual_seed(0)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *SYLLABLES, *("##" + s for s in SYLLABLES)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return Encoder(BertModel(config).eval(), tokenizer, "tiny")


def work(folder: Path) -> dict:
    """Everything once with the text in `folder`: peaks and seconds of each stage, and how much text it was."""
    from kdlib.batching import BudgetSampler
    from kdlib.config import Distill, Student, load_profile
    from kdlib.data.corpus import load_corpus, sentences, windows
    from kdlib.distillation.distill import distill
    from kdlib.distillation.student_init import build_student
    from kdlib.distillation.tokenized_corpus import prepare
    from kdlib.pruning.selection import count_tokens

    watch, teacher = Watch(), encoder()
    time.sleep(0.1)
    watch.enter("reading")
    overrides = {"language": "xx", "corpus.source": str(folder / "text.txt"), "corpus.heldout": 0.001}
    profile = load_profile("workshop", overrides)
    corpus = load_corpus(profile.corpus, profile.target, profile.seed, folder)
    watch.enter("counting")
    count_tokens(teacher.tokenizer, sentences(corpus.train))
    watch.enter("tokenising")
    spec = Distill(cache=False, evaluations=1, precision="fp32", compile=False)
    train = prepare(teacher, windows(corpus.train, spec.windows), spec, folder, 2)
    heldout = prepare(teacher, sentences(corpus.heldout)[:100], spec, folder, 2)
    watch.enter("distilling")
    epochs = (STEPS + 0.5) / len(BudgetSampler(train.lengths, spec.batch_tokens))
    student = build_student(teacher.model, Student(layers=2))
    spec = spec.model_copy(update={"epochs": epochs})
    facts = distill(teacher, student, train, heldout, spec, folder / "work").facts
    watch.enter("end")
    return {"megabytes": watch.peaks, "seconds": watch.seconds} | {n: facts[n] for n in ("texts", "tokens", "steps")}


def measure(megabytes: float) -> dict:
    """`work` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "text.txt", megabytes)
        command = [sys.executable, "-m", "benchmarks.memory", "--in", folder]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        return {"text": megabytes} | json.loads(found.stdout.splitlines()[-1])


def main(sizes: list[float]) -> None:
    table = Table("text (MB)", "texts", "tokens", *(f"{stage} (MB, s)" for stage in STAGES))
    for size in sizes:
        row = measure(size)
        print(json.dumps(row), flush=True)
        cells = [f"{row['megabytes'][stage]:.0f}, {row['seconds'][stage]:.0f}" for stage in STAGES]
        table.add_row(f"{size:g}", f"{row['texts']:,}", f"{row['tokens']:,}", *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        print(json.dumps(work(Path(sys.argv[2]))))
    else:
        main([float(size) for size in sys.argv[1:]] or [10, 100, 1000])
