"""What the API side sees of the engine. REST and gRPC handlers translate to and from this, no more."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from .request import Request


class AdapterState(enum.Enum):
    ABSENT = "absent"
    FETCHING = "fetching"
    ON_DISK = "on_disk"
    LOADING = "loading"
    RESIDENT = "resident"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStatus:
    """A snapshot of one adapter for the outside."""

    name: str
    source: str
    state: AdapterState
    digest: str = ""
    bytes: int = 0
    max_rank: int = 0
    modules: int = 0
    pinned: bool = False
    running: int = 0
    waiting: int = 0
    bytes_done: int = 0
    """Download progress while fetching."""
    bytes_total: int = 0
    error: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The base as the shard describes it."""

    name: str
    """What clients type: --served-model-name."""
    model: str
    digest: str
    architecture: str
    device: str
    dtype: str
    max_model_len: int
    vocab_size: int


class EngineClient(Protocol):
    """Every method may be called from any task of the router's loop; none blocks it."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def ready(self) -> bool:
        """A shard group answers and the server is not draining."""
        ...

    def submit(self, request: Request) -> None:
        """Accept a request. Raises a typed error if it is refused (queues full, draining); once accepted,
        its stream ends in exactly one terminal event."""
        ...

    def cancel(self, request_id: str) -> None:
        """End a request whose client has gone, without a terminal event. Unknown ids are ignored."""
        ...

    def resolve(self, name: str, *, tenant: str, source: str = "", token: str = "") -> str:
        """The registry key of what a request names; registers a hub id or an allowed directory on first use.

        Raises AdapterNotFound for anything else. The base's name is not an adapter: callers check that first.
        """
        ...

    async def load_adapter(
        self, name: str, source: str, *, tenant: str, token: str = "", pin: bool = False
    ) -> AdapterStatus:
        """Register `name` for `source`, fetch it and make it resident; raises the typed error on failure."""
        ...

    async def unload_adapter(self, name: str, *, tenant: str) -> int:
        """Refuse new requests, wait for running ones, free the slot; answers the bytes freed."""
        ...

    async def pin_adapter(self, name: str, pinned: bool, *, tenant: str) -> AdapterStatus: ...

    def adapters(self, *, tenant: str) -> list[AdapterStatus]:
        """Adapters that this tenant may name, in order of registration."""
        ...
