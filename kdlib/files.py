"""Files and folders that are whole or absent: atomic writes, seals, checksums, JSON, YAML and the cache folder."""

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
from filelock import FileLock
from safetensors import SafetensorError

from kdlib.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
log = logging.getLogger(__name__)
SEAL = "made.json"  # lists sizes and checksums of the other files in its folder
SHARED = "KDLIB_SHARED"  # set in the workers of a run: they share its folder
CHUNK = 1 << 24  # bytes read at once for a checksum
_sums: dict[tuple[int, ...], int] = {}  # checksums known to this process, by device, inode, size and time of change


def cache_folder() -> Path:
    """The folder of what runs share: $KDLIB_CACHE, or kdlib in the user's cache folder."""
    root = os.environ.get("KDLIB_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlib"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it replaces `target` when the block ends without an error.

    Raises:
        UserError: where `target` cannot be written or the disk is full.
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
        for file in work.rglob("*"):  # safetensors makes files private; a cache may be shared
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
    """Give a path to write to; it replaces `target` when the block ends without an error. Errors as `new_folder`."""
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


@contextlib.contextmanager
def locked(target: Path) -> Iterator[bool]:
    """Keep other workers of a run from making `target` at the same time; they wait. Without workers there is no lock.

    The lock ends with its process, so that another worker takes over from a dead one. Gives whether this process is
    alone; if not, another one may have made the target meanwhile.
    """
    if SHARED not in os.environ:
        yield True
        return
    folder = target.parent / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / target.name)
        lock.acquire()
    except OSError as error:
        raise UserError(f"{folder}: cannot be locked ({error.strerror})") from None
    try:
        yield False
    finally:
        lock.release()


def clear_unfinished(folder: Path, stem: str, suffix: str) -> None:
    """Remove the unfinished files and folders of processes that have ended.

    While a new folder is filled, another may be begun inside its name: one more dot before it, one more number after.

    Args:
        folder: where they are.
        stem: name of the target without its suffix.
        suffix: suffix of the target, or "" for a folder.
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
    """Whether a process with this number runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; a number too large for a process
        pass
    return True


def seal(folder: Path, **about: Any) -> None:
    """Write `about` and the size and checksum of every file in the folder. A folder with a seal is finished."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files.pop(SEAL, None)
    sums = {name: {"bytes": file.stat().st_size, "crc32": checksum(file)} for name, file in files.items()}
    write_json(folder / SEAL, about | {"files": sums})


def flaw(folder: Path) -> str:
    """What is wrong with a sealed folder, in words, or "". Files added after sealing are ignored."""
    try:
        files = read_json(folder / SEAL).get("files", {})  # seals of older versions have no files
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
    """Whether a sealed folder exists and its files are as they were written.

    Args:
        folder: the folder.
        then: the end of the warning about a damaged folder: what happens now, such as "the texts are tokenised again".
    """
    if not folder.is_dir():
        return False
    if wrong := flaw(folder):
        log.warning("%s: %s; %s", folder, wrong, then)
    return not wrong


def read_or_none(file: Path, read: Callable[[Path], T], then: str) -> T | None:
    """What `read` returns for a file. None where it is absent, or damaged: then a warning ends with `then`."""
    try:
        return read(file)
    except Exception as error:  # readers raise a dozen kinds, and the file is rebuilt after any of them
        if file.exists():
            reason = str(error) if isinstance(error, UserError) else f"{file}: damaged ({type(error).__name__})"
            log.warning("%s; %s", reason, then)
        return None


def checksum(file: Path) -> int:
    """The CRC-32 of a file. An unchanged file is read once a process, also after it was moved."""
    found = os.stat(file)
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in _sums:
        value, buffer = 0, bytearray(CHUNK)
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                value = zlib.crc32(memoryview(buffer)[:count], value)
        _sums[key] = value
    return _sums[key]


def write_json(target: Path, value: Any) -> None:
    """Write `value` as a JSON file, whole or not at all."""
    with new_file(target) as path:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file. Raises UserError where it is absent, damaged, or holds no `kind`."""
    try:
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"holds a {type(value).__name__}, not a {kind.__name__}")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def read_table(path: Path, columns: Sequence[str]) -> "pd.DataFrame":
    """Read a CSV file. Raises UserError where it is absent, damaged, or lacks one of the columns."""
    import pandas as pd  # the import takes a third of a second, and `kdlib --help` does not need it

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
    """A hash of JSON-like values, 12 letters long, equal on every machine."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-4 is a number and `no` is text.

    YAML 1.1 wants 5.0e-4, but people write 5e-4; `no` is the code of a language. Merge keys (<<) are left out,
    because nested ones can fill the memory.
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
    """Read YAML, with 5e-4 as a number, `no` as text, and without merge keys.

    Args:
        text: the YAML.
        origin: its name in errors.
        mapping: require a mapping of keys to values; an empty text is an empty mapping.

    Raises:
        UserError: where the text is not valid; the message names the line.
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
