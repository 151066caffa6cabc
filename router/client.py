"""What the API side sees of the engine. REST and gRPC handlers translate to and from this, no more."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from .merges import MergeRecipe
from .request import AdapterChoice, Request


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
    kind: str = ""
    """What it is, such as "LoRA" or "DoRA"; empty before it is on disk."""
    scaling: float = 1.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a shard found in an adapter once it was on disk."""

    digest: str
    """Content id of config and weights: the adapter's version."""
    revision: str = ""
    """The commit that was fetched, where the source has one."""
    bytes: int = 0
    """On the device, of the rank that needs most."""
    max_rank: int = 0
    modules: int = 0
    kind: str = ""
    alone: str = ""
    """Why it takes no weight but 1 and no company; empty: it does."""
    owns: tuple[str, ...] = ()
    """Base modules it replaces: among summed adapters each has one owner."""
    invocation_tokens: tuple[int, ...] = ()
    """It applies from the start of their last occurrence in the prompt; none: from the first token."""
    vocab_size: int = 0
    """Token ids it knows, where they are more than the base's; else 0."""
    own_tokenizer: bool = False
    own_chat_template: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def ships_text(self) -> bool:
        """It brings a tokenizer or a chat template of its own."""
        return self.own_tokenizer or self.own_chat_template


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """One adapter of a call, once it is known what it is."""

    name: str
    key: str
    """Of the version that the call uses, whatever its name comes to stand for."""
    weight: float
    """The caller's, times the scaling of the name."""
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterQuery:
    """The adapters that a call names. With `merge` they are the parts of one that is made of them."""

    choices: Sequence[AdapterChoice]
    tenant: str
    source: str = ""
    token: str = field(default="", repr=False)
    merge: MergeRecipe | None = None


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

    def prepare(self, query: AdapterQuery) -> AbstractAsyncContextManager[tuple[PreparedAdapter, ...]]:
        """Find out what a call names, fetching what is not on disk; a hub id or an allowed directory is
        registered on first use.

        Inside the block requests for these versions may be submitted, even where a name stands for another
        version by then or was unloaded. Entering waits only where something is not on disk.

        Raises AdapterNotFound for what is unknown or forbidden, the adapter's own error if it cannot be had,
        and what `submit` refuses with: the calls that wait count against its queues. The base's name is not
        an adapter: callers check that first.
        """
        ...

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        tenant: str,
        token: str = "",
        pin: bool = False,
        scaling: float = 1.0,
    ) -> AdapterStatus:
        """Fetch what `source` holds now and make it resident under `name`; raises the typed error on failure.

        If the name stands for another version, requests that were accepted before finish on that one. A
        failure leaves it as it was.
        """
        ...

    async def merge_adapters(self, name: str, query: AdapterQuery) -> AdapterStatus:
        """Make one adapter of those that `query` names by its recipe, resident under `name`. As
        `load_adapter` otherwise."""
        ...

    async def unload_adapter(self, name: str, *, tenant: str) -> int:
        """Refuse new requests, wait for accepted ones, free the slots; answers the bytes freed.

        The name stays unknown until a load by that name, even where it is a source that may be named.
        """
        ...

    async def pin_adapter(self, name: str, pinned: bool, *, tenant: str) -> AdapterStatus: ...

    def adapters(self, *, tenant: str) -> list[AdapterStatus]:
        """Adapters that this tenant may name, in order of registration."""
        ...
