"""Students: which layers they copy, that they copy them exactly, and what is refused."""

import itertools
import re

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    EuroBertConfig,
    EuroBertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from kdlib import config
from kdlib.batching import pad
from kdlib.distillation.student_init import build_student, count_layers, inner_maps, layer_map, source_layers
from kdlib.errors import UserError
from kdlib.models.families import FAMILIES
from kdlib.pruning.model import prune_model

DEPTH = 6
SHAPE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=48)
TEACHERS = {
    "bert": (lambda: BertModel(BertConfig(**SHAPE)), "encoder.layer."),
    "bert with a head": (lambda: BertForMaskedLM(BertConfig(**SHAPE)), "bert.encoder.layer."),
    "roberta": (lambda: RobertaModel(RobertaConfig(**SHAPE)), "encoder.layer."),
    "xlm-roberta": (lambda: XLMRobertaModel(XLMRobertaConfig(**SHAPE)), "encoder.layer."),
    "distilbert": (
        lambda: DistilBertModel(DistilBertConfig(vocab_size=60, dim=32, n_layers=DEPTH, n_heads=4, hidden_dim=48)),
        "transformer.layer.",
    ),
    "deberta-v2": (
        lambda: DebertaV2Model(
            DebertaV2Config(
                **SHAPE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
                norm_rel_ebd="layer_norm", conv_kernel_size=3,
            )
        ),
        "encoder.layer.",
    ),
}  # fmt: skip
IDS = torch.tensor([[0, 5, 17, 33, 8, 2], [0, 9, 41, 2, 1, 1]])
MASK = (IDS != 1).long()


def start(teacher, layers, init="alternate", seed=0, sample=None, **sizes):
    return build_student(teacher, config.Student(layers=layers, init=init, **sizes), seed, sample)


def fill(model):
    """Every weight drawn anew, so that no two layers share one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture(scope="module")
def teachers():
    return {name: (fill(make()), prefix) for name, (make, prefix) in TEACHERS.items()}


@pytest.fixture(params=TEACHERS)
def family(request, teachers):
    return teachers[request.param]


def layer(model, prefix, index):
    """The weights of one layer (0 = first), named from the layer on."""
    start = f"{prefix}{index}."
    return {name[len(start) :]: value for name, value in model.state_dict().items() if name.startswith(start)}


def outside(model, prefix):
    return {name: value for name, value in model.state_dict().items() if not name.startswith(prefix)}


def same(a, b):
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def states(model):
    return model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states


# which layers


@pytest.mark.parametrize(
    "init, student, teacher, expected",
    [
        ("alternate", 4, 12, [3, 6, 9, 12]),
        ("alternate", 6, 12, [2, 4, 6, 8, 10, 12]),
        ("alternate", 5, 12, [2, 4, 7, 9, 12]),
        ("alternate", 1, 12, [12]),
        ("alternate", 12, 12, list(range(1, 13))),
        ("late", 4, 12, [3, 7, 11, 12]),
        ("late", 5, 12, [2, 5, 8, 11, 12]),
        ("late", 3, 12, [5, 11, 12]),
        ("late", 2, 12, [6, 12]),
        ("late", 1, 12, [12]),
        ("late", 12, 12, list(range(1, 13))),
        ("first", 4, 12, [1, 2, 3, 4]),
        ("first", 1, 12, [1]),
        ("last", 4, 12, [9, 10, 11, 12]),
        ("last", 12, 12, list(range(1, 13))),
        ([1, 4, 8, 12], 4, 12, [1, 4, 8, 12]),
        ([12, 1], 2, 12, [12, 1]),
        ([3, 3], 2, 12, [3, 3]),
    ],
)
def test_layer_map(init, student, teacher, expected):
    assert layer_map(init, student, teacher) == expected


@pytest.mark.parametrize("teacher", [6, 7, 12, 24])
def test_spread_layers_rise_and_end_with_the_last(teacher):
    for student, rule in itertools.product(range(1, teacher + 1), ("alternate", "late")):
        layers = layer_map(rule, student, teacher)
        assert len(layers) == student and layers[-1] == teacher and layers[0] >= 1
        assert all(a < b for a, b in itertools.pairwise(layers))


@pytest.mark.parametrize(
    "init, student, message",
    [
        ([1, 2, 3], 4, "names 3 layers for a student of 4"),
        ([], 2, "names 0 layers"),
        ([0, 4], 2, "layers are 1 to 12"),
        ([4, 13], 2, "layers are 1 to 12"),
        ([-1, 4], 2, "layers are 1 to 12"),
        ("alternate", 13, "the teacher has only 12"),
        ("first", 13, "the teacher has only 12"),
        ("last", 20, "the teacher has only 12"),
        ("late", 13, "the teacher has only 12"),
        ("middle", 4, "student.init is 'middle'"),
    ],
)
def test_impossible_layers_are_refused(init, student, message):
    with pytest.raises(UserError, match=re.escape(message)):
        layer_map(init, student, 12)


@pytest.mark.parametrize("layers", [0, -2])
def test_student_without_layers_is_refused(layers, teachers):
    with pytest.raises(UserError, match="at least 1"):
        build_student(teachers["bert"][0], config.Student.model_construct(layers=layers))


def test_student_deeper_than_its_teacher_is_refused(teachers):
    with pytest.raises(UserError, match="only 6"):
        start(teachers["bert"][0], DEPTH + 1)


# what is copied


@pytest.mark.parametrize(
    "init, sources",
    [
        ("alternate", [2, 4, 6]),
        ("first", [1, 2, 3]),
        ("last", [4, 5, 6]),
        ([1, 5, 6], [1, 5, 6]),
        ([6, 2, 4], [6, 2, 4]),
        ([2, 2, 5], [2, 2, 5]),
    ],
    ids=str,
)
def test_named_layers_are_copied_exactly(init, sources, family):
    teacher, prefix = family
    student = start(teacher, 3, init)
    assert type(student) is type(teacher) and not student.training
    assert count_layers(student) == student.config.num_hidden_layers == 3
    for i, source in enumerate(sources):
        assert same(layer(student, prefix, i), layer(teacher, prefix, source - 1))
    assert not layer(student, prefix, 3)
    assert same(outside(student, prefix), outside(teacher, prefix))


def test_first_layers_give_the_teachers_first_states(family):
    teacher, _ = family
    student = start(teacher, 2, "first")
    expected, found = states(teacher), states(student)
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(expected, found))


def test_all_layers_give_the_teachers_states_bit_for_bit(family):
    teacher, _ = family
    expected, found = states(teacher), states(start(teacher, DEPTH))
    assert len(found) == DEPTH + 1 and all(torch.equal(a, b) for a, b in zip(expected, found))
    assert not torch.equal(expected[-1], expected[-2])


def test_layers_in_another_order_give_other_states(family):
    teacher, _ = family
    found = states(start(teacher, DEPTH, [6, 5, 4, 3, 2, 1]))
    assert torch.equal(found[0], states(teacher)[0]) and not torch.equal(found[-1], states(teacher)[-1])


def test_student_shares_no_memory_with_its_teacher(family):
    teacher, _ = family
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = start(teacher, 2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert same(before, teacher.state_dict())
    assert count_layers(teacher) == DEPTH


def test_head_stays_tied(teachers):
    teacher, _ = teachers["bert with a head"]
    for init in ("alternate", "random"):
        student = start(teacher, 2, init)
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_type_of_weights_and_attention_are_kept():
    teacher = AutoModel.from_config(BertConfig(**SHAPE), attn_implementation="eager", dtype=torch.bfloat16)
    for init in ("last", "random"):
        student = start(teacher, 2, init)
        assert student.dtype == torch.bfloat16 and student.config._attn_implementation == "eager"
    assert len(student(IDS, output_attentions=True).attentions) == 2


# random starts


def test_random_start_depends_on_its_seed_alone(family):
    teacher, prefix = family
    torch.manual_seed(1)
    one = start(teacher, 2, "random", seed=7).state_dict()
    torch.manual_seed(2)
    two = start(teacher, 2, "random", seed=7).state_dict()
    other = start(teacher, 2, "random", seed=8)
    assert same(one, two) and not same(one, other.state_dict())
    assert not torch.equal(other.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert count_layers(other) == 2 and not other.training and not layer(other, prefix, 2)


def test_random_start_leaves_the_global_generator_alone(teachers):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    start(teachers["bert"][0], 2, "random", seed=11)
    assert torch.equal(torch.rand(4), expected)


# saving


@pytest.mark.parametrize("init", ["alternate", "random", [5, 1]], ids=str)
def test_student_survives_saving(init, family, tmp_path):
    teacher, _ = family
    student = start(teacher, 2, init)
    student.save_pretrained(tmp_path)
    load = AutoModelForMaskedLM if "ForMaskedLM" in type(teacher).__name__ else AutoModel
    again, report = load.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(again) is type(teacher) and count_layers(again) == 2
    assert all(torch.equal(a, b) for a, b in zip(states(student), states(again)))


# teachers whose layers cannot be told apart


def test_teacher_whose_layers_are_not_known_is_refused():
    def teacher():
        return AlbertModel(AlbertConfig(**SHAPE, embedding_size=16))

    with pytest.raises(UserError, match="a model of kind .*; supported are bert"):
        start(teacher(), 2)
    student = start(teacher(), 2, "random")
    assert count_layers(student) == 2 and torch.isfinite(student(IDS).last_hidden_state).all()


# families whose layers differ, or that rotate queries and keys


GLOBAL, NEAR = "full_attention", "sliding_attention"


def modern(layers=22, **more):
    """A random ModernBERT; every third layer has global attention."""
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)
    torch.manual_seed(0)
    model = ModernBertModel(
        ModernBertConfig(**SHAPE | dict(num_hidden_layers=layers), local_attention=4, **ids, **more)
    )
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    return model.eval()


def euro(**more):
    """A random EuroBERT, in which two heads of queries share one of keys and values."""
    torch.manual_seed(0)
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=1, mask_token_id=3)
    model = EuroBertModel(EuroBertConfig(**SHAPE, **ids, **dict(num_key_value_heads=2) | more))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    return model.eval()


@pytest.mark.parametrize("rule", ["alternate", "late", "first", "last"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 11, 22])
def test_a_modernbert_student_never_has_a_global_layer_where_a_local_one_was(rule, depth):
    teacher = ModernBertConfig(num_hidden_layers=22)
    layers = source_layers(rule, depth, teacher)
    assert layers[0] == 1 and layers == sorted(set(layers)) and len(layers) == depth and layers[-1] <= 22
    kinds = [teacher.layer_types[layer - 1] for layer in layers]
    assert kinds == teacher.layer_types[:depth]


def test_rules_for_modernbert_take_the_nearest_layer_of_the_same_kind():
    teacher = ModernBertConfig(num_hidden_layers=22)
    assert source_layers("alternate", 4, teacher) == [1, 11, 15, 22]  # wished are 5, 11, 16 and 22
    assert source_layers("last", 4, teacher) == [1, 20, 21, 22]


def test_copied_modernbert_layers_are_the_teachers_with_their_kinds():
    teacher = modern()
    student = start(teacher, 4)
    assert student.config.layer_types == [GLOBAL, NEAR, NEAR, GLOBAL]
    for i, layer in enumerate([1, 11, 15, 22]):
        theirs = teacher.layers[layer - 1].state_dict()
        mine = student.layers[i].state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert student.layers[i].attention_type == teacher.layers[layer - 1].attention_type


def test_a_list_of_modernbert_layers_keeps_their_kinds_and_is_told_where_transformers_4_cannot_read_them(caplog):
    student = start(modern(), 3, [1, 4, 7])
    assert student.config.layer_types == [GLOBAL] * 3
    assert "are global, global, global; transformers 4 knows no such order" in caplog.text
    caplog.clear()
    assert start(modern(), 3, [1, 2, 6]).config.layer_types == [GLOBAL, NEAR, NEAR] and not caplog.text


@pytest.mark.parametrize("layers", [[2, 3], [3, 1], [1, 1]])
def test_the_first_layer_of_a_modernbert_stays_first(layers):
    with pytest.raises(UserError, match="no norm before its attention: the list must begin with 1"):
        start(modern(), 2, layers)


def test_both_halves_of_a_gated_feed_forward_layer_keep_the_same_neurons():
    teacher = modern(layers=4)
    student = start(teacher, 2, ffn=12, narrow="truncate")
    wide, narrow = teacher.layers[0].mlp, student.layers[0].mlp
    places = [int((wide.Wi.weight[:48] == row).all(1).nonzero()) for row in narrow.Wi.weight[:12]]
    assert places == sorted(set(places)) and torch.equal(narrow.Wi.weight[12:], wide.Wi.weight[48:][places])
    assert torch.equal(narrow.Wo.weight, wide.Wo.weight[:, places])
    value, gate = wide.Wi.weight[:48].norm(dim=1), wide.Wi.weight[48:].norm(dim=1)
    assert set(places) == set((value * gate * wide.Wo.weight.norm(dim=0)).topk(12).indices.tolist())


@pytest.mark.parametrize("teacher", [lambda: modern(layers=4), euro])
def test_smaller_rotary_heads_keep_the_pairs_of_their_own_frequencies(teacher):
    """Queries and keys of a head half as large are every second pair, so each turns as fast as before."""
    wide = teacher()
    narrow = start(wide, 2, [1, 2], hidden=16, heads=4, narrow="truncate")
    size = 8
    pairs = torch.tensor([0, 2, 4, 6])  # of 0..3 with 4..7: the first and third
    fast = [config_frequencies(model) for model in (wide, narrow)]
    assert torch.allclose(fast[1], fast[0][::2])
    taken = wide.state_dict(), narrow.state_dict()
    name = (
        "layers.0.attn.Wqkv.weight" if "layers.0.attn.Wqkv.weight" in taken[0] else "layers.0.self_attn.q_proj.weight"
    )
    theirs, mine = (state[name][:rows] for state, rows in zip(taken, (4 * size, 4 * size // 2)))
    expected = theirs.unflatten(0, (4, size))[:, pairs].flatten(0, 1)[:, :16] * 2**0.5
    assert torch.allclose(mine, expected)


def config_frequencies(model):
    """Turns per token of each pair of dimensions of a head, in a layer with global attention."""
    rotary = model.rotary_emb
    return rotary.inv_freq if hasattr(rotary, "inv_freq") else rotary.full_attention_inv_freq


def test_heads_that_share_a_key_stay_together():
    student = start(euro(), 2, heads=2, hidden=16, narrow="pca", sample=SAMPLE)
    assert student.config.num_key_value_heads == 1 and student.config.head_dim == 8
    assert student(IDS).last_hidden_state.isfinite().all()
    with pytest.raises(UserError, match="2 heads of the teacher share a key: it must be a multiple"):
        start(euro(), 2, heads=1, hidden=32)
    with pytest.raises(UserError, match="rotary positions need an even number"):
        start(euro(), 2, heads=4, hidden=12)


@pytest.mark.parametrize("teacher", [lambda: modern(layers=4), euro])
def test_a_narrowed_rotary_student_of_all_directions_is_the_teacher(teacher):
    """The basis of pca turns the stream without loss where it has as many directions; norms stay close."""
    wide = teacher()
    narrow = start(
        wide, count_layers(wide), list(range(1, count_layers(wide) + 1)), ffn=47, narrow="pca", sample=SAMPLE
    )
    ids = torch.tensor([SAMPLE[0]])
    with torch.inference_mode():
        similar = torch.cosine_similarity(wide(ids).last_hidden_state, narrow(ids).last_hidden_state, dim=-1)
    assert similar.mean() > 0.95


# other widths


def sizes_of(student):
    """Width, heads and feed-forward width as the weights have them."""
    modules = dict(student.named_modules())
    names = FAMILIES[student.config.model_type]
    ffn = modules[f"{names.layers}.0.{names.up[0]}"].weight.shape[0]
    return student.get_input_embeddings().weight.shape[1], student.config.num_attention_heads, ffn


def read_write(student, i):
    """The attention and feed-forward modules of layer i (0 = first), by role."""
    names = FAMILIES[student.config.model_type]
    layer = student.get_submodule(f"{names.layers}.{i}")
    roles = dict(
        query=names.query[0], key=names.key[0], value=names.value, out=names.out, up=names.up[0], down=names.down
    )
    return {role: layer.get_submodule(name) for role, name in roles.items()}


BASE = [name for name in TEACHERS if name != "bert with a head"]
SAMPLE = torch.randint(2, 60, (40, 12), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(params=BASE)
def base(request, teachers):
    return teachers[request.param]


@pytest.mark.parametrize("narrow", ["pca", "importance", "truncate", "random"])
@pytest.mark.parametrize(
    "sizes",
    [dict(hidden=16), dict(ffn=20), dict(heads=2), dict(hidden=24, heads=3, ffn=12), dict(hidden=16, heads=1)],
    ids=str,
)
def test_student_of_any_size_runs_and_survives_saving(narrow, sizes, base, tmp_path):
    teacher, _ = base
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = start(teacher, 2, narrow=narrow, sample=SAMPLE, **sizes)
    assert sizes_of(student) == tuple(sizes.get(k, d) for k, d in dict(hidden=32, heads=4, ffn=48).items())
    found = states(student)
    assert (
        found[-1].shape == (2, 6, sizes.get("hidden", 32)) and torch.isfinite(found[-1]).all() and not student.training
    )
    student.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(torch.equal(a, b) for a, b in zip(found, states(again)))
    assert same(before, teacher.state_dict())


def test_sizes_that_are_the_teachers_copy_exactly(base):
    teacher, _ = base
    plain = start(teacher, 2).state_dict()
    for narrow in ("pca", "importance", "truncate", "random"):
        assert same(start(teacher, 2, hidden=32, heads=4, ffn=48, narrow=narrow).state_dict(), plain)


def test_blank_student_of_any_size(base):
    teacher, _ = base
    student = start(teacher, DEPTH + 1, "random", hidden=48, heads=6, ffn=64)
    assert sizes_of(student) == (48, 6, 64) and count_layers(student) == DEPTH + 1
    assert torch.isfinite(states(student)[-1]).all()


@pytest.mark.parametrize("narrow", ["pca", "importance", "truncate", "random"])
@pytest.mark.parametrize("changed, roles", [(dict(ffn=20), "up down"), (dict(heads=2), "query key value out")], ids=str)
def test_only_what_changes_its_size_changes(narrow, changed, roles, base):
    teacher, _ = base
    wide, student = start(teacher, 2), start(teacher, 2, narrow=narrow, sample=SAMPLE, **changed)
    touched = {id(m) for i in range(2) for role, m in read_write(student, i).items() if role in roles.split()}
    for (name, module), (_, copied) in zip(student.named_modules(), wide.named_modules(), strict=True):
        if not list(module.children()) and id(module) not in touched and "pos_" not in name:
            assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copied.parameters(), strict=True)), name


@pytest.mark.parametrize("narrow", ["pca", "truncate"])
def test_the_strongest_neurons_stay(narrow, base):
    teacher, _ = base
    student = start(teacher, 3, "first", ffn=20, narrow=narrow, sample=SAMPLE)
    for i in range(3):
        full, less = read_write(teacher, i), read_write(student, i)
        strength = full["up"].weight.norm(dim=1) * full["down"].weight.norm(dim=0)
        kept = sorted(range(48), key=lambda n: -strength[n])[:20]
        assert torch.equal(less["up"].weight, full["up"].weight[sorted(kept)])
        assert torch.equal(less["up"].bias, full["up"].bias[sorted(kept)])
        assert torch.equal(less["down"].weight, full["down"].weight[:, sorted(kept)])
        assert torch.equal(less["down"].bias, full["down"].bias)


@pytest.mark.parametrize("narrow", ["pca", "truncate"])
def test_joined_heads_that_agree_lose_nothing(narrow, base):
    """Heads 0 and 1 look alike, and heads 2 and 3: then two heads of twice the size do all that four did."""
    teacher = type(base[0])._from_config(base[0].config)
    teacher.load_state_dict(base[0].state_dict())
    for name, value in teacher.state_dict().items():
        if any(part in name for part in ("query", "key", "q_lin", "k_lin")):
            heads = value.unflatten(0, (4, 8))
            heads[1], heads[3] = heads[0], heads[2]
    student = start(teacher.eval(), DEPTH, heads=2, narrow=narrow)
    for expected, found in zip(states(teacher), states(student)):
        assert torch.allclose(expected[MASK.bool()], found[MASK.bool()], atol=2e-5)
    assert not torch.allclose(
        states(teacher)[-1], states(start(teacher, DEPTH, heads=2, narrow="random"))[-1], atol=0.1
    )


def test_truncation_keeps_the_first_dimensions():
    teacher = fill(BertModel(BertConfig(**SHAPE)))
    student = start(teacher, 2, "first", hidden=16, narrow="truncate")
    full, less = read_write(teacher, 1), read_write(student, 1)
    rows = [h * 8 + d for h in range(4) for d in range(4)]  # the first half of each head
    assert torch.equal(less["value"].weight, full["value"].weight[rows, :16])
    assert torch.equal(less["key"].bias, full["key"].bias[rows])
    assert torch.equal(less["out"].weight, full["out"].weight[:16][:, rows])
    assert torch.allclose(less["query"].weight, full["query"].weight[rows, :16] * 0.5**0.5)
    assert torch.equal(less["up"].weight, full["up"].weight[:, :16])
    assert torch.equal(less["down"].bias, full["down"].bias[:16])
    for name in ("embeddings.word_embeddings", "embeddings.LayerNorm", "encoder.layer.1.output.LayerNorm"):
        assert torch.equal(student.get_submodule(name).weight, teacher.get_submodule(name).weight[..., :16])


@pytest.mark.parametrize("size", [3, 6, 8])
def test_head_maps_keep_products_as_well_as_their_rank_allows(size):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(6, n, generator=g) for n in (20, 30))
    product = left.T @ right
    errors = {}
    for reduce in (True, False):
        mine, theirs = inner_maps(left, right, size, reduce)
        assert mine.shape == theirs.shape == (size, 6)
        errors[reduce] = (product - (mine @ left).T @ (theirs @ right)).norm().item()
    best = torch.linalg.svdvals(product)[size:].norm().item()  # Eckart and Young
    assert errors[True] == pytest.approx(best, abs=1e-3) and errors[True] <= errors[False] + 1e-4
    assert errors[False] > 1.2 * best or size >= 6


def test_random_narrowing_leaves_no_trace_of_the_teacher_where_widths_differ(base):
    teacher, _ = base
    blank = start(teacher, 2, "random", seed=5, hidden=16).state_dict()
    assert same(start(teacher, 2, "last", seed=5, hidden=16, narrow="random").state_dict(), blank)


def test_pca_depends_on_its_sample_and_on_nothing_else(base):
    teacher, _ = base
    torch.manual_seed(1)
    one, again, other, none = (
        start(teacher, 2, seed=s, hidden=16, sample=x).state_dict()
        for s, x in ((0, SAMPLE), (9, SAMPLE), (0, SAMPLE[:9]), (0, None))
    )
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert same(one, again) and not same(one, other) and not same(one, none)
    assert same(none, start(teacher, 2, seed=3, hidden=16).state_dict())


def test_deberta_with_factored_embeddings_keeps_them():
    settings = DebertaV2Config(**SHAPE, embedding_size=12, relative_attention=True, pos_att_type=["p2c", "c2p"])
    teacher = fill(DebertaV2Model(settings))
    student = start(teacher, 2, hidden=16, sample=SAMPLE)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert student.embeddings.embed_proj.weight.shape == (16, 12)
    assert student.config.pooler_hidden_size == 16
    assert torch.isfinite(states(student)[-1]).all()


def test_preset_slim_is_as_large_as_four_layers_of_the_embedded_teachers_shape():
    shape = SHAPE | dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=6)
    teacher = BertModel(BertConfig(**shape)).eval()
    slim = build_student(teacher, config.Student(preset="slim"), sample=SAMPLE)
    assert sizes_of(slim) == (384, 12, 768) and count_layers(slim) == 6
    rows = {s: sum(p.numel() for p in s.encoder.parameters()) for s in (slim, start(teacher, 4))}
    assert max(rows.values()) < 1.01 * min(rows.values())


def test_preset_of_the_paper():
    shape = SHAPE | dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=4)
    student = build_student(BertModel(BertConfig(**shape)).eval(), config.Student(preset="tiny"), sample=SAMPLE)
    assert sizes_of(student) == (312, 12, 1200) and count_layers(student) == 4


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(hidden=30), "student.hidden is 30, which 4 heads do not divide"),
        (dict(heads=3), "student.hidden is 32, which 3 heads do not divide"),
        (dict(hidden=64), "student.hidden is 64, the teacher's is 32"),
        (dict(heads=8), "student.heads is 8, the teacher's is 4"),
        (dict(ffn=49), "student.ffn is 49, the teacher's is 48"),
        (dict(init="random", hidden=64, heads=5), "which 5 heads do not divide"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(sizes, message, teachers):
    with pytest.raises(UserError, match=re.escape(message)):
        start(teachers["bert"][0], 2, **sizes)


def test_model_with_a_head_is_not_resized(teachers):
    with pytest.raises(UserError, match="cannot resize a BertForMaskedLM"):
        start(teachers["bert with a head"][0], 2, hidden=16)


@pytest.mark.slow
def test_pca_starts_nearest_to_a_real_teacher(teacher_model, teacher_tokenizer, parallel):
    """The variance of a real teacher's states that the best linear map from the student's leaves unexplained, on other
    sentences: principal directions before the first dimensions before a random start."""
    ids = teacher_tokenizer([row["tgl"] for row in parallel[:200]]).input_ids
    kept = sorted({i for row in ids for i in row} | set(teacher_tokenizer.all_special_ids))
    new = {old: i for i, old in enumerate(kept)}
    ids = [[new[i] for i in row] for row in ids]
    teacher = start(prune_model(teacher_model, teacher_tokenizer, kept), 3, "first")

    @torch.inference_mode()
    def ends(model, rows):
        tokens, mask = pad(rows, teacher.config.pad_token_id)
        return model(tokens, attention_mask=mask).last_hidden_state[mask.bool()].double()

    seen, unseen = ids[:160], ids[160:]
    left = {}
    for narrow in ("pca", "truncate", "random"):
        student = start(teacher, 1, [3], hidden=96, narrow=narrow, sample=seen)
        fit, test = (torch.nn.functional.pad(ends(student, rows), (0, 1), value=1.0) for rows in (seen, unseen))
        mapped = test @ torch.linalg.lstsq(fit, ends(teacher, seen)).solution
        left[narrow] = ((mapped - ends(teacher, unseen)).square().mean() / ends(teacher, unseen).var()).item()
    assert left["pca"] < 0.9 * left["truncate"] and left["truncate"] < 0.9 * left["random"], left
