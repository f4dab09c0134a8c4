"""Files that are whole or absent: atomic writes, the cache folder, and a run's folder with its table of results."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from safetensors import SafetensorError

from kdlib.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
log = logging.getLogger(__name__)
SEAL = "made.json"  # in a folder: what its files should be
CHUNK = 1 << 24  # bytes that are summed up at once
_sums: dict[tuple[int, ...], int] = {}  # files that this process has read through, by identity, size and time of change


def cache_folder() -> Path:
    """Where conversions shared by runs lie: $KDLIB_CACHE, or kdlib under the user's cache folder."""
    root = os.environ.get("KDLIB_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlib"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, moved to `target` only when the block ends without an error.

    An older folder at `target` is replaced. Raises UserError when the place cannot be written or the disk is full.
    """
    target = Path(target)
    work = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(target.parent, target.name, "")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise UserError(f"{target.parent}: cannot write there ({error.strerror})") from None
    try:
        work.chmod(0o755)
        yield work
        for file in work.rglob("*"):  # safetensors writes for the owner alone; a cache may be shared
            file.chmod(0o755 if file.is_dir() else 0o644)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: could not be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write to, moved to `target` only when the block ends without an error; errors as `new_folder`."""
    target = Path(target)
    work = target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(target.parent, target.stem, target.suffix)
        yield work
        work.replace(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: could not be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        with contextlib.suppress(OSError):
            work.unlink()


def clear_unfinished(folder: Path, stem: str, suffix: str) -> None:
    """Remove what processes that are no more had begun to write in place of a file or folder.

    Whoever fills a new folder may begin another in its place: one more dot before the name, one more number after it.
    """
    begun = re.compile(rf"(\.+){re.escape(stem)}((?:-\d+)+){re.escape(suffix)}")
    for left in folder.glob(f".*{glob.escape(stem)}-*{glob.escape(suffix)}"):
        found = begun.fullmatch(left.name)
        processes = [int(number) for number in found[2].split("-")[1:]] if found else []
        if not found or len(processes) != len(found[1]) or any(map(alive, processes)):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no process's number
        pass
    return True


def seal(folder: Path, **about: Any) -> None:
    """Write down size and checksum of every file that is in the folder now, and `about`: what has a seal was whole."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files.pop(SEAL, None)
    sums = {name: {"bytes": file.stat().st_size, "crc32": checksum(file)} for name, file in files.items()}
    write_json(folder / SEAL, about | {"files": sums})


def flaw(folder: Path) -> str:
    """What is wrong with a sealed folder, in words: no seal, or the first file that is not as it was; "" if nothing.

    Files that came later are nobody's business here.
    """
    try:
        files = read_json(folder / SEAL).get("files", {})  # seals of older versions name none
        kept = {str(name): (facts["bytes"], facts["crc32"]) for name, facts in files.items()}
    except (UserError, AttributeError, KeyError, TypeError):
        return "unfinished, or its seal is damaged"
    for name, (size, crc32) in kept.items():
        file = folder / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"{name} is torn ({found:,} of {size:,} bytes)"
            if checksum(file) != crc32:
                return f"{name} is corrupted (its checksum is wrong)"
        except (OSError, ValueError, TypeError):
            return f"{name} cannot be read"
    return ""


def is_whole(folder: Path, then: str) -> bool:
    """Whether a sealed folder is there as it was written.

    A damaged one is named in a warning. The warning ends with `then`, which says what happens now, such as "the texts
    are tokenised again".
    """
    if not folder.is_dir():
        return False
    if wrong := flaw(folder):
        log.warning("%s: %s; %s", folder, wrong, then)
    return not wrong


def read_or_none(file: Path, read: Callable[[Path], T], then: str) -> T | None:
    """What `read` makes of a file; None where the file is absent or, with a warning that ends with `then`, damaged."""
    try:
        return read(file)
    except Exception as error:  # readers raise a dozen kinds, and for all of them the file is rebuilt
        if file.exists():
            reason = str(error) if isinstance(error, UserError) else f"{file}: damaged ({type(error).__name__})"
            log.warning("%s; %s", reason, then)
        return None


def checksum(file: Path) -> int:
    """A file's CRC-32. Read through once a process, unless it changes; moving it is no change."""
    found = os.stat(file)
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in _sums:
        _sums[key] = _crc32(file)
    return _sums[key]


def _crc32(file: Path) -> int:
    value = 0
    with open(file, "rb", buffering=0) as stream:
        buffer = bytearray(CHUNK)
        while count := stream.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:count], value)
    return value


def write_json(target: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with new_file(target) as path:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")


def read_json(path: Path, kind: type = dict) -> Any:
    """What `write_json` wrote. Raises UserError where the file is not there, is damaged, or does not hold a `kind`."""
    try:
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"holds a {type(value).__name__}, not a {kind.__name__}")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def read_table(path: Path, columns: Sequence[str]) -> "pd.DataFrame":
    """A csv file with these columns at least. Raises UserError where it is not there, is damaged, or lacks one."""
    import pandas as pd  # takes a third of a second, which `kdlib --help` need not wait for

    try:
        table = pd.read_csv(path)
        if missing := [column for column in columns if column not in table]:
            raise ValueError(f"no column {', '.join(missing)}")
        return table
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"{path}: damaged ({reason}); restore it, or start in another run folder")


def fingerprint(*values: Any) -> str:
    """A short hash of JSON-like values: the same values, the same 12 letters, on every machine."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


class _Loader(yaml.SafeLoader):
    """YAML that reads 5e-4 as a number and `no` as text.

    5e-4 is how people write it (YAML 1.1 wants 5.0e-4), and `no` is a language's code.
    Merge keys (<<) are no part of it: nested ones can fill the memory.
    """


_BOOL, _MERGE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:merge"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in pairs if tag not in (_BOOL, _MERGE)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def parse_yaml(text: str, origin: str, mapping: bool = True) -> Any:
    """Read YAML: 5e-4 is a number, `no` is text, and there are no merge keys.

    Args:
        text: the YAML.
        origin: what errors call it.
        mapping: refuse what is no mapping of keys to values; an empty text is an empty one.

    Raises:
        UserError: for what is not valid, with the line.
    """
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}: not valid YAML{where} ({problem})") from None
    if mapping and value is None:
        return {}
    if mapping and not isinstance(value, dict):
        raise UserError(f"{origin}: a profile is a mapping of keys to values, found {type(value).__name__}")
    return value
