"""Captured queries and keys give the model's own attention."""

import pytest
import torch
from transformers import EuroBertConfig, EuroBertModel, GteConfig, GteModel, ModernBertConfig, ModernBertModel

from kdlib.distillation.objectives import RequiredOutputs, attention_loss, attention_scores
from kdlib.distillation.state_capture import StateCapture
from kdlib.models.encoder import layer_states

IDS = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
SHAPE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, **IDS)
MODELS = {
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**SHAPE, cls_token_id=0, sep_token_id=2, local_attention=4, attn_implementation="eager")
    ),
    "eurobert": lambda: EuroBertModel(
        EuroBertConfig(**SHAPE, mask_token_id=3, num_key_value_heads=2, attn_implementation="eager")
    ),
    "gte": lambda: GteModel(GteConfig(**SHAPE, attn_implementation="eager")),
}
TOKENS = torch.tensor([[0, *range(5, 15), 2], [0, *range(20, 26), 2, 1, 1, 1, 1]])
MASK = (TOKENS != 1).long()


def drawn(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_captured_scores_give_the_models_attention(kind):
    """Rotated, with shared keys, and within the window of local layers."""
    model = drawn(kind)
    watched = StateCapture(model, [1, 2, 3, 4], RequiredOutputs(attention=True, layers=True))
    with torch.inference_mode():
        caught = watched(TOKENS, MASK)
        own = model(input_ids=TOKENS, attention_mask=MASK, output_attentions=True).attentions
    place = torch.arange(12)
    for query, key, reach, expected in zip(caught.query, caught.key, caught.reach, own, strict=True):
        seen = MASK[:, None, None].bool().expand(2, 1, 12, 12)
        if reach is not None:
            seen = seen & ((place[:, None] - place).abs() <= reach)
        found = attention_scores(query, key).masked_fill(~seen, float("-inf")).softmax(-1)
        real = MASK[:, None, :, None].bool().expand_as(found)
        assert torch.allclose(found[real], expected[real], atol=1e-5)
    assert (caught.reach == [None, 2, 2, None]) == (kind == "modernbert")


def test_scores_beyond_the_window_of_local_attention_are_not_compared():
    model = drawn("modernbert")
    student, teacher = (
        StateCapture(model, [2], RequiredOutputs(attention=True, layers=True))(TOKENS[:1], MASK[:1]) for _ in range(2)
    )
    assert attention_loss(student, teacher) == 0
    student.key[0] = student.key[0].clone()
    student.key[0][:, :, 11] += 1  # the last token, which the first cannot see
    near = [query[:, :, :9] for query in (student.query[0], teacher.query[0])]
    assert torch.equal(*near) and attention_loss(student, teacher) > 0
    student.query[0], teacher.query[0] = (query.clone() for query in (student.query[0], teacher.query[0]))
    for outputs in (student, teacher):
        outputs.query[0][:, :, 9:] = 0  # now only tokens that cannot see it have a query
    assert attention_loss(student, teacher) == 0


@pytest.mark.parametrize("kind", MODELS)
def test_states_between_layers_are_normalised_where_layers_begin_with_a_norm(kind):
    model = drawn(kind)
    states = layer_states(model, input_ids=TOKENS, attention_mask=MASK)
    plain = model(input_ids=TOKENS, attention_mask=MASK, output_hidden_states=True).hidden_states
    assert torch.equal(states[-1], plain[-1])
    if kind == "gte":
        assert all(torch.equal(a, b) for a, b in zip(states, plain))
        return
    lengths = torch.stack(states[:-1]).square().mean(-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3)
    for state, raw in zip(states[:-1], plain):
        raw = raw - raw.mean(-1, keepdim=True) if kind == "modernbert" else raw
        assert torch.allclose(torch.cosine_similarity(state, raw, dim=-1), torch.ones(state.shape[:2]), atol=1e-4)
