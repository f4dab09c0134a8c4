"""Masking by BERT's recipe, and heads that are made, pruned and kept."""

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from kdlib.errors import UserError
from kdlib.models.masking import mask_id, mask_tokens, maskable_tokens, word_numbers
from kdlib.models.mlm_head import MaskedHead, load_head, new_head, perplexity, prune_head, save_head
from kdlib.pruning.model import prune_model
from kdlib.pruning.tokenizer import prune_tokenizer

MASK, ROWS = 4, 1000


def batch(rows=400, columns=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, ROWS, (rows, columns), generator=generator)
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, [0, -1]] = False
    maskable[::2, 30:] = False  # padding
    return ids, maskable


def masked_by(ids, maskable, seed=1, **options):
    return mask_tokens(ids, maskable, MASK, ROWS, generator=torch.Generator().manual_seed(seed), **options)


def near(found, expected, count):
    """Within four standard errors of a share."""
    return abs(found - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_shares_are_those_of_the_recipe(share):
    ids, maskable = batch()
    masked, chosen = masked_by(ids, maskable, share=share)
    count = int(chosen.sum())
    assert near(count / int(maskable.sum()), share, int(maskable.sum()))
    fates = masked[chosen]
    assert near(float((fates == MASK).float().mean()), 0.8, count)
    assert near(float((fates == ids[chosen]).float().mean()), 0.1, count)  # a random token is the same once in ROWS
    noise = fates[(fates != MASK) & (fates != ids[chosen])]
    assert near(len(noise) / count, 0.1, count)
    assert noise.min() < 0.02 * ROWS and noise.max() > 0.98 * ROWS and abs(noise.float().mean() / ROWS - 0.5) < 0.05


def test_what_is_not_chosen_stays_and_what_is_not_maskable_is_never_chosen():
    ids, maskable = batch()
    masked, chosen = masked_by(ids, maskable, share=0.9)
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert not (chosen & ~maskable).any()


def test_same_generator_same_masks():
    ids, maskable = batch()
    first, other, again = (masked_by(ids, maskable, seed)[0] for seed in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    before = torch.get_rng_state()
    masked_by(ids, maskable)
    assert torch.equal(before, torch.get_rng_state())


def test_whole_words_are_chosen_together_at_the_same_rate():
    ids, maskable = batch()
    words = (torch.arange(50) // 3).expand(400, 50).clone()
    words[:, [0, -1]] = -1
    masked, chosen = masked_by(ids, maskable, words=words)
    for word in range(17):
        inside = maskable & (words == word)
        rows = inside.any(1)
        assert torch.equal((chosen & inside).sum(1)[rows] > 0, ((chosen & inside) == inside).all(1)[rows])
    assert near(float(chosen.sum() / maskable.sum()), 0.15, int(maskable.sum()) / 3)
    inside = words[0] == 5
    fates = (masked == MASK)[:, inside][chosen[:, inside].all(1)]
    assert (fates.any(1) & ~fates.all(1)).any()  # each token of a word has its own fate


def test_words_are_drawn_apart_in_every_text():
    ids, maskable = batch()
    words = (torch.arange(50) // 2).expand(400, 50)
    _, chosen = masked_by(ids, maskable, words=words)
    assert 0 < chosen[:, 3].float().mean() < 1 and not torch.equal(chosen[:, 3], chosen[:, 5])


@pytest.mark.parametrize("words", [None, torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, 1, 2, -1]])])
def test_a_batch_without_a_draw_gets_one_target(words):
    ids, maskable = torch.full((2, 5), 7), torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0]]).bool()
    for seed in range(20):
        masked, chosen = masked_by(ids, maskable, seed, share=1e-9, words=words)
        assert (
            chosen.any()
            and not (chosen & ~maskable).any()
            and chosen.sum() == (2 if chosen[0, 1] and words is not None else 1)
        )
    _, chosen = masked_by(ids, torch.zeros_like(maskable), share=0.9, words=words)
    assert not chosen.any()


def test_maskable_tokens_are_neither_special_nor_of_the_prefix():
    encoder = tiny.encoder(layers=1, prefix="bata: ")
    texts = ["ang aso [MASK] kumain", "\u4e00 aso", "", "bata: aso", "xyz"]
    encodings = encoder.tokenize(texts)
    found = maskable_tokens(encoder.tokenizer, encodings, encoder.prefix)
    tokens = [
        [encoder.tokenizer.convert_ids_to_tokens(i) for i, keep in zip(e.ids, row) if keep]
        for e, row in zip(encodings, found)
    ]
    # [UNK] stands for the colon, which the tiny tokenizer does not know.
    assert tokens == [["ang", "aso", "kumain"], ["aso"], [], ["bata", "aso"], ["x", "##y", "##z"]]
    numbers = word_numbers(encodings)
    last = numbers[-1][found[-1]]
    assert len(set(last.tolist())) == 1 and numbers[-1][0] == -1


def test_maskable_tokens_of_the_embedded_teacher(teacher_tokenizer):
    text = "Ang bata ay kumain ng mangga."
    encoding = teacher_tokenizer(["query: " + text, text], truncation=True, max_length=64).encodings
    with_prefix, plain = maskable_tokens(teacher_tokenizer, encoding[:1], "query: ") + maskable_tokens(
        teacher_tokenizer, encoding[1:]
    )
    ids = [np.array(e.ids)[m].tolist() for e, m in zip(encoding, (with_prefix, plain))]
    assert ids[0] == ids[1] == teacher_tokenizer(text, add_special_tokens=False).input_ids


def test_the_embedded_teacher_and_its_pruned_tokenizer_have_a_mask(teacher_tokenizer):
    assert teacher_tokenizer.convert_ids_to_tokens(mask_id(teacher_tokenizer, "e5")) == "<mask>"
    ids = sorted({*teacher_tokenizer.all_special_ids, *range(300)})
    pruned = prune_tokenizer(teacher_tokenizer, ids)
    assert ids[mask_id(pruned, "pruned")] == teacher_tokenizer.mask_token_id


def test_a_tokenizer_without_a_mask_is_named():
    tokenizer = tiny.tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="some model.*no mask token"):
        mask_id(tokenizer, "some model")


def random_head(encoder, seed=0):
    torch.manual_seed(seed)
    head = new_head(encoder.model)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def test_a_new_head_starts_as_berts_and_leaves_the_random_state_alone():
    encoder = tiny.encoder(layers=1)
    before = torch.get_rng_state()
    head, again, other = (new_head(encoder.model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(head.dense.weight, again.dense.weight) and not torch.equal(head.dense.weight, other.dense.weight)
    assert abs(float(head.dense.weight.detach().std()) - 0.02) < 0.002
    assert not head.dense.bias.any() and not head.bias.any() and head.norm.weight.eq(1).all() and not head.training
    frequencies = np.random.default_rng(0).dirichlet(np.ones(len(head.bias)))
    assert np.allclose(new_head(encoder.model, frequencies).bias.detach().exp(), frequencies, rtol=1e-4)


def test_pruned_logits_are_the_full_ones_at_kept_ids():
    encoder = tiny.encoder(layers=2)
    head = random_head(encoder)
    kept = [0, 1, 2, 3, 4, 30, 17, 9, 60]
    pruned_model = prune_model(encoder.model, encoder.tokenizer, kept)
    pruned = prune_head(head, kept)
    states = torch.randn(6, 32)
    full = head(states, encoder.model.get_input_embeddings().weight)[:, sorted(kept)]
    assert torch.allclose(pruned(states, pruned_model.get_input_embeddings().weight), full, atol=1e-6)
    assert len(head.bias) == len(encoder.tokenizer)  # the full head stays whole
    pruned.dense.weight.data.zero_()
    assert head.dense.weight.any()
    with pytest.raises(UserError, match="only"):
        prune_head(head, [0, 10_000])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_head_comes_back_as_it_was(tmp_path, activation):
    encoder = tiny.encoder(layers=1)
    head = MaskedHead(32, 32, len(encoder.tokenizer), eps=1e-3, activation=activation)
    torch.nn.init.normal_(head.bias)
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors", encoder.model)
    states, embeddings = torch.randn(5, 32) * 1e-2, encoder.model.get_input_embeddings().weight
    assert torch.equal(head(states, embeddings), again(states, embeddings)) and not again.training


def test_files_that_are_no_head_of_the_model_are_refused(tmp_path):
    encoder, file = tiny.encoder(layers=1), tmp_path / "head.safetensors"
    with pytest.raises(UserError, match="not a masked-language head"):
        load_head(file, encoder.model)
    file.write_bytes(b"rubbish" * 9)
    with pytest.raises(UserError, match="not a masked-language head"):
        load_head(file, encoder.model)
    save_file({"bias": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="not a masked-language head"):
        load_head(file, encoder.model)
    save_head(MaskedHead(32, 32, len(encoder.tokenizer) - 1), file)
    with pytest.raises(UserError, match="the model needs"):
        load_head(file, encoder.model)


def test_perplexity_is_exp_of_the_mean_loss_with_an_interval_over_texts():
    rng = np.random.default_rng(0)
    sums = np.stack([rng.gamma(20, 1.0, 300), np.full(300, 10.0)], 1)
    found = perplexity(sums)
    assert found["value"] == pytest.approx(np.exp(sums[:, 0].sum() / 3000))
    error = sums[:, 0].std() / 10 / 300**0.5
    assert np.log(found["high"] / found["low"]) == pytest.approx(2 * 1.96 * error, rel=0.15)
    one = perplexity(np.array([[6.0, 3.0], [0.0, 0.0]]))
    assert one["low"] == pytest.approx(one["high"]) and one["value"] == pytest.approx(np.exp(2))
