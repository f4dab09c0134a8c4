"""A stage is computed once and kept in the run folder under a key; it is computed again when its key changes.

The key is a fingerprint of the stage's settings and of the keys of its inputs. A stage sees nothing else, so its result
cannot depend on what its key lacks.
"""

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict

from kdlib import config, distributed
from kdlib.device import use_bf16
from kdlib.errors import UserError
from kdlib.files import SEAL, fingerprint, is_whole, locked, new_folder, seal
from kdlib.models.encoder import Encoder
from kdlib.models.loading import load_encoder, prefix_of

A = TypeVar("A", covariant=True)


class Settings(BaseModel):
    """The part of a profile that a stage may know: narrow, typed and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


class Keyed(Protocol[A]):
    """An input of a stage: a value with a key that identifies it."""

    key: Any  # str; a `cached_property` matches no narrower type here

    def get(self) -> A:
        """The value."""
        ...


class Derived(Generic[A]):
    """A value computed quickly from its inputs, and not kept on disk.

    Args:
        name: its name in the key.
        settings: all it depends on besides the inputs, as JSON-like values.
        make: computes it, once, when it is first needed.
        inputs: by name, each with a key.
    """

    def __init__(self, name: str, settings: Any, make: Callable[[], A], **inputs: Keyed[Any]):
        self.name, self.settings, self._make, self.inputs = name, settings, make, inputs

    @cached_property
    def key(self) -> str:
        """The fingerprint of name, settings and inputs."""
        return fingerprint(self.name, self.settings, {name: given.key for name, given in self.inputs.items()})

    @cached_property
    def _value(self) -> A:
        return self._make()

    def get(self) -> A:
        """The value."""
        return self._value


class Source(Generic[A]):
    """Data that is read: a corpus, tasks, parallel sentences, a teacher. Its key includes its content.

    Args:
        kind: its name in messages about changed data.
        settings: the part of the profile that names it, as JSON-like values.
        read: reads it, once, when the value or the key is first needed.
        digest: called with the source; a fingerprint of its content, independent of its place.
    """

    def __init__(self, kind: str, settings: Any, read: Callable[[], A], digest: "Callable[[Source[A]], str]"):
        self.kind, self.settings, self._read, self._digest = kind, settings, read, digest

    @cached_property
    def value(self) -> A:
        """What was read."""
        return self._read()

    @cached_property
    def content(self) -> str:
        """The fingerprint of what was read."""
        return self._digest(self)

    @cached_property
    def key(self) -> str:
        """The fingerprint of settings and content."""
        return fingerprint(self.kind, self.settings, self.content)

    def get(self) -> A:
        """What was read."""
        return self.value


@dataclass(frozen=True)
class Watch:
    """Callbacks of a training.

    Args:
        on_point: called with the curve whenever it has a new point.
        should_stop: asked after every step; True stops the training at a checkpoint.
        label: name of the progress bar; "" uses the stage's.
    """

    on_point: Callable[[pd.DataFrame], None] | None = None
    should_stop: Callable[[], bool] | None = None
    label: str = ""


class Context:
    """What the stages of a run share: its folder, its device, and one object for equal keys.

    Args:
        path: the run folder.
        device: where models run.
        precision: `distill.precision` of the run, in which models are read.
    """

    def __init__(self, path: Path, device: torch.device, precision: str):
        self.path, self.device, self.precision = path, device, precision
        auto = (
            distributed.broadcast(use_bf16("auto", device)) if distributed.world_size() > 1 else None
        )  # all processes agree
        # A report says with this what it will need, so that several workers can compute it (see `study.compute`).
        self.ahead: Callable[[str, Iterable[tuple]], None] = lambda stage, units: None
        self._measured = lambda: use_bf16("auto", device) if auto is None else auto
        self._known: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()

    @property
    def cache(self) -> Path:
        """The folder of data that several stages and arms read: tokens, the teacher's states, vectors."""
        return self.path / "cache"

    def bf16(self, precision: str | None = None) -> bool:
        """Whether a precision (default: the run's) means bfloat16 on this device."""
        precision = precision or self.precision
        return self._measured() if precision == "auto" else use_bf16(precision, self.device)

    def load_encoder(
        self,
        folder: Path,
        name: str,
        spec: config.Teacher,
        bf16: bool | None = None,
        remembers: bool = False,
        **more: Any,
    ) -> Encoder:
        """Load an encoder of this run, which reads texts as the teacher `spec` does.

        Args:
            folder: a stage's.
            name: its name in results.
            spec: the teacher.
            bf16: whether to read in bfloat16; None: in the run's precision.
            remembers: whether its vectors are kept in the run's vector cache.
            more: arguments of `models.loading.load_encoder`.
        """
        return load_encoder(
            folder, name, prefix_of(spec), spec.max_length, device=self.device,
            bf16=self.bf16() if bf16 is None else bf16, cache_root=self.cache if remembers else None, **more,
        )  # fmt: skip

    def source(
        self, kind: str, settings: Any, read: Callable[[], A], digest: Callable[[Source[A]], str], also: Any = ()
    ) -> Source[A]:
        """The `Source` of these settings. Equal settings give the same object, so nothing is read twice.

        Args:
            kind: see `Source`.
            settings: see `Source`.
            read: see `Source`.
            digest: see `Source`.
            also: distinguishes sources with equal settings.
        """
        name = ("source", fingerprint(kind, settings, also))
        return self._known.setdefault(name, Source(kind, settings, read, digest))

    def stage(self, stage: "AnyStage") -> "AnyStage":
        """The first stage that was given with this key: equal keys are one object."""
        return self._known.setdefault((stage.name, stage.key), stage)


class Stage(ABC, Generic[S, A]):
    """A result that is kept in its own folder. A subclass writes `make` and `load`.

    Args:
        context: of the run.
        settings: all that the result depends on besides the inputs.
        link: name of the link to the folder in the run folder, or "".
        inputs: `Keyed` values by name; each becomes an attribute, whose type the subclass declares.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # increase when a change of the code changes the result
    room: ClassVar[str] = "artefacts"
    said: ClassVar[str] = "it is rebuilt"
    collective: ClassVar[bool] = False  # whether all processes work on it; the first one writes

    def __init__(self, context: Context, settings: S, link: str = "", **inputs: Any):
        self.context, self.settings, self.link, self.inputs = context, settings, link, inputs
        self._value: A | None = None
        vars(self).update(inputs)

    @cached_property
    def key(self) -> str:
        """The fingerprint of all that the result depends on."""
        return stage_key(self.name, self.version, self.settings, self.inputs)

    @property
    def folder(self) -> Path:
        """The folder of the result."""
        return self.context.path / self.room / f"{self.name}-{self.key}"

    @property
    def work(self) -> Path:
        """The folder of checkpoints while the result is made."""
        return self.folder.with_name(f"{self.folder.name}-checkpoints")

    def intact(self) -> bool:
        """Whether the result is there as it was written. A damaged one gives a warning."""
        return is_whole(self.folder, self.said)

    def get(self, watch: Watch = Watch()) -> A:
        """The result: the loaded one, else the one on disk, else a new one."""
        if self._value is None:
            if not self.intact():
                with locked(self.folder) as alone:
                    if alone or not self.intact():
                        self._build(watch)
            if distributed.rank() == 0:
                shutil.rmtree(self.work, ignore_errors=True)
                self._show()
            if self.collective:
                distributed.barrier()
            self._value = self.load(self.folder)
        return self._value

    def _build(self, watch: Watch) -> None:
        """Make the result in a new folder."""
        first = distributed.rank() == 0 or not self.collective
        with new_folder(self.folder) if first else contextlib.nullcontext(Path()) as folder:
            self.make(folder, watch)
            if first:
                inputs = {name: given.key for name, given in self.inputs.items()}
                seal(folder, key=self.key, version=self.version, settings=self.settings.model_dump(), inputs=inputs)
                self.add_unsealed(folder)
        if self.collective:
            distributed.barrier()

    def _show(self) -> None:
        """Set the run folder's link to this result; a copy where the system has no links."""
        if not self.link:
            return
        with locked(self.context.path / self.link):
            link_folder(self.context.path / self.link, self.folder)

    def add_unsealed(self, folder: Path) -> None:
        """Add files that may change later, such as a model card."""

    @abstractmethod
    def make(self, folder: Path, watch: Watch) -> None:
        """Write the result into an empty folder."""

    @abstractmethod
    def load(self, folder: Path) -> A:
        """Read the result from its folder."""


AnyStage = TypeVar("AnyStage", bound=Stage)


def link_folder(link: Path, target: Path) -> None:
    """Set `link` to the folder `target`, by a relative path; a copy where the system refuses links."""
    wanted = os.path.relpath(target, link.parent)
    if link.is_symlink() and os.readlink(link) == wanted:
        return
    seals = [folder / SEAL for folder in (link, target)]
    if not link.is_symlink() and all(seal.is_file() for seal in seals) and len({s.read_bytes() for s in seals}) == 1:
        return  # there is a current copy
    try:
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        link.unlink(missing_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(wanted, target_is_directory=True)
        except OSError:
            shutil.copytree(target, link)
    except OSError as error:
        raise UserError(f"{link}: cannot be written ({error.strerror})") from None


class Report(Generic[S]):
    """Rows of results that a notebook records. Nothing is kept; the key shows when the rows are out of date."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    makes: ClassVar[str] = ""  # an input that only the notebook computes

    def __init__(self, context: Context, settings: S, **inputs: Any):
        self.context, self.settings, self.inputs = context, settings, inputs
        vars(self).update(inputs)

    def intact(self) -> bool:
        """Whether the model that the notebook computes exists and is whole."""
        return not self.makes or self.inputs[self.makes].intact()

    @cached_property
    def key(self) -> str:
        """The fingerprint of all that the rows depend on."""
        return stage_key(self.name, self.version, self.settings, self.inputs)


def stage_key(name: str, version: int, settings: BaseModel, inputs: Mapping[str, Keyed[Any]]) -> str:
    """A fingerprint of a stage: its name, version and settings, and the keys of its inputs."""
    return fingerprint(name, version, settings.model_dump(), {name: given.key for name, given in inputs.items()})


def contents(keyed: Any) -> dict[str, str]:
    """The fingerprints of the data that a report or stage depends on, by kind ("corpus", "tasks", ...)."""
    found = {keyed.kind: keyed.content} if isinstance(keyed, Source) else {}
    for given in getattr(keyed, "inputs", {}).values():
        found |= contents(given)
    return found
