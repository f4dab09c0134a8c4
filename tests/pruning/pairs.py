"""A full and a pruned model with their tokenizers, of every kind of tokenizer, and how to compare them."""

import functools
import json

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

from kdlib.models.tokenizer_files import save_tokenizer

FOREIGN = [
    "Дождь начался во время свадьбы в саду, и гости побежали в сарай.",
    "Η βροχή άρχισε κατά τη διάρκεια του γάμου στον κήπο.",
    "婚礼刚开始就下起了大雨，客人们都跑进了谷仓。",
    "ฝนตกหนักขณะที่งานแต่งงานเพิ่งเริ่มต้น",
]


ACCENTED = [
    "Si Señor Peña ng Parañaque ay kumain ng piña at biko sa Dasmariñas.",
    "Ang bató at ang batà ay magkaiba: “sabi” ni Niña — 100% totoo!",
    "¡Olé! Año 2026, 31 Disyembre; e-mail: ana@example.ph 😀",
]


TOKENS = 1600


SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


KINDS = ["wordpiece", "unigram", "unigram shifted", "bpe", "bpe shifted"]  # shifted: the special ids change


def edit(tokenizer, change):
    """The tokenizer with its JSON changed in place by `change`."""
    spec = json.loads(tokenizer.to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def forget(*tokens):
    """Some of the trainer's special tokens become ordinary tokens."""

    def change(spec):
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in tokens]

    return change


def train_wordpiece(texts):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    unused = [f"[unused{i}]" for i in range(9)]
    specials = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=TOKENS, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=edit(backend, forget(*unused)),
        unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def train_unigram(texts, before=()):
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    specials = [*before, "<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=TOKENS, special_tokens=specials, unk_token="<unk>", show_progress=False, max_piece_length=12
    )
    backend.train_from_iterator(texts, trainer)
    ids = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=edit(backend, forget(*before)), bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", pad_token="<pad>", mask_token="<mask>",
    )  # fmt: skip


def train_bpe(texts, before=()):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [*before, "<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    ends = [(name, backend.token_to_id(name)) for name in ("</s>", "<s>")]
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=edit(backend, forget(*before)), bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", pad_token="<pad>", mask_token="<mask>",
    )  # fmt: skip


def train_fallback(texts, before=()):
    """A BPE of characters that spells unknown ones by 256 byte tokens, as Gemma's, whose end is its start."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *before]
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=[*specials, *spelt], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend = edit(backend, forget(*spelt, *before))
    backend.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", pair="<eos> $A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", cls_token="<eos>", sep_token="<eos>",
        unk_token="<unk>", pad_token="<pad>", mask_token="<mask>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def train_llama(texts, before=()):
    """A byte-level BPE with its special tokens at the end, of which padding is the end of a text, as EuroBERT's."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|mask|>", "<|reserved_1|>"])
    ends = [(name, backend.token_to_id(name)) for name in ("<|begin_of_text|>", "<|end_of_text|>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        pair="<|begin_of_text|> $A <|end_of_text|> $B <|end_of_text|>", special_tokens=ends,
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
        cls_token="<|begin_of_text|>", sep_token="<|end_of_text|>", pad_token="<|end_of_text|>",
        mask_token="<|mask|>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def fill(model, seed=0):
    """Every weight drawn anew, biases too, so that none is told from another by being zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def config_ids(tokenizer):
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def build(kind, tokenizer):
    rows = len(tokenizer) + 5  # some rows have no token, as in mT5 and the embedded teacher
    if kind == "wordpiece":
        config = BertConfig(vocab_size=rows, **SHAPE, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id)
        return fill(BertForMaskedLM(config))
    Config, Model = {"unigram": (XLMRobertaConfig, XLMRobertaForMaskedLM), "bpe": (RobertaConfig, RobertaForMaskedLM)}[
        kind.split()[0]
    ]
    return fill(Model(Config(vocab_size=rows, **SHAPE, max_position_embeddings=140, **config_ids(tokenizer))))


def unknowns(tokenizer, text):
    return tokenizer(text).input_ids.count(tokenizer.unk_token_id)


HEADS = {
    "bert without a head": lambda rows, pad: BertModel(BertConfig(vocab_size=rows, **SHAPE, pad_token_id=pad)),
    "untied bert": lambda rows, pad: BertForMaskedLM(
        BertConfig(vocab_size=rows, **SHAPE, pad_token_id=pad, tie_word_embeddings=False)
    ),
    "distilbert": lambda rows, pad: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=rows, dim=32, n_layers=2, n_heads=4, hidden_dim=48, pad_token_id=pad)
    ),
    "deberta": lambda rows, pad: DebertaV2ForMaskedLM(
        DebertaV2Config(
            vocab_size=rows, **SHAPE, pad_token_id=pad, relative_attention=True, pos_att_type=["p2c", "c2p"]
        )
    ),
    "deberta, new head": lambda rows, pad: DebertaV2ForMaskedLM(
        DebertaV2Config(vocab_size=rows, **SHAPE, pad_token_id=pad, legacy=False)
    ),
}  # fmt: skip


def write_full(folder, model, tokenizer, **options):
    model.save_pretrained(folder, **options)
    save_tokenizer(tokenizer, folder)
    return folder


def same_config(found, expected):
    loose = ("architectures", "dtype", "transformers_version", "_name_or_path")  # say how it was saved and loaded
    found, expected = ({k: v for k, v in c.to_dict().items() if k not in loose} for c in (found, expected))
    assert found == expected


def same_model(found, expected):
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, value in found.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    same_config(found.config, expected.config)


def same_tokenizer(folder, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "expected")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((folder / file).read_bytes()) == json.loads((tmp_path / "expected" / file).read_bytes())


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file({k: v.clone() for k, v in change(state).items()}, folder / "model.safetensors", {"format": "pt"})


def old_names(state):
    """LayerNorm's weights as files of 2018 to 2019 name them."""
    pairs = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    return {functools.reduce(lambda n, pair: n.replace(*pair), pairs, name): value for name, value in state.items()}


def native(kind, full):
    spec = json.loads(full.backend_tokenizer.to_str())["model"]
    if kind == "wordpiece":
        return BertTokenizer(vocab=spec["vocab"], do_lower_case=False)
    if kind == "bpe":
        return RobertaTokenizer(vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]])
    return XLMRobertaTokenizer(vocab=[tuple(item) for item in spec["vocab"]])
