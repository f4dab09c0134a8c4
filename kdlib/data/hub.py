"""The model hub and the web: one switch for offline work, one way to retry, and one-line errors.

HF_HUB_OFFLINE=1 forbids all network use; then the caches are read. Code from the hub is never run: `datasets` cannot,
and
kdlib never asks `transformers` to.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name
from huggingface_hub.utils import httpx

from kdlib.errors import UserError
from kdlib.files import SEAL, cache_folder, fingerprint, new_file

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

WAITS = (1, 2, 4)  # seconds before the second, third and fourth attempt
PATIENCE = 20  # seconds; a call that took longer to fail is not repeated, because the client has retried it already
SILENCE = 60  # seconds without retries after the hub did not answer
TIMEOUT = 10  # seconds without an answer
LARGEST = 2 * 2**30  # bytes that an address or the files of a zip may hold
NAMES = {"model": "model", "dataset": "data set"}
WAY_ON = ". Without a network: source=embedded, or a local file or folder"
# transformers would send the repository's name and the user's token to a service that converts pickled weights, and
# would load the weights from there
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
T = TypeVar("T")
_silent_since = float("-inf")


@dataclass
class Repo:
    """What the hub knows of a repository: commit and file names, or the reason why it could not be asked."""

    commit: str | None = None
    files: list[str] = field(default_factory=list)
    silent: str = ""


def find(repo_id: str, kind: Literal["model", "dataset"], revision: str | None = None) -> Repo:
    """Ask the hub for a repository. Without an answer (offline, or no connection) the result holds the reason.

    Raises:
        UserError: where the hub answers that there is no such repository or revision, or not for this user.
    """
    global _silent_since
    if is_offline_mode():
        return Repo(silent="HF_HUB_OFFLINE is set")
    waits = () if time.monotonic() - _silent_since < SILENCE else WAITS
    try:
        info = retried(lambda: HfApi().repo_info(repo_id, repo_type=kind, revision=revision, timeout=TIMEOUT), waits)
    except Exception as error:  # connections fail in a dozen ways, and a captive portal answers with a page
        if isinstance(error, HFValidationError) or _status(error) in (401, 403, 404):
            raise UserError(f"{NAMES[kind]} {repo_id!r}: {_answer(error, revision)}") from None
        _silent_since = time.monotonic()
        return Repo(silent=f"the hub at {constants.ENDPOINT} does not answer ({reason(error)})")
    return Repo(info.sha, [file.rfilename for file in info.siblings or []])


def dataset(
    repo_id: str, subset: str | None, split: str, revision: str | None, streaming: bool = False
) -> tuple["Dataset | IterableDataset", str | None]:
    """Load a split of a hub data set. Returns it with its commit; from the cache where the hub does not answer.

    Args:
        repo_id: owner/name.
        subset: configuration name.
        split: name of the split.
        revision: commit, tag or branch.
        streaming: download rows as they are read.

    Raises:
        UserError: for an unknown data set, subset or split.
    """
    import datasets

    for step in ("OPEN", "READ"):  # the retries of a stream can only be set here
        setattr(datasets.config, f"STREAMING_{step}_MAX_RETRIES", len(WAITS))
    for step in ("OPEN_RETRY", "READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY"):
        setattr(datasets.config, f"STREAMING_{step}_INTERVAL", WAITS[-1])
    repo = find(repo_id, "dataset", revision)
    name = f"data set {repo_id!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
    if f"{repo_id.split('/')[1]}.py" in repo.files:
        raise UserError(f"{name}: has a loading script, which we do not run; {_other_ways(repo_id, repo)}")

    def load() -> tuple["Dataset | IterableDataset", str | None]:
        builder = datasets.load_dataset_builder(repo_id, subset, revision=repo.commit or revision)
        if streaming:
            return builder.as_streaming_dataset(split), builder.hash
        builder.download_and_prepare()
        return builder.as_dataset(split), builder.hash

    try:
        with quiet(datasets), _offline(datasets) if repo.silent else contextlib.nullcontext():
            rows, commit = retried(load, () if repo.silent else WAITS)
    except Exception as error:  # the client raises a dozen kinds; people need one line
        if repo.silent and isinstance(error, ConnectionError):
            raise UserError(f"{name}: {repo.silent}, and it is not in the hub's cache{WAY_ON}") from None
        raise UserError(f"{name}: {reason(error)}{WAY_ON if passes(error) else ''}") from None
    wanted = repo.commit or _last_commit(repo_id, revision)
    if commit != wanted:  # when the client fails, it uses any commit in its cache
        asked = f"revision {revision!r}" if revision else "its main branch"
        why = f"{repo.silent}, and" if repo.silent else f"the client cannot read {asked}; {_other_ways(repo_id, repo)};"
        raise UserError(f"{name}: {why} the hub's cache has commit {str(commit)[:7]}, not {asked}")
    if repo.commit:
        with contextlib.suppress(Exception), quiet():  # writes into the hub's cache which commit the branch is at
            hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision)
    return rows, commit


def file(repo_id: str, path: str, revision: str | None) -> tuple[Path, str]:
    """Download a file of a hub data set. Returns its path in the hub's cache and its commit."""
    repo = find(repo_id, "dataset", revision)
    name = f"hf://datasets/{repo_id}/{path}"
    if repo.commit and path not in repo.files:
        raise UserError(f"{name}: no such file; there are {', '.join(repo.files[:10]) or 'none'}")
    try:
        with quiet():
            local = retried(
                lambda: hf_hub_download(
                    repo_id, path, repo_type="dataset", revision=revision, local_files_only=bool(repo.silent)
                )
            )
    except Exception as error:
        if repo.silent:
            raise UserError(f"{name}: {repo.silent}, and it is not in the hub's cache{WAY_ON}") from None
        raise UserError(f"{name}: {reason(error)}{WAY_ON if passes(error) else ''}") from None
    parts = Path(local).parts  # .../snapshots/<commit>/<path>
    return Path(local), parts[-1 - len(Path(path).parts)]


def fetch(address: str) -> Path:
    """Download a file from the web into the cache folder, under a name with the same suffix.

    It is downloaded each time. The last copy is used where the network is off or fails.

    Raises:
        UserError: without a copy, or for a file larger than LARGEST.
    """
    name = Path(unquote(urlsplit(address).path)).name[-80:]
    target = cache_folder() / "downloads" / f"{fingerprint(address)}-{name}"
    why = "HF_HUB_OFFLINE is set"
    if not is_offline_mode():
        try:
            retried(lambda: _download(address, target))
            return target
        except UserError:
            raise
        except Exception as error:
            if _status(error) and not passes(error):
                raise UserError(f"{address}: the server answers {_status(error)}") from None
            why = reason(error)
    if not target.is_file():
        raise UserError(f"{address}: {why}, and there is no earlier download{WAY_ON}")
    return target


def _download(address: str, target: Path) -> None:
    headers = {"accept-encoding": "identity"}  # a .gz file must not be unpacked on the way
    with get_session().stream("GET", address, headers=headers, follow_redirects=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        with new_file(target) as work, work.open("wb") as out:
            for chunk in response.iter_bytes():
                if out.tell() + len(chunk) > LARGEST:
                    raise UserError(f"{address}: larger than {LARGEST / 2**30:.0f} GB")
                out.write(chunk)


def push(folder: Path, repo_id: str, public: bool = False) -> str:
    """Upload a student's folder to a model repository of the hub, created if absent. Returns its address.

    Args:
        folder: the student.
        repo_id: owner/name.
        public: whether a new repository is public; an existing one is not changed.

    Raises:
        UserError: without a token or network, for an invalid name, and where the hub refuses.
    """
    where = f"model {repo_id!r}"
    if is_offline_mode():
        raise UserError(f"{where}: HF_HUB_OFFLINE is set; nothing was uploaded")
    if not get_token():
        raise UserError(f"{where}: no token with write access; use `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        with quiet():
            retried(lambda: api.create_repo(repo_id, private=not public, exist_ok=True))
            message = "A student, distilled by kdlib"
            api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[SEAL], commit_message=message)
    except Exception as error:  # the client raises a dozen kinds; people need one line
        if _status(error) in (401, 403):
            raise UserError(
                f"{where}: the token has no right to write there; use another one (`hf auth login`)"
            ) from None
        raise UserError(f"{where}: not uploaded ({_answer(error, None)})") from None
    return f"{constants.ENDPOINT}/{repo_id}"


def retried(call: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """The result of a call. It is repeated after each of `waits` (seconds; None: WAITS) if the network fails."""
    started = time.monotonic()
    for wait in WAITS if waits is None else waits:
        try:
            return call()
        except Exception as error:
            if not passes(error) or time.monotonic() - started > PATIENCE:
                raise
        time.sleep(wait)
    return call()


def passes(error: BaseException) -> bool:
    """Whether a failure may be temporary: no connection or a busy server, but no answer such as 401 or 404."""
    link: BaseException | None = error
    while link is not None:  # the libraries wrap the client's errors in their own
        status = _status(link)
        if status is not None:
            return status in (408, 429) or status >= 500
        if isinstance(link, OfflineModeIsEnabled):
            return False
        if isinstance(link, (httpx.TransportError, ConnectionError)):
            return True
        link = link.__cause__ or link.__context__
    return False


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, if it has one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason(error: BaseException) -> str:
    """The first line of an error's message without a full stop, or its class where it has no message."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.removesuffix(".")


def _answer(error: Exception, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return "gated; ask for access on its page, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "not on the hub, or private (`hf auth login`)"
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {revision!r}"
    return reason(error)


def _other_ways(repo_id: str, repo: Repo) -> str:
    """What a repository that `datasets` cannot read has instead."""
    zips = [f"hf://datasets/{repo_id}/{name}" for name in repo.files if name.endswith(".zip")]
    return f"name its zip ({', '.join(zips)})" if zips else "try its parquet copy (revision: refs/convert/parquet)"


def _last_commit(repo_id: str, revision: str | None) -> str | None:
    """The commit of a branch or tag when the hub was last asked, from its cache."""
    if revision and REGEX_COMMIT_HASH.fullmatch(revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="dataset")
    try:
        return (folder / "refs" / (revision or "main")).read_text().strip()
    except OSError:
        return None


@contextlib.contextmanager
def _offline(datasets: ModuleType) -> Iterator[None]:
    """Send `datasets` to its cache at once; otherwise it tries a silent hub for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet(datasets: ModuleType | None = None) -> Iterator[None]:
    """Hide progress bars and warnings of the hub's libraries; errors are reported in one line."""
    loggers = [huggingface_hub.logging, *([datasets.logging] if datasets else [])]
    levels = [logger.get_verbosity() for logger in loggers]
    bars = [huggingface_hub.utils, *([datasets.utils] if datasets else [])]
    shown = [not module.are_progress_bars_disabled() for module in bars]
    for logger in loggers:
        logger.set_verbosity_error()
    for module in bars:
        module.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.set_verbosity(level)
        for module, were_shown in zip(bars, shown):
            if were_shown:
                module.enable_progress_bars()
