"""Model files without a model: the tensors in a folder's safetensors files, and copies of some of their rows."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from kdlib.errors import UserError

NAMES = ("model.safetensors", "model.safetensors.index.json")
HEAD_FILE = "mlm_head.safetensors"  # the masked-language head, beside them
CHUNK = 1 << 22  # bytes
SAMPLES, BLOCK = 64, 4096  # blocks of a file, and bytes of a block, that `weights_fingerprint` reads


@dataclass(frozen=True)
class Stored:
    """The position of a tensor: its file, first byte and number of bytes; dtype as safetensors names it."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: list[int]

    @property
    def width(self) -> int:
        """Bytes of one number."""
        return self.size // max(1, math.prod(self.shape))


def weights_folder(source: str | Path, revision: str | None = None) -> Path | None:
    """The local folder of safetensors files of a folder or a downloaded hub id. None without any."""
    for name in NAMES:
        file: object = Path(source) / name
        if not Path(source).is_dir():
            try:
                file = try_to_load_from_cache(str(source), name, revision=revision)
            except HFValidationError:  # cannot be an id
                return None
        if isinstance(file, str | Path) and Path(file).is_file():
            return Path(file).parent
    return None


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder by name, from one file or from shards with an index, without reading data.

    Raises:
        UserError: where a file is missing or incomplete.
    """
    single, index = (Path(folder) / name for name in NAMES)
    if single.is_file() or not index.is_file():
        return read_header(single)[0]
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        elsewhere = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{index}: not an index of safetensors files") from None
    if elsewhere:
        raise UserError(f"{index}: names a file of another folder ({elsewhere[0]})")
    return {key: tensor for name in sorted(names) for key, tensor in read_header(Path(folder) / name)[0].items()}


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of one safetensors file by name, and its metadata. Raises UserError for an incomplete file.

    References:
        https://huggingface.co/docs/safetensors, "Format": the header's length (8 bytes, little-endian), the header
            (JSON),
        and data, counted from 0.
    """
    try:
        with safe_open(file, "np"):  # checks the header, and it against the file's length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({str(error).splitlines()[0]})") from None
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        tensors[name] = Stored(file, 8 + length + first, end - first, entry["dtype"], entry["shape"])
    return tensors, metadata


def runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending ids as ranges (first, one past the last) of neighbours."""
    found = np.asarray(ids)
    last = np.append(np.diff(found) != 1, True)  # of its range
    first = np.insert(last[:-1], 0, True)
    return list(zip(found[first].tolist(), (found[last] + 1).tolist()))


def copy_tensors(
    target: Path,
    tensors: Mapping[str, Stored],
    rows: Mapping[str, Sequence[tuple[int, int]]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of `tensors`, byte for byte; of those in `rows` only these ranges of rows.

    A small buffer is used: with a memory map, every touched page counts as memory.
    """
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    pieces: list[tuple[Path, list[tuple[int, int]]]] = []  # file, and (first byte, number of bytes) in it
    end = 0
    # Wide numbers first, as in the safetensors library: then every tensor is aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].width, item[0])):
        shape, parts = tensor.shape, [(tensor.start, tensor.size)]
        if name in rows:
            row = tensor.size // shape[0]
            shape = [sum(b - a for a, b in rows[name]), *shape[1:]]
            parts = [(tensor.start + a * row, (b - a) * row) for a, b in rows[name]]
        size = sum(count for _, count in parts)
        header[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [end, end + size]}
        pieces.append((tensor.file, parts))
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    buffer = memoryview(bytearray(CHUNK))
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(target.open("wb", CHUNK))
        inputs = {file: stack.enter_context(file.open("rb", 0)) for file in {file for file, _ in pieces}}
        output.write(len(text).to_bytes(8, "little") + text)
        for file, parts in pieces:
            source = inputs[file]
            for start, count in parts:
                source.seek(start)
                while count:
                    got = source.readinto(buffer[:count])
                    if not got:
                        raise UserError(f"{file}: ends before its last tensor")
                    output.write(buffer[:got])
                    count -= got


def weights_fingerprint(folder: Path) -> str:
    """Identify the weights of a model folder without reading all of them.

    The fingerprint covers the headers (names, types, shapes) and sizes of the weight files, and SAMPLES blocks of bytes
    spread evenly over each file. Training moves every number, so a trained copy has another fingerprint.

    Args:
        folder: a local model folder.

    Returns:
        A SHA-256 in hex; the same for a copy of the folder elsewhere.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(min(header, size)))
            for start in np.linspace(0, max(0, size - BLOCK), SAMPLES).astype(int).tolist():
                stream.seek(start)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()
