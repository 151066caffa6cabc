"""The lines that a shard and its adapter worker exchange: one JSON object each, over the worker's pipes."""

from __future__ import annotations

import msgspec

from .base_weights import WeightFile
from .files import FileLimits
from .layout import AdapterLayout
from .manifest import AdapterManifest, AdapterRequest
from .merging.recipe import PartPlace
from .own_tokenizer import BaseText
from .pack import PackedFile
from .sources.retry import RetryPolicy

HEARTBEAT_SECONDS = 1.0
"""How often a worker says that it lives."""


class WorkerSettings(msgspec.Struct, frozen=True):
    """Limits and manners of a worker."""

    limits: FileLimits = FileLimits()
    retry: RetryPolicy = RetryPolicy()


class Setup(msgspec.Struct, frozen=True):
    """The first line to a worker."""

    layout: AdapterLayout
    text: BaseText
    spool: str
    """An existing directory for packed files. The worker deletes it when it ends."""
    settings: WorkerSettings


class Download(msgspec.Struct, frozen=True, tag=True):
    """Fetch, verify, parse and pack an adapter."""

    job: int
    request: AdapterRequest
    parts: tuple[PartPlace, ...] = ()
    """Where those lie that a merged adapter is made of, in order."""


class Repack(msgspec.Struct, frozen=True, tag=True):
    """Parse and pack an adapter that is on disk already and must still have this digest."""

    job: int
    id: str
    """What to call it in errors."""
    directory: str
    digest: str


class Provided(msgspec.Struct, frozen=True, tag=True):
    """The base weight that a `Wanted` asked for."""

    request: int
    file: WeightFile


Command = Download | Repack
Order = Command | Provided
"""What a worker reads after its setup."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Nothing else to say."""


class Wanted(msgspec.Struct, frozen=True, tag=True):
    """A job needs a weight of the base; see `BaseWeights.read` for its name."""

    request: int
    name: str
    held: bool = False
    """What this rank holds of it will do."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    job: int
    bytes_done: int
    bytes_total: int


class Downloaded(msgspec.Struct, frozen=True, tag=True):
    job: int
    manifest: AdapterManifest
    directory: str
    file: PackedFile


class Repacked(msgspec.Struct, frozen=True, tag=True):
    job: int
    file: PackedFile


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The job ended in an error; `reason` is that of one of the shard's errors."""

    job: int
    reason: str
    message: str


Event = Alive | Wanted | Progress | Downloaded | Repacked | Failed
