"""Students: which layers they copy, that they copy them exactly, and what is refused."""

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
    ModernBertConfig,
    ModernBertModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from kdlib.errors import UserError
from kdlib.student import build_student, count_layers, layer_map

DEPTH = 6
SHAPE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=48)
TEACHERS = {
    "bert": (lambda: BertModel(BertConfig(**SHAPE)), "encoder.layer."),
    "bert with a head": (lambda: BertForMaskedLM(BertConfig(**SHAPE)), "bert.encoder.layer."),
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
        ("random", 4, 12, [3, 6, 9, 12]),
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
def test_alternate_layers_rise_and_end_with_the_last(teacher):
    for student in range(1, teacher + 1):
        layers = layer_map("alternate", student, teacher)
        assert len(layers) == student and layers[-1] == teacher and layers[0] >= 1
        assert all(a < b for a, b in zip(layers, layers[1:]))


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
        ("middle", 4, "student.init is 'middle'"),
    ],
)
def test_impossible_layers_are_refused(init, student, message):
    with pytest.raises(UserError, match=re.escape(message)):
        layer_map(init, student, 12)


@pytest.mark.parametrize("layers", [0, -2])
def test_student_without_layers_is_refused(layers, teachers):
    with pytest.raises(UserError, match="at least 1"):
        build_student(teachers["bert"][0], layers)


def test_student_deeper_than_its_teacher_is_refused(teachers):
    with pytest.raises(UserError, match="only 6"):
        build_student(teachers["bert"][0], DEPTH + 1)


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
    student = build_student(teacher, 3, init)
    assert type(student) is type(teacher) and not student.training
    assert count_layers(student) == student.config.num_hidden_layers == 3
    for i, source in enumerate(sources):
        assert same(layer(student, prefix, i), layer(teacher, prefix, source - 1))
    assert not layer(student, prefix, 3)
    assert same(outside(student, prefix), outside(teacher, prefix))


def test_first_layers_give_the_teachers_first_states(family):
    teacher, _ = family
    student = build_student(teacher, 2, "first")
    expected, found = states(teacher), states(student)
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(expected, found))


def test_all_layers_give_the_teachers_states_bit_for_bit(family):
    teacher, _ = family
    expected, found = states(teacher), states(build_student(teacher, DEPTH))
    assert len(found) == DEPTH + 1 and all(torch.equal(a, b) for a, b in zip(expected, found))
    assert not torch.equal(expected[-1], expected[-2])


def test_layers_in_another_order_give_other_states(family):
    teacher, _ = family
    found = states(build_student(teacher, DEPTH, [6, 5, 4, 3, 2, 1]))
    assert torch.equal(found[0], states(teacher)[0]) and not torch.equal(found[-1], states(teacher)[-1])


def test_student_shares_no_memory_with_its_teacher(family):
    teacher, _ = family
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = build_student(teacher, 2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert same(before, teacher.state_dict())
    assert count_layers(teacher) == DEPTH


def test_head_stays_tied(teachers):
    teacher, _ = teachers["bert with a head"]
    for init in ("alternate", "random"):
        student = build_student(teacher, 2, init)
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_type_of_weights_and_attention_are_kept():
    teacher = AutoModel.from_config(BertConfig(**SHAPE), attn_implementation="eager", dtype=torch.bfloat16)
    for init in ("last", "random"):
        student = build_student(teacher, 2, init)
        assert student.dtype == torch.bfloat16 and student.config._attn_implementation == "eager"
    assert len(student(IDS, output_attentions=True).attentions) == 2


# random starts


def test_random_start_depends_on_its_seed_alone(family):
    teacher, prefix = family
    torch.manual_seed(1)
    one = build_student(teacher, 2, "random", seed=7).state_dict()
    torch.manual_seed(2)
    two = build_student(teacher, 2, "random", seed=7).state_dict()
    other = build_student(teacher, 2, "random", seed=8)
    assert same(one, two) and not same(one, other.state_dict())
    assert not torch.equal(other.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert count_layers(other) == 2 and not other.training and not layer(other, prefix, 2)


def test_random_start_leaves_the_global_generator_alone(teachers):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_student(teachers["bert"][0], 2, "random", seed=11)
    assert torch.equal(torch.rand(4), expected)


# saving


@pytest.mark.parametrize("init", ["alternate", "random", [5, 1]], ids=str)
def test_student_survives_saving(init, family, tmp_path):
    teacher, _ = family
    student = build_student(teacher, 2, init)
    student.save_pretrained(tmp_path)
    load = AutoModelForMaskedLM if "ForMaskedLM" in type(teacher).__name__ else AutoModel
    again, report = load.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(again) is type(teacher) and count_layers(again) == 2
    assert all(torch.equal(a, b) for a, b in zip(states(student), states(again)))


# teachers whose layers cannot be told apart


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: AlbertModel(AlbertConfig(**SHAPE, embedding_size=16)),
        lambda: ModernBertModel(
            ModernBertConfig(**SHAPE, pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)
        ),
    ],
    ids=["albert", "modernbert"],
)
def test_teacher_whose_layers_are_not_known_is_refused(teacher):
    with pytest.raises(UserError, match="cannot copy layers of a .*Model: student.init must be random"):
        build_student(teacher(), 2)
    student = build_student(teacher(), 2, "random")
    assert count_layers(student) == 2 and torch.isfinite(student(IDS).last_hidden_state).all()
