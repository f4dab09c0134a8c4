"""Vocabulary pruning: the same tokens, the same states and the same logits from fewer rows."""

import copy
import functools
import itertools
import json
import random
import re
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

from kdlib.errors import UserError
from kdlib.models.encoder import Encoder
from kdlib.models.families import FAMILIES
from kdlib.models.mlm_head import load_head, new_head, prune_head
from kdlib.models.safetensors_files import HEAD_FILE
from kdlib.models.tokenizer_files import save_tokenizer, token_list
from kdlib.pruning.files import prune_files
from kdlib.pruning.model import prune_encoder, prune_model
from kdlib.pruning.selection import count_tokens, coverage_curve, main_script, script_of, select_tokens, word_list
from kdlib.pruning.tokenizer import prune_tokenizer
from kdlib.pruning.verify import verify

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
PIECES = 1600
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
KINDS = ["wordpiece", "unigram", "unigram shifted", "bpe", "bpe shifted"]  # shifted: the special ids change


def edit(tokenizer, change):
    """The tokenizer with its JSON changed in place by `change`."""
    spec = json.loads(tokenizer.to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def forget(*pieces):
    """Some of the trainer's special tokens become ordinary pieces."""

    def change(spec):
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in pieces]

    return change


def train_wordpiece(texts):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    unused = [f"[unused{i}]" for i in range(9)]
    specials = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=PIECES, special_tokens=specials, show_progress=False)
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
        vocab_size=PIECES, special_tokens=specials, unk_token="<unk>", show_progress=False, max_piece_length=12
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
        vocab_size=PIECES, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    ends = [(name, backend.token_to_id(name)) for name in ("</s>", "<s>")]
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=edit(backend, forget(*before)), bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", pad_token="<pad>", mask_token="<mask>",
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
    rows = len(tokenizer) + 5  # some rows have no piece, as in mT5 and the embedded teacher
    if kind == "wordpiece":
        config = BertConfig(vocab_size=rows, **SHAPE, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id)
        return fill(BertForMaskedLM(config))
    Config, Model = {"unigram": (XLMRobertaConfig, XLMRobertaForMaskedLM), "bpe": (RobertaConfig, RobertaForMaskedLM)}[
        kind.split()[0]
    ]
    return fill(Model(Config(vocab_size=rows, **SHAPE, max_position_embeddings=140, **config_ids(tokenizer))))


@pytest.fixture(scope="module")
def corpus(parallel):
    return [row["tgl"] for row in parallel[:120]] + ACCENTED


@pytest.fixture(scope="module")
def training(parallel):
    sentences = [row[code] for row in parallel[:200] for code in ("tgl", "eng", "spa", "ind", "ceb")]
    return sentences + (ACCENTED + FOREIGN) * 3


@pytest.fixture(scope="module")
def tokenizers(training):
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = {
                "wordpiece": lambda: train_wordpiece(training),
                "unigram": lambda: train_unigram(training),
                "unigram shifted": lambda: train_unigram(training, before=["<old>", "<older>"]),
                "bpe": lambda: train_bpe(training),
                "bpe shifted": lambda: train_bpe(training, before=["<old>", "<older>"]),
            }[kind]()
        return made[kind]

    return make


@pytest.fixture(scope="module")
def studies(tokenizers, corpus, tmp_path_factory):
    made = {}

    def make(kind):
        if kind in made:
            return made[kind]
        tokenizer = tokenizers(kind)
        model = build(kind, tokenizer)
        chosen = select_tokens(tokenizer, corpus, words=["magandang", "Batangas"], extra=["query: "])
        small, pruned = prune_tokenizer(tokenizer, chosen.ids), prune_model(model, tokenizer, chosen.ids)
        folder = tmp_path_factory.mktemp("pruned")
        small.save_pretrained(folder)
        pruned.save_pretrained(folder)
        made[kind] = SimpleNamespace(
            kind=kind, tokenizer=tokenizer, model=model, chosen=chosen, small=small, pruned=pruned, folder=folder,
            ids=torch.tensor(chosen.ids), corpus=corpus,
        )  # fmt: skip
        return made[kind]

    return make


@pytest.fixture(params=KINDS)
def study(request, studies):
    return studies(request.param)


def unknowns(tokenizer, text):
    return tokenizer(text).input_ids.count(tokenizer.unk_token_id)


# the same tokens


@pytest.mark.slow
def test_pruning_removes_rows(study):
    assert len(study.chosen.ids) < 0.8 * len(study.tokenizer)
    assert study.chosen.dropped == 0


def test_pruned_ids_are_the_full_ids_renumbered(study):
    for text in [*study.corpus, "query: " + study.corpus[0], "magandang", "Batangas", ""]:
        assert study.ids[study.small(text).input_ids].tolist() == study.tokenizer(text).input_ids


def test_pairs_are_renumbered_too(study):
    for first, second in zip(study.corpus, study.corpus[1:]):
        full = study.tokenizer(first, second, return_token_type_ids=True)
        small = study.small(first, second, return_token_type_ids=True)
        assert study.ids[small.input_ids].tolist() == full.input_ids
        assert small.token_type_ids == full.token_type_ids


def test_ids_stay_below_the_vocabulary_size(study):
    rows = study.pruned.config.vocab_size
    assert rows == len(study.chosen.ids) == len(study.small) == study.pruned.get_input_embeddings().num_embeddings
    assert max(study.small.get_vocab().values()) == rows - 1
    assert sorted(study.small.get_vocab().values()) == list(range(rows))


def test_pieces_keep_their_names(study):
    full, small = token_list(study.tokenizer), token_list(study.small)
    assert small == [full[i] for i in study.chosen.ids]


def test_special_tokens_are_all_there(study):
    assert study.small.special_tokens_map == study.tokenizer.special_tokens_map
    for name in study.tokenizer.special_tokens_map:
        assert study.ids[getattr(study.small, f"{name}_id")] == getattr(study.tokenizer, f"{name}_id")


def test_mask_token_is_found_in_text(study):
    masked = f"Ang {study.small.mask_token} ay kumain."
    ids = study.small(masked).input_ids
    assert ids.count(study.small.mask_token_id) == 1
    assert study.ids[ids].tolist() == study.tokenizer(masked).input_ids


def test_casing_and_accents_survive_saving(study):
    again = AutoTokenizer.from_pretrained(study.folder)
    assert again("Peña").input_ids != again("peña").input_ids != again("pena").input_ids
    for text in [*study.corpus, "Peña  PEÑA pen\u0303a"]:
        assert again(text).input_ids == study.small(text).input_ids
    for text in ACCENTED[:1]:
        assert again.decode(again(text).input_ids, skip_special_tokens=True).replace(" .", ".") == text


def test_normaliser_and_the_rest_of_the_file_stay_as_they_were(study):
    full = json.loads(study.tokenizer.backend_tokenizer.to_str())
    small = json.loads((study.folder / "tokenizer.json").read_text("utf-8"))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert small[part] == full[part]
    assert [t["content"] for t in small["added_tokens"]] == [t["content"] for t in full["added_tokens"]]


def post_processor_ids(node):
    """(piece, id) of every special token that a post-processor names."""
    if node["type"] == "TemplateProcessing":
        return [pair for token in node["special_tokens"].values() for pair in zip(token["tokens"], token["ids"])]
    return [tuple(node["sep"]), tuple(node["cls"])]


def test_saved_file_reads_right_for_transformers_4(study):
    spec = json.loads((study.folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = spec["model"]["vocab"]
    ids = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    for token in spec["added_tokens"]:
        assert ids.setdefault(token["content"], token["id"]) == token["id"]
    assert sorted(ids.values()) == list(range(len(study.chosen.ids)))
    named = post_processor_ids(spec["post_processor"])
    assert named and all(ids[piece] == i for piece, i in named)
    if spec["model"]["type"] == "Unigram":
        assert spec["model"]["vocab"][spec["model"]["unk_id"]][0] == study.tokenizer.unk_token
    raw = Tokenizer.from_file(str(study.folder / "tokenizer.json"))
    assert raw.encode(study.corpus[0]).ids == study.small(study.corpus[0]).input_ids


def test_padding_left_on_by_an_earlier_call_is_renumbered(studies):
    study = studies("bpe shifted")
    study.tokenizer(study.corpus[:2], padding=True)
    small = prune_tokenizer(study.tokenizer, study.chosen.ids)
    assert json.loads(small.backend_tokenizer.to_str())["padding"]["pad_id"] == study.small.pad_token_id


def test_pruning_leaves_the_full_ones_alone(study):
    assert len(study.tokenizer) > len(study.small)
    assert study.model.config.vocab_size == study.model.get_input_embeddings().num_embeddings > len(study.tokenizer)
    before = study.tokenizer.backend_tokenizer.to_str()
    prune_tokenizer(study.tokenizer, study.chosen.ids)
    assert study.tokenizer.backend_tokenizer.to_str() == before


def test_pruning_twice_changes_nothing_more(study):
    again = select_tokens(study.small, study.corpus, words=["magandang", "Batangas"], extra=["query: "])
    assert again.ids == list(range(len(study.small)))


# the same states and logits


def batches(study, texts):
    full = study.tokenizer(texts, padding=True, return_tensors="pt")
    small = study.small(texts, padding=True, return_tensors="pt")
    assert torch.equal(study.ids[small.input_ids], full.input_ids)
    return full, small


@torch.no_grad()
def test_hidden_states_are_equal_bit_for_bit(study):
    full, small = batches(study, study.corpus[:16])
    expected = study.model(**full, output_hidden_states=True).hidden_states
    found = study.pruned(**small, output_hidden_states=True).hidden_states
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@torch.no_grad()
def test_logits_are_equal_on_the_kept_rows(study):
    full, small = batches(study, study.corpus[:8])
    expected, found = study.model(**full).logits[..., study.ids], study.pruned(**small).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_masked_word_is_filled_alike(study):
    text = study.corpus[0].replace(" ", f" {study.tokenizer.mask_token} ", 1)
    full, small = batches(study, [text])
    expected, found = study.model(**full).logits[0][:, study.ids], study.pruned(**small).logits[0]
    at = small.input_ids[0] == study.small.mask_token_id
    assert at.sum() == 1 and torch.equal(expected[at].argmax(-1), found[at].argmax(-1))


def test_decoder_bias_goes_with_its_rows(study):
    expected = study.model.get_output_embeddings().bias[study.ids]
    assert expected.std() > 0.1
    assert torch.equal(study.pruned.get_output_embeddings().bias, expected)


def test_tie_and_weights_survive_saving(study):
    again, report = AutoModelForMaskedLM.from_pretrained(study.folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for model in (study.pruned, again):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    kept = study.model.get_input_embeddings().weight[study.ids]
    assert torch.equal(again.get_input_embeddings().weight, kept)
    _, small = batches(study, study.corpus[:4])
    with torch.no_grad():
        assert torch.equal(again(**small).logits, study.pruned(**small).logits)


def test_config_ids_are_renumbered(study):
    config = study.pruned.config
    for name in ("pad", "bos", "eos"):
        old = getattr(study.model.config, f"{name}_token_id")
        new = getattr(config, f"{name}_token_id")
        assert new is None if old is None else study.ids[new] == old
    assert config.pad_token_id == study.small.pad_token_id


def test_config_id_without_a_row_is_unset(studies):
    study = studies("bpe shifted")
    gone = study.tokenizer.get_vocab()["<old>"]
    config = RobertaConfig(vocab_size=len(study.tokenizer), **SHAPE, **config_ids(study.tokenizer), spare_token_id=gone)
    pruned = prune_model(RobertaForMaskedLM(config), study.tokenizer, study.chosen.ids)
    assert pruned.config.spare_token_id is None


def test_longest_text_still_fits_where_positions_count_from_the_pad_id(studies):
    study = studies("bpe shifted")
    assert study.pruned.config.pad_token_id == study.model.config.pad_token_id - 2
    longest = study.model.config.max_position_embeddings - study.model.config.pad_token_id - 1
    ids = torch.full((1, longest), 7)
    with torch.no_grad():
        full, small = study.model.roberta(study.ids[ids]), study.pruned.roberta(ids)
    assert torch.equal(full.last_hidden_state, small.last_hidden_state)


def test_mode_is_kept(studies):
    study = studies("wordpiece")
    assert not study.pruned.training
    model = build("wordpiece", study.tokenizer).train()
    assert prune_model(model, study.tokenizer, study.chosen.ids).training


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size"])
def test_layer_as_wide_as_the_vocabulary_is_not_cut(size, studies):
    study = studies("wordpiece")
    shape = SHAPE | {"hidden_size": 32, size: 128}
    model = fill(BertForMaskedLM(BertConfig(vocab_size=128, **shape, max_position_embeddings=64)))
    ids = list(range(0, 128, 2))
    pruned = prune_model(model, study.tokenizer, ids)
    few = torch.arange(10)[None]
    with torch.no_grad():
        expected, found = model(torch.tensor(ids)[few]).logits[..., ids], pruned(few).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_other_models_and_heads_are_pruned_alike(kind, studies):
    study = studies("wordpiece")
    model = fill(HEADS[kind](len(study.tokenizer), study.tokenizer.pad_token_id))
    pruned = prune_model(model, study.tokenizer, study.chosen.ids)
    full, small = batches(study, study.corpus[:4])
    expected = model(**full, output_hidden_states=True)
    found = pruned(**small, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(expected.hidden_states, found.hidden_states))
    if "logits" in found:
        torch.testing.assert_close(found.logits, expected.logits[..., study.ids], rtol=0, atol=1e-5)


def test_model_with_fewer_rows_than_pieces_is_refused(studies):
    study = studies("wordpiece")
    model = BertModel(BertConfig(vocab_size=100, **SHAPE))
    with pytest.raises(UserError, match="only 100 embedding rows"):
        prune_model(model, study.tokenizer, study.chosen.ids)


def test_pruning_draws_no_random_numbers(studies):
    study = studies("wordpiece")
    before = torch.random.get_rng_state()
    prune_model(study.model, study.tokenizer, study.chosen.ids)
    assert torch.equal(torch.random.get_rng_state(), before)


# the same without loading the model


@pytest.fixture
def no_model(monkeypatch):
    """Building a model fails."""

    def refuse(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)


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


@pytest.mark.parametrize("at_hand", [True, False], ids=["tokenizer at hand", "tokenizer from the folder"])
def test_files_are_pruned_as_the_model_is(at_hand, study, tmp_path, no_model):
    tokenizer = AutoTokenizer.from_pretrained(write_full(tmp_path / "full", study.model, study.tokenizer))
    before = {file.name: file.read_bytes() for file in (tmp_path / "full").iterdir()}
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids, tokenizer if at_hand else None)
    assert {file.name: file.read_bytes() for file in (tmp_path / "full").iterdir()} == before
    same_tokenizer(tmp_path / "few", prune_tokenizer(tokenizer, study.chosen.ids), tmp_path)


def test_pruned_files_load_as_the_pruned_model(study, tmp_path):
    write_full(tmp_path / "full", study.model, study.tokenizer)
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "few", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_model(found, study.pruned)
    small = AutoTokenizer.from_pretrained(tmp_path / "few")
    assert [small(text).input_ids for text in study.corpus] == [study.small(text).input_ids for text in study.corpus]


@pytest.mark.parametrize("prefixed", [True, False])
def test_encoder_loads_alike_with_and_without_the_prefix_of_its_kind(prefixed, study, tmp_path):
    model = study.model if prefixed else study.model.base_model
    write_full(tmp_path / "full", model, study.tokenizer)
    names = load_file(tmp_path / "full" / "model.safetensors")
    assert all(name.startswith(("bert.", "roberta.", "cls.", "lm_head.")) == prefixed for name in names)
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found = AutoModel.from_pretrained(tmp_path / "few", add_pooling_layer=False)
    same_model(found, study.pruned.base_model)


@pytest.mark.parametrize("kind", HEADS)
def test_files_of_other_models_and_heads_are_pruned_alike(kind, studies, tmp_path):
    study = studies("wordpiece")
    model = fill(HEADS[kind](len(study.tokenizer), study.tokenizer.pad_token_id))
    write_full(tmp_path / "full", model, study.tokenizer)
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found, report = type(model).from_pretrained(tmp_path / "few", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_model(found, prune_model(model, study.tokenizer, study.chosen.ids))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_tensor_by_vocabulary_is_known_by_its_name(kind):
    import transformers

    settings = dict(vocab_size=211, **SHAPE, max_position_embeddings=40, pad_token_id=1)
    if kind == "distilbert":
        settings |= dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    config = AutoConfig.for_model(kind, **settings)
    stem = type(config).__name__.removesuffix("Config")
    names = re.findall(rf"\b{stem}(?:Model|LMHeadModel|For\w+)\b", " ".join(dir(transformers)))
    assert len(names) > 4
    for name in names:
        with torch.device("meta"):
            state = getattr(transformers, name)(config).state_dict()
        by_row = {key for key, value in state.items() if value.dim() and len(value) == 211}
        assert by_row and by_row == {key for key in state if FAMILIES[kind].has_rows(key)}, name


def test_shards_are_pruned_into_one_file(studies, tmp_path):
    study = studies("unigram shifted")
    write_full(tmp_path / "full", study.model, study.tokenizer, max_shard_size="40KB")
    assert len(list((tmp_path / "full").glob("model-*.safetensors"))) > 2
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    assert [file.name for file in (tmp_path / "few").glob("model*")] == ["model.safetensors"]
    same_model(AutoModelForMaskedLM.from_pretrained(tmp_path / "few"), study.pruned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_data_type_of_the_files_is_kept(dtype, studies, tmp_path):
    study = studies("bpe shifted")
    half = copy.deepcopy(study.model).to(dtype)
    write_full(tmp_path / "full", half, study.tokenizer)
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    assert {value.dtype for value in load_file(tmp_path / "few" / "model.safetensors").values()} == {dtype}
    found = AutoModelForMaskedLM.from_pretrained(tmp_path / "few")
    same_model(found, copy.deepcopy(study.pruned).to(dtype))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file({k: v.clone() for k, v in change(state).items()}, folder / "model.safetensors", {"format": "pt"})


def test_tied_decoder_that_the_file_holds_too_is_cut(studies, tmp_path):
    study = studies("wordpiece")
    write_full(tmp_path / "full", study.model, study.tokenizer)
    table = "bert.embeddings.word_embeddings.weight"
    edit_weights(tmp_path / "full", lambda state: state | {"cls.predictions.decoder.weight": state[table]})
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found = load_file(tmp_path / "few" / "model.safetensors")
    assert torch.equal(found["cls.predictions.decoder.weight"], found[table])
    same_model(AutoModelForMaskedLM.from_pretrained(tmp_path / "few"), study.pruned)


def old_names(state):
    """LayerNorm's weights as files of 2018 to 2019 name them."""
    pairs = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    return {functools.reduce(lambda n, pair: n.replace(*pair), pairs, name): value for name, value in state.items()}


def test_masked_language_head_beside_the_model_is_cut(studies, tmp_path):
    study = studies("wordpiece")
    encoder = Encoder(study.model.base_model, study.tokenizer, "full", head=new_head(study.model.base_model))
    encoder.head.bias.data.normal_()
    encoder.save(tmp_path / "full")
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    found = load_head(tmp_path / "few" / HEAD_FILE, study.pruned.base_model)
    expected = prune_head(encoder.head, study.chosen.ids).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_native_tokenizer_of_a_folder_is_pruned_alike(kind, tokenizers, studies, tmp_path):
    study, tokenizer = studies(kind), native(kind, tokenizers(kind))
    chosen = select_tokens(tokenizer, study.corpus)
    write_full(tmp_path / "full", study.model, tokenizer)
    prune_files(tmp_path / "full", tmp_path / "few", chosen.ids)
    same_tokenizer(
        tmp_path / "few", prune_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "full"), chosen.ids), tmp_path
    )
    again = AutoTokenizer.from_pretrained(tmp_path / "few")
    assert type(again) is type(tokenizer)
    for text in study.corpus:
        assert [chosen.ids[i] for i in again(text).input_ids] == tokenizer(text).input_ids


@pytest.mark.parametrize("own_class", [False, True])
def test_full_tokenizer_is_not_built_where_the_file_says_all(own_class, study, tmp_path, monkeypatch):
    tokenizer = native(study.kind.split()[0], study.tokenizer) if own_class else study.tokenizer
    write_full(tmp_path / "full", study.model, tokenizer)
    monkeypatch.setattr("kdlib.pruning.tokenizer.prune_tokenizer", None)
    prune_files(tmp_path / "full", tmp_path / "few", select_tokens(tokenizer, study.corpus).ids)


def test_folder_with_a_word_list_for_tokenizer_is_pruned(studies, tmp_path):
    study = studies("wordpiece")
    write_full(tmp_path / "full", study.model, native("wordpiece", study.tokenizer))
    pieces = token_list(AutoTokenizer.from_pretrained(tmp_path / "full"))
    (tmp_path / "full" / "tokenizer.json").unlink()
    (tmp_path / "full" / "vocab.txt").write_text("\n".join(pieces), "utf-8")
    full = AutoTokenizer.from_pretrained(tmp_path / "full")
    chosen = select_tokens(full, study.corpus)
    prune_files(tmp_path / "full", tmp_path / "few", chosen.ids)
    again = AutoTokenizer.from_pretrained(tmp_path / "few")
    for text in study.corpus:
        assert [chosen.ids[i] for i in again(text).input_ids] == full(text).input_ids


def test_token_that_only_the_tokenizer_config_names_is_kept(studies, tmp_path):
    study = studies("unigram")
    write_full(tmp_path / "full", study.model, study.tokenizer)
    file = tmp_path / "full" / "tokenizer.json"
    spec = json.loads(file.read_bytes())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<mask>"]
    file.write_text(json.dumps(spec), "utf-8")
    full = AutoTokenizer.from_pretrained(tmp_path / "full")
    assert full.mask_token_id == study.tokenizer.mask_token_id
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    again = AutoTokenizer.from_pretrained(tmp_path / "few")
    assert again.get_vocab() == study.small.get_vocab() and again.mask_token_id == study.small.mask_token_id


def test_token_that_is_not_kept_does_not_come_back(studies, tmp_path):
    study = studies("unigram")
    full = copy.deepcopy(study.tokenizer)
    full.add_tokens(["panimula"])
    write_full(tmp_path / "full", study.model, full)
    file = tmp_path / "full" / "tokenizer_config.json"
    added = {str(i): json.loads(json.dumps(t.__getstate__())) for i, t in full.added_tokens_decoder.items()}
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"added_tokens_decoder": added}))  # as version 4 has it
    prune_files(tmp_path / "full", tmp_path / "few", study.chosen.ids)
    assert AutoTokenizer.from_pretrained(tmp_path / "few").get_vocab() == study.small.get_vocab()


def test_what_cannot_be_pruned_is_refused_and_leaves_nothing(studies, tmp_path):
    study = studies("wordpiece")
    full, few, ids = tmp_path / "full", tmp_path / "few", study.chosen.ids
    with pytest.raises(UserError, match="model.safetensors"):
        prune_files(full, few, ids)
    write_full(full, study.model, study.tokenizer)
    with pytest.raises(UserError, match="into itself"):
        prune_files(full, tmp_path / "x" / ".." / "full", ids)
    with pytest.raises(UserError, match="embedding rows"):
        prune_files(full, few, [*ids, 10**6])
    with pytest.raises(UserError, match="'albert'"):
        albert = AlbertModel(AlbertConfig(vocab_size=90, embedding_size=8, **SHAPE))
        prune_files(write_full(tmp_path / "albert", albert, study.tokenizer), few, ids)
    (full / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer"):
        prune_files(full, few, ids)
    edit_weights(full, lambda state: {name: value for name, value in state.items() if "word_emb" not in name})
    with pytest.raises(UserError, match="word_embeddings.weight"):
        prune_files(full, few, ids)
    (full / "config.json").unlink()
    with pytest.raises(UserError, match="no config"):
        prune_files(full, few, ids)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["albert", "full"]


def test_encoder_is_pruned_from_its_files_or_from_memory_alike(study, tmp_path):
    model = fill(type(study.model.base_model)(study.model.config))  # this one has a pooler
    encoder = Encoder(model, study.tokenizer, "full", "query: ", 32, head=new_head(model))
    encoder.head.bias.data.normal_()
    folder = write_full(tmp_path / "full", model, study.tokenizer)
    prune_encoder(encoder, study.chosen.ids, tmp_path / "files", folder)
    prune_encoder(encoder, study.chosen.ids, tmp_path / "memory")
    files, memory = (AutoModel.from_pretrained(tmp_path / name) for name in ("files", "memory"))
    same_model(files, memory)
    same_model(memory, prune_model(model, study.tokenizer, study.chosen.ids))
    for name in ("files", "memory"):
        same_tokenizer(tmp_path / name, study.small, tmp_path / f"{name} expected")
        assert torch.equal(load_head(tmp_path / name / HEAD_FILE, memory).bias, encoder.head.bias[study.ids])


def test_encoder_of_an_old_file_is_pruned_from_it(studies, tmp_path):
    study = studies("wordpiece")
    folder = write_full(tmp_path / "full", study.model, study.tokenizer)
    edit_weights(folder, old_names)
    encoder = Encoder(AutoModel.from_pretrained(folder, add_pooling_layer=False), study.tokenizer, "full")
    prune_encoder(encoder, study.chosen.ids, tmp_path / "few", folder)
    assert any(name.endswith(".gamma") for name in load_file(tmp_path / "few" / "model.safetensors"))
    same_model(AutoModel.from_pretrained(tmp_path / "few", add_pooling_layer=False), study.pruned.base_model)


def test_weights_that_the_files_lack_come_from_memory(studies, tmp_path):
    study = studies("wordpiece")
    folder = write_full(tmp_path / "full", study.model, study.tokenizer)
    encoder = Encoder(AutoModel.from_pretrained(folder), study.tokenizer, "full", head=new_head(study.model.base_model))
    assert "pooler.dense.weight" in encoder.model.state_dict()  # drawn at random: the file has none
    prune_encoder(encoder, study.chosen.ids, tmp_path / "few", folder)
    found = AutoModel.from_pretrained(tmp_path / "few")
    same_model(found, prune_model(encoder.model, study.tokenizer, study.chosen.ids))
    assert len(load_head(tmp_path / "few" / HEAD_FILE, found).bias) == len(study.chosen.ids)


def test_weights_that_were_trained_since_come_from_memory(studies, tmp_path):
    study = studies("unigram")
    folder = write_full(tmp_path / "full", fill(type(study.model.base_model)(study.model.config)), study.tokenizer)
    encoder = Encoder(AutoModel.from_pretrained(folder), study.tokenizer, "trained")
    encoder.model.train()
    loss = encoder.model(input_ids=torch.arange(9)[None]).last_hidden_state.square().sum()
    loss.backward()
    torch.optim.SGD(encoder.model.parameters(), lr=1e-3).step()
    prune_encoder(encoder, study.chosen.ids, tmp_path / "few", folder)
    found = AutoModel.from_pretrained(tmp_path / "few")
    same_model(found, prune_model(encoder.model, study.tokenizer, study.chosen.ids))


# tokenizer classes of their own, which transformers 5 builds anew on loading


def native(kind, full):
    spec = json.loads(full.backend_tokenizer.to_str())["model"]
    if kind == "wordpiece":
        return BertTokenizer(vocab=spec["vocab"], do_lower_case=False)
    if kind == "bpe":
        return RobertaTokenizer(vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]])
    return XLMRobertaTokenizer(vocab=[tuple(item) for item in spec["vocab"]])


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_native_tokenizer_class_survives_pruning_and_saving(kind, tokenizers, studies, corpus, tmp_path):
    tokenizer = native(kind, tokenizers(kind))
    chosen = select_tokens(tokenizer, corpus)
    small = prune_tokenizer(tokenizer, chosen.ids)
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer) and len(again) == len(chosen.ids) < len(tokenizer)
    for text in [*corpus, f"Ang {tokenizer.mask_token} ay kumain."]:
        ids = again(text).input_ids
        assert ids == small(text).input_ids
        assert [chosen.ids[i] for i in ids] == tokenizer(text).input_ids


# words never seen


def test_unseen_words_meet_no_more_unknowns(study, training):
    draw, seen = random.Random(0), {char for text in training for char in text}
    alphabet = sorted(char for char in seen if script_of(char) <= {"Latn"} and not char.isspace())
    assert {"ñ", "ó", "2", "A", "z", "%", "😀"} <= set(alphabet) and "Д" not in alphabet
    for _ in range(200):
        words = ["".join(draw.choices(alphabet, k=draw.randint(1, 12))) for _ in range(draw.randint(1, 6))]
        text = " ".join(words)
        assert unknowns(study.small, text) <= unknowns(study.tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_any_latin_text_meets_no_more_unknowns(kind, studies):
    study = studies(kind)
    latin = [chr(i) for i in range(0x250) if script_of(unicodedata.normalize("NFKC", chr(i))) <= {"Latn"}]

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.text(st.sampled_from(latin), max_size=30))
    def check(text):
        assert unknowns(study.small, text) <= unknowns(study.tokenizer, text)

    check()


def test_held_out_sentences_meet_no_more_unknowns(study, parallel):
    for row in parallel[200:260]:
        for code in ("tgl", "eng", "spa"):
            assert unknowns(study.small, row[code]) <= unknowns(study.tokenizer, row[code])


def test_held_out_sentences_decode_to_themselves(study, parallel):
    for row in parallel[200:230]:
        if not unknowns(study.tokenizer, row["tgl"]):
            ids = study.small(row["tgl"]).input_ids
            full = study.tokenizer(row["tgl"]).input_ids
            decoded = study.small.decode(ids, skip_special_tokens=True)
            assert decoded == study.tokenizer.decode(full, skip_special_tokens=True)


# which pieces stay


def test_reasons_cover_exactly_the_kept_pieces(study):
    chosen = study.chosen
    assert chosen.ids == sorted(set(chosen.ids)) == sorted(chosen.reason)
    assert set(chosen.reason.values()) <= {"special", "character", "corpus", "wordlist", "merge"}
    assert {i for i, why in chosen.reason.items() if why == "special"} == set(study.tokenizer.all_special_ids)
    assert set(np.flatnonzero(chosen.counts)) <= set(chosen.ids)


def test_counts_are_how_often_the_corpus_uses_a_piece(study):
    expected = np.zeros(len(token_list(study.tokenizer)), int)
    for text in study.corpus:
        for i in study.tokenizer(text, add_special_tokens=False).input_ids:
            expected[i] += 1
    assert study.chosen.counts.tolist() == expected.tolist()


def test_counts_do_not_depend_on_batches_or_padding(study):
    study.tokenizer(study.corpus[:3], padding="max_length", truncation=True, max_length=9)
    counts = count_tokens(study.tokenizer, (text for text in study.corpus), batch=7)
    assert counts.tolist() == study.chosen.counts.tolist()
    assert count_tokens(study.tokenizer, ["", *study.corpus, ""]).tolist() == counts.tolist()


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_characters_of_other_scripts_go_unless_all_are_asked_for(kind, studies):
    study = studies(kind)
    pieces = token_list(study.tokenizer)
    everything = set(select_tokens(study.tokenizer, study.corpus, characters="all").ids)
    foreign = {i for i, piece in enumerate(pieces) if len(piece) == 1 and script_of(piece) & {"Cyrl", "Hani", "Thai"}}
    assert foreign and foreign <= everything and not foreign & set(study.chosen.ids)
    neutral = {i for i, piece in enumerate(pieces) if len(piece) == 1 and not script_of(piece)}
    assert {pieces[i] for i in neutral} >= set("0123.,:%") and neutral <= set(study.chosen.ids)


def test_byte_alphabet_is_kept_whole(studies):
    study = studies("bpe")
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(study.small.get_vocab())
    for text in ("Дождь", "日本語", "😀", "\x00\x7f", "ฝน"):
        assert study.small.decode(study.small(text).input_ids, skip_special_tokens=True) == text


def test_bpe_piece_is_kept_with_all_it_is_merged_from(studies):
    study = studies("bpe")
    model = json.loads(study.small.backend_tokenizer.to_str())["model"]
    made = {left + right for left, right in model["merges"]}
    special = set(study.small.all_special_tokens)
    assert all(piece in made for piece in model["vocab"] if len(piece) > 1 and piece not in special)
    merged = [i for i, why in study.chosen.reason.items() if why == "merge"]
    assert merged and not study.chosen.counts[merged].any()


def test_rows_run_out_for_the_rarest_pieces_first(study):
    least = len(select_tokens(study.tokenizer, study.corpus[:1], characters="all").ids)
    limit = (least + len(study.chosen.ids)) // 2
    chosen = select_tokens(study.tokenizer, study.corpus, words=["magandang"], max_rows=limit)
    assert len(chosen.ids) <= limit and chosen.dropped > 0
    assert "wordlist" not in chosen.reason.values() or study.kind.startswith("bpe")
    left_out = set(np.flatnonzero(chosen.counts)) - set(chosen.ids)
    assert len(left_out) == chosen.dropped
    if not study.kind.startswith("bpe"):
        assert len(chosen.ids) == limit
        rarest_kept = min(chosen.counts[i] for i, why in chosen.reason.items() if why == "corpus")
        assert max(chosen.counts[i] for i in left_out) <= rarest_kept
    small = prune_tokenizer(study.tokenizer, chosen.ids)
    for text in study.corpus:
        assert unknowns(small, text) <= unknowns(study.tokenizer, text)


def test_words_fill_the_rows_that_are_left_in_their_order(studies):
    study = studies("unigram")
    base = select_tokens(study.tokenizer, study.corpus[:20])
    words = ["rain", "wedding", "guests", "garden", "lluvia", "jardín", "pengantin"]
    full = select_tokens(study.tokenizer, study.corpus[:20], words=words)
    some = select_tokens(study.tokenizer, study.corpus[:20], words=words, max_rows=len(base.ids) + 3)
    assert len(base.ids) < len(some.ids) <= len(base.ids) + 3 < len(full.ids)
    assert set(base.ids) <= set(some.ids) <= set(full.ids)
    assert some.dropped == 0
    small = prune_tokenizer(study.tokenizer, full.ids)
    for word in words:
        assert [full.ids[i] for i in small(word).input_ids] == study.tokenizer(word).input_ids


def test_extra_texts_are_kept_even_if_the_corpus_lacks_them(studies):
    study = studies("wordpiece")
    prefix = "Дождь начался:"
    chosen = select_tokens(study.tokenizer, study.corpus, extra=[prefix])
    small = prune_tokenizer(study.tokenizer, chosen.ids)
    assert [chosen.ids[i] for i in small(prefix).input_ids] == study.tokenizer(prefix).input_ids


def test_too_few_rows_are_refused(study):
    with pytest.raises(UserError, match="vocabulary.max_rows is 20"):
        select_tokens(study.tokenizer, study.corpus, max_rows=20)


@pytest.mark.parametrize("texts", [[], [""], ["", "   ", "\n"]])
def test_corpus_without_text_is_refused(texts, studies):
    study = studies("unigram")
    with pytest.raises(UserError, match="no text"):
        select_tokens(study.tokenizer, texts)


def test_tokenizer_of_another_kind_is_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "ang": 1, "bata": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="WordLevel"):
        select_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"), ["ang bata"])


def test_bpe_that_marks_the_ends_of_words_is_refused():
    backend = Tokenizer(models.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(UserError, match="'</w>'"):
        select_tokens(PreTrainedTokenizerFast(tokenizer_object=backend), ["a b"])


def test_byte_pieces_are_kept():
    spelled = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    vocabulary = [("<unk>", 0.0), ("▁a", -2.0), ("▁", -3.0), ("b", -4.0), ("bb", -3.5), *spelled]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    chosen = select_tokens(tokenizer, ["1 2"])
    small = prune_tokenizer(tokenizer, chosen.ids)
    assert [token_list(small)[i] for i in (0, 1)] == ["<unk>", "▁"] and len(chosen.ids) == 256 + 2
    assert unknowns(small, "Дождь 日本") == 0
    assert [chosen.ids[i] for i in small("Дождь 日本").input_ids] == tokenizer("Дождь 日本").input_ids


def test_special_tokens_that_nobody_declared_are_kept(tokenizers, corpus):
    backend = edit(tokenizers("wordpiece").backend_tokenizer, lambda spec: spec.update(added_tokens=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    chosen = select_tokens(tokenizer, corpus)
    small = prune_tokenizer(tokenizer, chosen.ids)
    assert {"[UNK]", "[CLS]", "[SEP]"} <= set(small.get_vocab())
    for text in [*corpus, "Дождь"]:
        ids = [chosen.ids[i] for i in small(text).input_ids]
        assert ids == tokenizer(text).input_ids or text == "Дождь"


def test_unknown_piece_says_nothing_about_scripts(tokenizers):
    tokenizer = tokenizers("wordpiece")
    chosen = select_tokens(tokenizer, ["Дождь", "ꙮꙮ"])
    kept = {piece for i, piece in enumerate(token_list(tokenizer)) if i in chosen.reason and len(piece) == 1}
    assert "ж" in kept and "a" not in kept


# the real teacher


@pytest.mark.slow
def test_real_teacher_is_pruned_exactly(teacher_tokenizer, teacher_model, parallel):
    tokenizer = teacher_tokenizer
    corpus = [row["tgl"] for row in parallel[:60]] + ACCENTED
    chosen = select_tokens(tokenizer, corpus, words=["magandang", "umaga"], extra=["query: "])
    assert len(chosen.ids) < 6000
    small = prune_tokenizer(tokenizer, chosen.ids)
    for text in [*corpus, "query: " + corpus[3], "<mask> umaga"]:
        assert [chosen.ids[i] for i in small(text).input_ids] == tokenizer(text).input_ids
    pruned = prune_model(teacher_model, tokenizer, chosen.ids)
    full = tokenizer(corpus[:4], padding=True, return_tensors="pt")
    few = small(corpus[:4], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(pruned(**few).last_hidden_state, teacher_model(**full).last_hidden_state)


# the curve and the proof that the notebook shows


def test_coverage_rises_to_what_the_kept_rows_cover(study, parallel):
    unseen = count_tokens(study.tokenizer, [row["tgl"] for row in parallel[300:340]])
    for counts, share in ((study.chosen.counts, 1.0), (unseen, unseen[study.chosen.ids].sum() / unseen.sum())):
        curve = coverage_curve(study.chosen, counts)
        assert curve[-1] == (len(study.chosen.ids), pytest.approx(share))
        for (fewer, lower), (more, higher) in itertools.pairwise(curve):
            assert fewer < more and lower <= higher


def encoders(study, pruned):
    full = Encoder(study.model.base_model, study.tokenizer, "full", max_length=32)
    return full, Encoder(pruned.base_model, study.small, "pruned", max_length=32)


def test_proof_holds_for_a_pruned_model(study):
    table = verify(*encoders(study, study.pruned), np.array(study.chosen.ids), study.corpus, states_of=5)
    weights = len(study.pruned.base_model.state_dict())
    assert table[["checked", "holds"]].values.tolist() == [[len(study.corpus)] * 2, [weights] * 2, [5, 5]]


def test_proof_fails_for_rows_and_ids_that_are_wrong(studies):
    study = studies("wordpiece")
    rolled = copy.deepcopy(study.pruned)
    rolled.get_input_embeddings().weight.data = study.pruned.get_input_embeddings().weight.data.roll(1, 0)
    table = verify(*encoders(study, rolled), np.array(study.chosen.ids)[::-1], study.corpus, states_of=5)
    assert table.holds.tolist() == [0, len(study.pruned.base_model.state_dict()) - 1, 0]


# words and scripts


@pytest.mark.parametrize("code", ["tgl", "tl", "fil"])
def test_words_of_tagalog_come_most_frequent_first(code):
    words = word_list(code, 500)
    assert words[:2] == ["sa", "Sa"] and {"ng", "ang", "mga", "hindi"} <= set(words[:100])
    assert 900 < len(words) <= 1000
    assert word_list(code, 10) == words[:20]


def test_all_words_come_by_default():
    assert len(word_list("tgl")) > 30_000


def test_no_words_when_none_are_asked_for():
    assert word_list("tgl", 0) == []


@pytest.mark.parametrize("code", ["xyz", "ceb", "und", "art"])
def test_language_without_words_gives_none(code):
    assert word_list(code) == []


@pytest.mark.parametrize("code", ["Tagalog", "not a code", "q", ""])
def test_what_is_no_language_code_is_refused(code):
    with pytest.raises(UserError, match="language"):
        word_list(code)


@pytest.mark.parametrize(
    "piece, scripts",
    [
        ("a", {"Latn"}), ("ñ", {"Latn"}), ("▁a", {"Latn"}), ("##a", {"Latn"}), ("Ġa", {"Latn"}),
        ("▁Дож", {"Cyrl"}), ("漢", {"Hani"}), ("##漢", {"Hani"}), ("漢a", {"Hani", "Latn"}), ("ไทย", {"Thai"}),
        ("7", set()), ("▁2026", set()), ("▁", set()), ("##", set()), ("!?", set()), ("😀", set()),
        ("\u0303", set()), ("", set()), ("<0x41>", set()),
    ],
)  # fmt: skip
def test_script_of_a_piece(piece, scripts):
    assert script_of(piece) == scripts
    assert main_script(piece) == ("mixed" if len(scripts) > 1 else (*scripts, "neutral")[0])
