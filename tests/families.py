"""Small random teachers of every family, with its quirks and a tokenizer of its kind, and the stages each must pass."""

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import tiny
import torch
import transformers
from pruning.pairs import (
    ACCENTED,
    FOREIGN,
    fill,
    train_bpe,
    train_fallback,
    train_llama,
    train_unigram,
    train_wordpiece,
)

import kdlib
from kdlib import config
from kdlib.distillation.conditioning import condition
from kdlib.distillation.distill import distill
from kdlib.distillation.objectives import OBJECTIVES
from kdlib.distillation.tokenized_corpus import prepare
from kdlib.evaluation.probing import layer_probe
from kdlib.models.encoder import layer_states, text_vectors
from kdlib.models.tokenizer_files import save_tokenizer
from kdlib.pruning.selection import select_tokens
from kdlib.pruning.verify import verify

LAYERS, HEADS = 7, 4  # ModernBERT's kinds of layers repeat every three
SIZES = dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48)
TEACHERS = {  # family: class, tokenizer, settings
    "bert": ("Bert", train_wordpiece, {}),
    "distilbert": ("DistilBert", train_wordpiece, dict(dim=32, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48)),
    "electra": ("Electra", train_wordpiece, dict(embedding_size=24)),
    "mpnet": ("MPNet", train_unigram, {}),
    "roberta": ("Roberta", train_bpe, dict(type_vocab_size=1)),
    "camembert": ("Camembert", train_unigram, dict(type_vocab_size=1)),
    "xlm-roberta": ("XLMRoberta", train_unigram, dict(type_vocab_size=1)),
    "xlm-roberta-xl": ("XLMRobertaXL", train_unigram, dict(type_vocab_size=1)),
    "deberta-v2": (
        "DebertaV2", train_unigram,
        dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
             share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=32),
    ),
    "rembert": ("RemBert", train_unigram, dict(input_embedding_size=16, output_embedding_size=24)),
    "modernbert": (
        "ModernBert", train_fallback,
        dict(local_attention=8, rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 160_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
        }),
    ),
    "eurobert": ("EuroBert", train_llama, dict(num_key_value_heads=2)),
    "gte": ("Gte", train_unigram, {}),
}  # fmt: skip
WITHOUT_HEAD = ("rembert", "eurobert")  # their output matrix is not tied to the embeddings


def write_teacher(family: str, folder: Path, texts: list[str]) -> Path:
    """A random teacher with more embedding rows than tokens, as `transformers` writes it."""
    name, train, settings = TEACHERS[family]
    tokenizer = train(texts)
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos", "cls", "sep", "mask")}
    sizes = SIZES if family != "distilbert" else {}
    Config, Model = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForMaskedLM"))
    made = Config(vocab_size=len(tokenizer) + 5, max_position_embeddings=140, **sizes, **ids, **settings)
    fill(Model(made)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


class Stages:
    """What is done with one teacher, a method a stage. Each leaves what the next ones use."""

    def __init__(self, family: str, folder: Path, texts: list[str], corpus: list[str]):
        self.family, self.folder, self.corpus = family, folder, corpus
        write_teacher(family, folder / "teacher", texts)

    def load(self):
        """Load the folder; its head is used where it is tied."""
        self.teacher = kdlib.load_encoder(self.folder / "teacher", max_length=24)
        assert self.teacher.layers == LAYERS
        assert (self.teacher.head is None) == (self.family in WITHOUT_HEAD)

    def probe(self):
        """Probe every layer."""
        scores = layer_probe(self.teacher, tiny.task("classify"), 40, 20)
        assert {row["layer"] for row in scores if row["model"] == "teacher"} == set(range(LAYERS + 1))

    def prune(self):
        """Prune the files, exactly."""
        ids = select_tokens(self.teacher.tokenizer, self.corpus).ids
        kdlib.prune_encoder(self.teacher, ids, self.folder / "pruned", self.folder / "teacher")
        self.pruned = kdlib.load_encoder(self.folder / "pruned", max_length=24)
        assert len(self.pruned.model.get_input_embeddings().weight) == len(ids) < len(self.teacher.tokenizer)
        checked = verify(self.teacher, self.pruned, np.array(ids), self.corpus)
        assert (checked["checked"] == checked["holds"]).all(), checked

    def condition(self):
        """Train by masked language modelling."""
        spec = config.Condition(use=True, epochs=1, batch_tokens=256)
        outcome = condition(self.pruned, self.corpus[:40], self.corpus[40:60], spec, self.folder / "condition")
        assert np.isfinite(outcome.facts["perplexity_after"])
        self.pruned = replace(outcome.encoder, name="teacher")

    def copy(self):
        """Copy layers: a student of all layers is the teacher."""
        whole = kdlib.build_student(self.pruned.model, config.Student(layers=LAYERS, init=list(range(1, LAYERS + 1))))
        assert all(torch.equal(value, whole.state_dict()[n]) for n, value in self.pruned.model.state_dict().items())
        self.student = kdlib.build_student(self.pruned.model, config.Student(layers=3))
        inputs = dict(input_ids=torch.tensor([encoding.ids for encoding in self.pruned.tokenize(self.corpus[:1])]))
        first = [layer_states(model, **inputs)[0] for model in (self.pruned.model, self.student)]
        assert torch.equal(*first)

    def narrow(self):
        """Narrow width, heads and feed-forward layers."""
        sample = [encoding.ids for encoding in self.pruned.tokenize(self.corpus)]
        for how in ("pca", "truncate", "random"):
            spec = config.Student(layers=3, hidden=16, heads=2, ffn=24, narrow=how)
            narrow = kdlib.build_student(self.pruned.model, spec, sample=sample)
            ids = torch.tensor([self.pruned.tokenize(self.corpus[:1])[0].ids])
            states = narrow(input_ids=ids).last_hidden_state
            assert states.shape[-1] == 16 and states.isfinite().all()

    def objective(self, name: str):
        """Distil with one objective; the loss falls."""
        sizes = dict(epochs=3, batch_tokens=256, learning_rate=5e-3, evaluations=1, relation_heads=HEADS)
        spec = config.Distill(objectives={name: 1.0}, **sizes)
        student = kdlib.build_student(self.pruned.model, config.Student(layers=3))
        texts = prepare(self.pruned, self.corpus[:48], spec, self.folder / "cache", 3)
        work = self.folder / f"distill-{name}"
        outcome = distill(self.pruned, student, texts, texts, spec, work)
        losses = outcome.curve.query("split == 'heldout'")["loss"].to_numpy()
        assert np.isfinite(losses).all() and losses[-1] < losses[0], losses

    def save(self):
        """Save, and load with plain transformers: the same states."""
        made = replace(self.pruned, model=self.student.eval(), head=None)
        made.save(self.folder / "student")
        model = transformers.AutoModel.from_pretrained(self.folder / "student").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder / "student")
        text = self.corpus[0]
        with torch.inference_mode():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=24)
            states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        assert np.allclose(text_vectors(made, [text])[0, 0], states.mean(1)[0].numpy(), atol=1e-5)


STAGES = {
    "load": Stages.load,
    "probe": Stages.probe,
    "prune": Stages.prune,
    "condition": Stages.condition,
    "copy layers": Stages.copy,
    "narrow": Stages.narrow,
    **{
        name: lambda stages, name=name: stages.objective(name)
        for name, objective in OBJECTIVES.items()
        if not objective.needs.translation  # they need parallel texts, and compare the states that others compare
    },
    "save and load": Stages.save,
}


def training_texts() -> tuple[list[str], list[str]]:
    """Texts of several languages to train tokenizers on, and a Tagalog corpus."""
    lines = (resources.files("kdlib") / "data" / "bundled" / "parallel.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:120]]
    texts = [row[code] for row in rows for code in ("tgl", "eng", "ceb")] + (ACCENTED + FOREIGN) * 3
    return texts, [row["tgl"] for row in rows[:80]]


def try_stages(family: str, folder: Path, texts: list[str], corpus: list[str]) -> dict[str, Exception]:
    """Run every stage on a teacher of the family. Returns the errors by stage."""
    stages, failed = Stages(family, folder, texts, corpus), {}
    for name, stage in STAGES.items():
        try:
            stage(stages)
        except Exception as error:
            failed[name] = error
    return failed
