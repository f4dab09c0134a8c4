"""Bugs that users of vocabulary trimmers reported, each by its name, for kinds of tokenizers and of heads."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pruning.pairs import (
    SHAPE,
    edit,
    fill,
    train_bpe,
    train_fallback,
    train_llama,
    train_unigram,
    train_wordpiece,
    write_full,
)
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    EuroBertConfig,
    EuroBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    XLMRobertaTokenizer,
)

import kdlib
from kdlib.errors import UserError
from kdlib.models.encoder import text_vectors
from kdlib.models.tokenizer_files import token_list
from kdlib.pruning.files import prune_files
from kdlib.pruning.model import prune_model
from kdlib.pruning.selection import script_of, select_tokens
from kdlib.pruning.tokenizer import prune_tokenizer

TOKENIZERS = {
    "Unigram": train_unigram,
    "WordPiece": train_wordpiece,
    "byte-level BPE": train_bpe,
    "BPE with byte fallback": train_fallback,
    "byte-level BPE, specials at the end": train_llama,
}
HEADS = {
    "no head": lambda sizes: BertModel(BertConfig(**sizes)),
    "tied head": lambda sizes: BertForMaskedLM(BertConfig(**sizes)),
    "untied head": lambda sizes: BertForMaskedLM(BertConfig(**sizes, tie_word_embeddings=False)),
    "tied decoder with a bias": lambda sizes: ModernBertForMaskedLM(ModernBertConfig(**sizes)),
    "untied decoder without a bias": lambda sizes: EuroBertForMaskedLM(EuroBertConfig(**sizes)),
}
WORDS = ["GCash", "lungsodngDaan"]  # that users added; not special
LANGUAGES = ["<tgl_PH>", "<eng_XX>"]  # special, after all others, as mBART's
TEXT = "Nagbayad ako sa GCash papunta sa lungsodngDaan."
SPARE = 7  # embedding rows without a token


@pytest.fixture(scope="module")
def made(training, corpus):
    kept = {}

    def make(kind):
        if kind not in kept:
            tokenizer = TOKENIZERS[kind](training)
            tokenizer.add_tokens(WORDS)
            tokenizer.add_special_tokens({"additional_special_tokens": LANGUAGES})
            ids = select_tokens(tokenizer, corpus).ids
            kept[kind] = tokenizer, ids, prune_tokenizer(tokenizer, ids)
        return kept[kind]

    return make


@pytest.fixture(params=itertools.product(TOKENIZERS, HEADS), ids=lambda pair: ", ".join(pair))
def pair(request, made):
    """A full and a pruned model with their tokenizers."""
    kind, head = request.param
    tokenizer, ids, small = made(kind)
    names = ("pad", "bos", "eos", "cls", "sep", "mask")
    sizes = SHAPE | {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    sizes |= dict(vocab_size=len(tokenizer) + SPARE, decoder_start_token_id=tokenizer.convert_tokens_to_ids("<tgl_PH>"))
    full = fill(HEADS[head](sizes))
    return SimpleNamespace(
        kind=kind, head=head, tokenizer=tokenizer, small=small, ids=ids, full=full,
        pruned=prune_model(full, tokenizer, ids), rows=torch.tensor(ids),
    )  # fmt: skip


def same(pair, token):
    """Whether a token has the same name in both tokenizers and the same vector in both models."""
    old, new = pair.tokenizer.convert_tokens_to_ids(token), pair.small.convert_tokens_to_ids(token)
    vectors = [model.get_input_embeddings().weight[i] for model, i in ((pair.full, old), (pair.pruned, new))]
    return pair.ids[new] == old and torch.equal(*vectors)


def test_far_language_ids_move_with_their_tokens(pair):
    assert all(same(pair, token) for token in LANGUAGES)
    assert max(pair.small.get_vocab().values()) == len(pair.ids) - 1


def test_decoder_start_token_is_not_stale(pair):
    assert pair.pruned.config.decoder_start_token_id == pair.small.convert_tokens_to_ids("<tgl_PH>")


def test_special_ids_of_the_config_are_not_stale(pair):
    for name in ("pad", "bos", "eos"):
        assert getattr(pair.pruned.config, f"{name}_token_id") == getattr(pair.small, f"{name}_token_id")


def test_post_processor_adds_the_tokens_it_added_before(pair):
    for texts in (("Kumain siya.",), ("Kumain siya.", "Umulan.")):
        before, after = pair.tokenizer(*texts).input_ids, pair.small(*texts).input_ids
        assert [pair.ids[i] for i in after] == before


def test_padding_is_the_pad_token_and_its_index(pair):
    padded = pair.small(["Kumain.", "Kumain siya ng mangga."], padding=True).input_ids
    assert padded[0][-1] == pair.small.pad_token_id == pair.pruned.get_input_embeddings().padding_idx


def test_special_tokens_keep_their_vectors(pair):
    assert all(same(pair, token) for token in pair.tokenizer.all_special_tokens)


def test_words_that_users_added_keep_their_names_and_vectors(pair):
    assert all(same(pair, word) for word in WORDS)
    assert [pair.ids[i] for i in pair.small(TEXT).input_ids] == pair.tokenizer(TEXT).input_ids


def test_head_has_the_rows_of_the_kept_tokens_and_its_bias(pair):
    head, whole = pair.pruned.get_output_embeddings(), pair.full.get_output_embeddings()
    if head is None:
        assert pair.head == "no head"
        return
    assert torch.equal(head.weight, whole.weight[pair.rows])
    assert (head.weight is pair.pruned.get_input_embeddings().weight) == ("untied" not in pair.head)
    assert (head.bias is None) == ("without" in pair.head)
    assert head.bias is None or torch.equal(head.bias, whole.bias[pair.rows])
    ids = torch.tensor([pair.small("Kumain siya ng mangga.").input_ids])
    with torch.inference_mode():
        logits = pair.pruned(input_ids=ids).logits, pair.full(input_ids=pair.rows[ids]).logits
    assert torch.equal(logits[0], logits[1][..., pair.rows])


def test_rows_beyond_the_tokenizer_go_and_the_vocabulary_size_is_right(pair, tmp_path):
    rows = len(pair.pruned.get_input_embeddings().weight)
    assert rows == pair.pruned.config.vocab_size == len(pair.ids) == len(pair.small)
    assert max(pair.ids) < len(pair.tokenizer) <= len(pair.full.get_input_embeddings().weight) - SPARE


def test_merges_name_no_token_that_is_gone(pair):
    model = json.loads(pair.small.backend_tokenizer.to_str())["model"]
    for left, right in model.get("merges", []):
        assert {left, right, left + right} <= set(model["vocab"])


def test_files_of_a_bare_model_or_one_with_a_head_are_pruned(pair, tmp_path):
    write_full(tmp_path / "full", pair.full, pair.tokenizer)
    prune_files(tmp_path / "full", tmp_path / "small", pair.ids)
    model = type(pair.full).from_pretrained(tmp_path / "small")
    assert all(torch.equal(v, pair.pruned.state_dict()[name]) for name, v in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert tokenizer(TEXT).input_ids == pair.small(TEXT).input_ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_two_languages_are_kept_together(kind, made, parallel):
    """Exact on texts of both, and on texts that mix them."""
    tokenizer = made(kind)[0]
    texts = [row[code] for row in parallel[:40] for code in ("tgl", "eng")]
    texts += [f"{row['tgl']} {row['eng']}" for row in parallel[:20]]
    ids = select_tokens(tokenizer, texts).ids
    small = prune_tokenizer(tokenizer, ids)
    assert all([ids[i] for i in small(text).input_ids] == tokenizer(text).input_ids for text in texts)


def changed(tokenizer, **names):
    """The tokenizer with other names of special tokens."""
    found = {f"{n}_token": getattr(tokenizer, f"{n}_token") for n in ("pad", "unk", "bos", "eos", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **found | names)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "BPE with byte fallback"])
def test_unknown_token_may_be_the_padding(kind, training, corpus):
    plain = TOKENIZERS[kind](training)
    tokenizer = changed(plain, pad_token=plain.unk_token)
    ids = select_tokens(tokenizer, corpus).ids
    small = prune_tokenizer(tokenizer, ids)
    assert small.pad_token == small.unk_token and small.pad_token_id == small.unk_token_id
    for text in corpus[:5]:
        assert [ids[i] for i in small(text).input_ids] == tokenizer(text).input_ids
    padded = small(["Kumain.", "Kumain siya ng mangga."], padding=True)
    assert padded.input_ids[0][-1] == small.unk_token_id and padded.attention_mask[0][-1] == 0


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram"])
def test_second_spelling_of_the_unknown_token_stays(kind, training, corpus):
    """MPNet's model says [UNK], its tokenizer <unk>."""
    plain = TOKENIZERS[kind](training)
    second = "<unk>" if kind == "WordPiece" else "[UNK]"
    plain.add_special_tokens({"additional_special_tokens": [second]})
    tokenizer = changed(plain, unk_token=second)
    ids = select_tokens(tokenizer, corpus).ids
    small = prune_tokenizer(tokenizer, ids)
    for token in (plain.unk_token, second):
        assert ids[small.convert_tokens_to_ids(token)] == tokenizer.convert_tokens_to_ids(token)
    text = "\u4e2d\u6587"
    assert [ids[i] for i in small(text).input_ids if ids[i] != tokenizer.unk_token_id]


@pytest.mark.parametrize("name", ["endoftext", "[EOT]"])
def test_padding_may_have_any_name(name, training, corpus):
    plain = train_unigram(training)
    backend = edit(plain.backend_tokenizer, lambda spec: None)
    backend.add_special_tokens([name])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=name, unk_token="<unk>")
    ids = select_tokens(tokenizer, corpus).ids
    small = prune_tokenizer(tokenizer, ids)
    assert small.pad_token == name and ids[small.pad_token_id] == tokenizer.pad_token_id


def test_first_ids_of_a_unigram_stay_in_place_for_the_class_that_counts_on_them(training, corpus):
    spec = json.loads(train_unigram(training).backend_tokenizer.to_str())["model"]
    tokenizer = XLMRobertaTokenizer(vocab=[tuple(item) for item in spec["vocab"]])
    small = prune_tokenizer(tokenizer, select_tokens(tokenizer, corpus).ids)
    assert [small.convert_ids_to_tokens(i) for i in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert json.loads(small.backend_tokenizer.to_str())["model"]["unk_id"] == 3


def test_byte_tokens_stay_and_characters_of_other_scripts_go(made):
    tokenizer, ids, small = made("BPE with byte fallback")
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(small.get_vocab())
    foreign = {token for token in token_list(tokenizer) if len(token) == 1 and script_of(token) & {"Cyrl", "Hani"}}
    assert foreign and not foreign & set(small.get_vocab())
    for text in ("Дождь 雨 \U0001f600", "ñandú"):
        assert small.decode(small(text).input_ids, skip_special_tokens=True) == text


def test_added_words_without_vectors_are_refused_with_what_to_do(training, tmp_path):
    tokenizer = train_wordpiece(training)
    model = fill(BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE)))
    tokenizer.add_tokens(WORDS)
    write_full(tmp_path, model, tokenizer)
    with pytest.raises(UserError, match=r"if words were added .*resize_token_embeddings"):
        kdlib.load_encoder(tmp_path)


@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
def test_folder_with_sentencepiece_or_word_list_alone_is_pruned_exactly(family, training, corpus, tmp_path):
    """Folders of old: sentencepiece.bpe.model or vocab.txt, and no tokenizer.json."""
    full = tmp_path / "full"
    full.mkdir()
    if family == "bert":
        tokenizer = train_wordpiece(training)
        (full / "vocab.txt").write_text("\n".join(token_list(tokenizer)), "utf-8")
        (full / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
        model = BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE, pad_token_id=0))
    else:
        import sentencepiece
        from transformers import XLMRobertaConfig, XLMRobertaModel

        with open(full / "sentencepiece.bpe.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(training), model_writer=file, vocab_size=500, minloglevel=2
            )
        model = XLMRobertaModel(XLMRobertaConfig(vocab_size=502, **SHAPE, pad_token_id=1, max_position_embeddings=140))
    fill(model).save_pretrained(full)
    teacher = kdlib.load_encoder(full, max_length=60)
    ids = select_tokens(teacher.tokenizer, corpus).ids
    kdlib.prune_encoder(teacher, ids, tmp_path / "small", full)
    pruned = kdlib.load_encoder(tmp_path / "small", max_length=60)
    assert len(ids) < len(teacher.tokenizer)
    for text in corpus[:20]:
        assert [ids[i] for i in pruned.tokenize([text])[0].ids] == teacher.tokenize([text])[0].ids
    np.testing.assert_array_equal(text_vectors(pruned, corpus[:20]), text_vectors(teacher, corpus[:20]))
