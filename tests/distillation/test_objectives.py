"""Objectives against plain loops, and what must not change them."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import ot
import pytest
import torch

from kdlib.distillation.objectives import (
    OBJECTIVES,
    ModelOutputs,
    RequiredOutputs,
    alignment_loss,
    attention_loss,
    check_objectives,
    comet_loss,
    constant_loss,
    cosine_loss,
    crosslingual_loss,
    hidden_loss,
    kl_loss,
    mlm_loss,
    relation_loss,
    sentence_loss,
    similarity_loss,
    tinybert_attention_loss,
    tinybert_hidden_loss,
    total_loss,
    transport_loss,
    transport_plan,
)
from kdlib.errors import UserError

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
WHOLE = torch.ones(2, 5, dtype=torch.long)
TARGETS = torch.tensor([3, 0, 6])


def states(seed, layers=2, heads=2, size=4, mask=MASK):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    hidden = [draw(2, 5, heads * size) for _ in range(layers)]
    query, key = ([draw(2, heads, 5, size) for _ in range(layers)] for _ in range(2))
    embedded, logits = draw(2, 5, heads * size), draw(3, 7) * 3
    value = [draw(2, heads, 5, size) for _ in range(layers)]
    translation = draw(2, 3, heads * size)
    return ModelOutputs(
        hidden, mask, query, key, value, embedded, logits, TARGETS, translation, torch.tensor([[1, 1, 1], [1, 0, 0]])
    )


def loss_of(name):
    """An objective's loss, with settings that fit the small tensors."""
    loss = OBJECTIVES[name].loss
    return partial(loss, heads=2) if name == "relation" else loss


def real_tokens():
    return [(b, t) for b in range(2) for t in range(5) if MASK[b, t]]


def test_hidden_loss_is_the_mse_over_real_tokens_by_the_teachers_variance():
    student, teacher = states(0), states(1)
    expected = 0
    for mine, theirs in zip(student.hidden, teacher.hidden):
        values = [(mine[b, t, i].item(), theirs[b, t, i].item()) for b, t in real_tokens() for i in range(8)]
        mean = sum(y for _, y in values) / len(values)
        variance = sum((y - mean) ** 2 for _, y in values) / (len(values) - 1)
        expected += sum((x - y) ** 2 for x, y in values) / len(values) / variance / 2
    assert hidden_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_attention_loss_is_the_mse_of_scaled_dot_products_before_the_softmax():
    both = student, teacher = states(2), states(3)

    def dot(query, key):
        return sum(query[k].item() * key[k].item() for k in range(4)) / math.sqrt(4)

    expected = 0
    for layer in range(2):
        pairs = []
        for b in range(2):
            for head in range(2):
                for i in range(5):
                    for j in range(5):
                        if MASK[b, i] and MASK[b, j]:
                            pairs.append([dot(s.query[layer][b, head, i], s.key[layer][b, head, j]) for s in both])
        mean = sum(y for _, y in pairs) / len(pairs)
        variance = sum((y - mean) ** 2 for _, y in pairs) / (len(pairs) - 1)
        expected += sum((x - y) ** 2 for x, y in pairs) / len(pairs) / variance / 2
    assert attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_sentence_loss_is_one_minus_the_cosine_of_the_means():
    student, teacher = states(4), states(5)
    expected = 0
    for b in range(2):
        count = int(MASK[b].sum())
        a, c = (s.hidden[-1][b, :count].mean(0).double() for s in (student, teacher))
        expected += (1 - (a @ c / a.norm() / c.norm()).item()) / 2
    assert sentence_loss(student, teacher).item() == pytest.approx(expected, abs=1e-6)


# TinyBERT, against its published training step: tensors of all layers in, scores with the mask already added


def published_step(student_atts, student_reps, teacher_atts, teacher_reps, fit):
    mse = torch.nn.MSELoss()
    att_loss, rep_loss = 0.0, 0.0
    per_block = int(len(teacher_atts) / len(student_atts))
    for i, student_att in enumerate(student_atts):
        teacher_att = teacher_atts[i * per_block + per_block - 1]
        student_att = torch.where(student_att <= -1e2, torch.zeros_like(student_att), student_att)
        teacher_att = torch.where(teacher_att <= -1e2, torch.zeros_like(teacher_att), teacher_att)
        att_loss = att_loss + mse(student_att, teacher_att)
    for i, student_rep in enumerate(student_reps):
        rep_loss = rep_loss + mse(fit(student_rep), teacher_reps[i * per_block])
    return att_loss, rep_loss


def published(student, teacher, fit=lambda x: x, text=None):
    """The published step on compared layers alone, on the batch or, cut to its length, on one text of it."""
    rows = slice(None) if text is None else slice(text, text + 1)
    end = student.mask.shape[1] if text is None else int(student.mask[text].sum())
    parts = []
    for s in (student, teacher):
        scores = [q[rows, :, :end] @ k[rows, :, :end].transpose(2, 3) / math.sqrt(4) for q, k in zip(s.query, s.key)]
        parts += [scores, [h[rows, :end] for h in (s.embedded, *s.hidden)]]
    return published_step(*parts, fit)


def test_tinybert_losses_are_the_published_ones_where_nothing_is_padded():
    student, teacher = states(2, mask=WHOLE), states(3, mask=WHOLE)
    attention, hidden = published(student, teacher)
    assert tinybert_attention_loss(student, teacher).item() == pytest.approx(attention.item(), rel=1e-6)
    assert tinybert_hidden_loss(student, teacher).item() == pytest.approx(hidden.item(), rel=1e-6)


def test_tinybert_losses_are_the_published_ones_over_real_tokens():
    """What the published step gives for each text cut to its length, weighted by how much each text compares."""
    student, teacher = states(2), states(3)
    lengths = [4, 2]
    singles = [published(student, teacher, text=i) for i in range(2)]
    attention = sum(a * n * n for (a, _), n in zip(singles, lengths)) / sum(n * n for n in lengths)
    hidden = sum(h * n for (_, h), n in zip(singles, lengths)) / sum(lengths)
    assert tinybert_attention_loss(student, teacher).item() == pytest.approx(attention.item(), rel=1e-6)
    assert tinybert_hidden_loss(student, teacher).item() == pytest.approx(hidden.item(), rel=1e-6)


def test_tinybert_sums_over_layers_and_divides_by_no_variance():
    student, teacher = states(2), states(3)
    doubled = [ModelOutputs([3 * h for h in s.hidden], MASK, embedded=3 * s.embedded) for s in (student, teacher)]
    once = tinybert_hidden_loss(student, teacher)
    assert tinybert_hidden_loss(*doubled).item() == pytest.approx(9 * once.item(), rel=1e-5)
    assert hidden_loss(*doubled).item() == pytest.approx(hidden_loss(student, teacher).item(), rel=1e-5)


# DistilBERT


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_kl_is_that_of_softened_targets_times_the_temperature_squared(temperature):
    student, teacher = states(4), states(5)
    expected = 0
    for mine, theirs in zip(student.logits.double(), teacher.logits.double()):
        p, q = ([math.exp(v / temperature) for v in row.tolist()] for row in (theirs, mine))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q)) / 3 * temperature**2
    assert kl_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_mlm_is_the_mean_surprise_at_the_masked_tokens():
    student = states(4)
    expected = -sum(
        math.log(math.exp(row[t]) / sum(math.exp(v) for v in row)) for row, t in zip(student.logits.tolist(), TARGETS)
    )
    assert mlm_loss(student).item() == pytest.approx(expected / 3, rel=1e-5)


def test_cosine_is_the_librarys_over_real_tokens():
    student, teacher = states(6), states(7)
    mine, theirs = (s.hidden[-1][MASK.bool()] for s in (student, teacher))
    expected = torch.nn.CosineEmbeddingLoss()(mine, theirs, torch.ones(len(mine)))
    assert cosine_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


# similar work, against loops over texts cut to their lengths


def softmax(row):
    e = [math.exp(v - max(row)) for v in row]
    return [v / sum(e) for v in e]


def dots(a, b):
    """a [n, d], b [n, d] as lists -> scaled products [n][n]."""
    return [[sum(x * y for x, y in zip(u, v)) / math.sqrt(len(u)) for v in b] for u in a]


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_relation_is_minilmv2s_for_models_of_other_widths_and_heads(heads):
    student, teacher = states(2, heads=2, size=4), states(3, heads=4, size=6)
    expected = 0
    for kind in ("query", "key", "value"):
        for b in range(2):
            n = int(MASK[b].sum())
            for head in range(heads):
                rows = []
                for side in (student, teacher):
                    flat = torch.cat(list(getattr(side, kind)[-1][b]), -1)[:n]  # [n, width]
                    size = flat.shape[1] // heads
                    part = flat[:, head * size : (head + 1) * size].double().tolist()
                    rows.append([softmax(row) for row in dots(part, part)])
                divergence = sum(t * math.log(t / s) for mine, own in zip(*rows) for s, t in zip(mine, own))
                expected += divergence / n / heads / 2 / 3
    assert relation_loss(student, teacher, heads).item() == pytest.approx(expected, rel=1e-4)


def test_comet_compares_maps_averaged_over_heads_of_any_number():
    student, teacher = states(2, heads=2), states(3, heads=4)
    values = []
    for b in range(2):
        n = int(MASK[b].sum())
        means = []
        for side in (student, teacher):
            parts = [(q[:n].tolist(), k[:n].tolist()) for q, k in zip(side.query[-1][b], side.key[-1][b])]
            maps = [[softmax(row) for row in dots(q, k)] for q, k in parts]
            means.append([[sum(m[i][j] for m in maps) / len(maps) for j in range(n)] for i in range(n)])
        values += [(means[0][i][j], means[1][i][j]) for i in range(n) for j in range(n)]
    mean = sum(t for _, t in values) / len(values)
    variance = sum((t - mean) ** 2 for _, t in values) / (len(values) - 1)
    expected = sum((s - t) ** 2 for s, t in values) / len(values) / variance
    assert comet_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def pooled(side):
    return [side.hidden[-1][b, : int(MASK[b].sum())].double().mean(0) for b in range(2)]


def test_similarity_is_the_mse_of_the_matrices_of_cosines_whatever_the_widths():
    student, teacher = states(4, heads=2), states(5, heads=3)

    def matrix(vectors):
        return [[(a @ b / a.norm() / b.norm()).item() for a in vectors] for b in vectors]

    mine, theirs = matrix(pooled(student)), matrix(pooled(teacher))
    expected = sum((mine[i][j] - theirs[i][j]) ** 2 for i in range(2) for j in range(2)) / 4
    assert similarity_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_alignment_is_the_mse_of_vectors_by_the_teachers_variance():
    student, teacher = states(4), states(5)
    mine, theirs = (torch.stack(pooled(side)) for side in (student, teacher))
    expected = ((mine - theirs) ** 2).mean() / theirs.flatten().var()
    assert alignment_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_alignment_sees_lengths_and_sentence_does_not():
    student, teacher = states(4), states(4)
    student.hidden[-1] = 2 * student.hidden[-1]
    assert alignment_loss(student, teacher).item() > 0.1
    assert sentence_loss(student, teacher).item() == pytest.approx(0, abs=1e-6)


def test_crosslingual_compares_with_the_teachers_vector_of_the_translation():
    student, teacher = states(4), states(5)
    target = torch.stack([teacher.translation[0].mean(0), teacher.translation[1, 0]]).double()
    expected = ((torch.stack(pooled(student)) - target) ** 2).mean() / target.flatten().var()
    assert crosslingual_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def without_translation(teacher, text):
    return replace(teacher, translated=teacher.translated.index_fill(0, torch.tensor(text), 0))


@pytest.mark.parametrize("loss", [crosslingual_loss, transport_loss])
def test_texts_without_a_translation_do_not_count(loss):
    student, teacher = states(4), states(5)
    both, first = loss(student, teacher), loss(student, without_translation(teacher, 1))
    alone = [
        ModelOutputs([h[:1] for h in s.hidden], MASK[:1], translation=s.translation[:1], translated=s.translated[:1])
        for s in (student, teacher)
    ]
    assert first.item() == pytest.approx(loss(*alone).item(), rel=1e-6) and first != both


def test_transport_is_the_cost_of_pots_plan():
    student, teacher = states(4), states(5)
    expected = 0
    for b, (n, m) in enumerate([(4, 3), (2, 1)]):
        mine, theirs = student.hidden[-1][b, :n].double(), teacher.translation[b, :m].double()
        cost = 1 - torch.cosine_similarity(mine.unsqueeze(1), theirs.unsqueeze(0), dim=-1).numpy()
        expected += ot.sinkhorn2(np.full(n, 1 / n), np.full(m, 1 / m), cost, 0.05, numItermax=10000) / 2
    assert transport_loss(student, teacher).item() == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_plans_of_many_steps_are_pots(epsilon):
    cost = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(3)).double()
    rows, columns = torch.ones(3, 6), torch.ones(3, 5)
    rows[1, 4:], columns[2, 2:] = 0, 0
    plans = transport_plan(cost, rows, columns, epsilon, rounds=2000)
    for plan, costs, a, b in zip(plans, cost, rows, columns):
        n, m = int(a.sum()), int(b.sum())
        expected = ot.sinkhorn(
            np.full(n, 1 / n), np.full(m, 1 / m), costs[:n, :m].numpy(), epsilon,
            numItermax=10**5, stopThr=1e-12,
        )  # fmt: skip
        assert np.allclose(plan[:n, :m], expected, atol=1e-5)
        assert plan[n:].sum() == plan[:, m:].sum() == 0 and plan.sum() == pytest.approx(1, abs=1e-5)


def test_transport_moves_the_student_towards_the_translations_tokens():
    """No gradient flows through the plan, and the cost falls along that which is left."""
    student, teacher = states(4), states(5)
    leaf = student.hidden[-1].requires_grad_()
    before = transport_loss(student, teacher)
    before.backward()
    moved = replace(student, hidden=[(leaf - 0.5 * leaf.grad).detach()])
    assert transport_loss(moved, teacher) < before
    assert leaf.grad[MASK == 0].abs().sum() == 0


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"mlm", "transport"}))
def test_a_perfect_copy_costs_nothing(name):
    if name == "crosslingual":
        teacher = replace(states(6), translation=states(6).hidden[-1], translated=MASK)
        assert crosslingual_loss(states(6), teacher).item() == pytest.approx(0, abs=1e-6)
        return
    assert loss_of(name)(states(6), states(6)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_never_counts(name):
    student, teacher = states(7), states(8)
    before = loss_of(name)(student, teacher)
    for s in (student, teacher):
        for tensor in (*s.hidden, s.embedded):
            tensor[MASK == 0] = 1e4
        s.translation[s.translated == 0] = 1e4
        for tensor in s.query + s.key + s.value:
            tensor.transpose(1, 2)[MASK == 0] = 1e4
    assert torch.equal(before, loss_of(name)(student, teacher))


def test_total_is_the_weighted_sum_of_its_parts():
    weights = {"hidden": 2.0, "sentence": 0.5, "attention": 0.0}
    total, parts = total_loss(weights, states(0), states(1))
    assert set(parts) == {"hidden", "sentence"}
    assert total.item() == pytest.approx(2 * parts["hidden"].item() + 0.5 * parts["sentence"].item())


def test_temperature_reaches_the_soft_targets():
    total, parts = total_loss({"kl": 2.0, "mlm": 1.0}, states(0), states(1), temperature=4.0)
    assert parts["kl"].item() == pytest.approx(kl_loss(states(0), states(1), 4.0).item())
    assert total.item() == pytest.approx(2 * parts["kl"].item() + parts["mlm"].item())


def test_objectives_of_translations_wait_for_a_batch_that_has_some():
    teacher = replace(states(1), translation=None, translated=None)
    total, parts = total_loss({"sentence": 1.0, "crosslingual": 1.0}, states(0), teacher)
    assert set(parts) == {"sentence"} and total == parts["sentence"]


@pytest.mark.parametrize("loss", [attention_loss, tinybert_attention_loss])
def test_attention_without_maps_is_refused_not_zero(loss):
    empty = ModelOutputs(states(0).hidden, MASK, [], [])
    with pytest.raises(ValueError, match="attention maps"):
        loss(empty, empty)


def test_every_objective_has_a_gradient():
    for name in OBJECTIVES:
        loss, student = loss_of(name), states(0)
        leaves = [*student.hidden, *student.query, *student.key, *student.value, student.embedded, student.logits]
        for leaf in leaves:
            leaf.requires_grad_()
        loss(student, states(1)).backward()
        assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves), name


@pytest.mark.parametrize(
    "names, cacheable, teacher, masked",
    [
        (["hidden", "sentence"], True, True, False),
        (["tinybert_hidden"], True, True, False),
        (["similarity", "alignment"], True, True, False),
        (["relation"], False, True, False),
        (["comet"], False, True, False),
        (["crosslingual", "transport"], True, True, False),
        (["cosine", "attention"], False, True, False),
        (["kl", "mlm", "cosine"], False, True, True),
        (["mlm"], False, False, True),
    ],
)
def test_what_objectives_need(names, cacheable, teacher, masked):
    needs = RequiredOutputs.of(dict.fromkeys(names, 1.0) | dict.fromkeys(set(OBJECTIVES) - set(names), 0.0))
    assert (needs.cacheable, needs.teacher, needs.masked) == (cacheable, teacher, masked)


@pytest.mark.parametrize("weights", [{"hiden": 1.0}, {"hidden": -1.0}, {"hidden": 0.0}, {}])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(UserError):
        check_objectives(weights)


def test_the_constants_loss_is_what_a_student_gets_that_always_answers_the_mean():
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=(1, 500, 6)) * scale + rng.normal(size=6)).astype(np.float32) for scale in (0.5, 2.0)]
    teacher = ModelOutputs([torch.tensor(layer) for layer in layers], torch.ones(1, 500))
    means = [torch.tensor(np.broadcast_to(layer.mean(1, keepdims=True), layer.shape).copy()) for layer in layers]
    answered = float(hidden_loss(ModelOutputs(means, torch.ones(1, 500)), teacher))
    assert constant_loss(layer[0] for layer in layers) == pytest.approx(answered, rel=1e-3) and answered < 1
