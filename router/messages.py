"""What reaches the engine loop. Each is applied in the order in which it was posted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..proto import shard_pb2
from .client import Manifest
from .errors import RouterError
from .sequence import Sequence
from .versions import Adapter


@dataclass(frozen=True, slots=True)
class Submitted:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Cancelled:
    request_id: str


@dataclass(frozen=True, slots=True)
class DiskWished:
    """Have an adapter on disk; `done` gets None, or the typed error."""

    adapter: Adapter
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class DiskWaitEnded:
    """Whoever waited for `done` does so no longer."""

    adapter: Adapter
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class LoadWished:
    """Make an adapter resident; `done` gets the version its name then stands for, or the typed error."""

    adapter: Adapter
    pin: bool
    done: asyncio.Future[Adapter]


@dataclass(frozen=True, slots=True)
class Unpinned:
    adapter: Adapter
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class UnloadWished:
    """Free an adapter once nobody uses it; `done` gets the bytes freed."""

    adapter: Adapter
    done: asyncio.Future[int]


@dataclass(frozen=True, slots=True)
class GroupReady:
    group: int
    """Its index in the configuration."""
    epoch: int
    info: shard_pb2.InfoReply


@dataclass(frozen=True, slots=True)
class GroupDraining:
    """The group is about to stop."""

    epoch: int


@dataclass(frozen=True, slots=True)
class GroupLost:
    epoch: int
    error: RouterError


@dataclass(frozen=True, slots=True)
class StepAnswered:
    result: shard_pb2.StepResult


@dataclass(frozen=True, slots=True)
class FetchProgressed:
    key: str
    epoch: int
    progress: shard_pb2.DownloadProgress


@dataclass(frozen=True, slots=True)
class Fetched:
    key: str
    epoch: int
    manifest: Manifest
    seconds: float


@dataclass(frozen=True, slots=True)
class FetchFailed:
    key: str
    epoch: int
    error: RouterError


@dataclass(frozen=True, slots=True)
class Loaded:
    key: str
    epoch: int
    reply: shard_pb2.LoadAdapterReply
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadFailed:
    key: str
    epoch: int
    error: RouterError


@dataclass(frozen=True, slots=True)
class Unloaded:
    key: str
    epoch: int


@dataclass(frozen=True, slots=True)
class UnloadFailed:
    key: str
    epoch: int
    error: RouterError


@dataclass(frozen=True, slots=True)
class DrainBegan:
    """Nothing new is accepted: end every call whose requests are not accepted yet."""


@dataclass(frozen=True, slots=True)
class DrainEnded:
    """The time for what runs is over: end everything that is left."""


AdapterReport = FetchProgressed | Fetched | FetchFailed | Loaded | LoadFailed | Unloaded | UnloadFailed
"""What a task under way for one epoch tells."""

Message = (
    Submitted
    | Cancelled
    | DiskWished
    | DiskWaitEnded
    | LoadWished
    | Unpinned
    | UnloadWished
    | GroupReady
    | GroupDraining
    | GroupLost
    | StepAnswered
    | AdapterReport
    | DrainBegan
    | DrainEnded
)
