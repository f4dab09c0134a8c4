"""A pruned model: the same hidden states and logits from fewer rows."""

import pytest
import torch
from pruning.pairs import (
    ACCENTED,
    HEADS,
    SHAPE,
    build,
    config_ids,
    edit_weights,
    fill,
    old_names,
    same_model,
    same_tokenizer,
    write_full,
)
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from kdlib.errors import UserError
from kdlib.models.encoder import Encoder
from kdlib.models.mlm_head import load_head, new_head
from kdlib.models.safetensors_files import HEAD_FILE
from kdlib.pruning.model import prune_encoder, prune_model
from kdlib.pruning.selection import select_tokens
from kdlib.pruning.tokenizer import prune_tokenizer


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


def test_model_with_fewer_rows_than_tokens_is_refused(studies):
    study = studies("wordpiece")
    model = BertModel(BertConfig(vocab_size=100, **SHAPE))
    with pytest.raises(UserError, match="only 100 embedding rows"):
        prune_model(model, study.tokenizer, study.chosen.ids)


def test_pruning_draws_no_random_numbers(studies):
    study = studies("wordpiece")
    before = torch.random.get_rng_state()
    prune_model(study.model, study.tokenizer, study.chosen.ids)
    assert torch.equal(torch.random.get_rng_state(), before)


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
