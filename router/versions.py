"""One version of an adapter: where its bytes come from, what a shard found in them, and how it fares."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..proto import shard_pb2
from .client import AdapterState, Manifest
from .errors import RouterError
from .merges import Merge
from .sources import Source


@dataclass(slots=True)
class Copy:
    """How far one shard group has come with a version's files.

    `state` is ABSENT, FETCHING or ON_DISK; what is resident, the group's `Residency` knows.
    """

    state: AdapterState = AdapterState.ABSENT
    bytes: int = 0
    """On the device, of the rank that needs most; 0 before it is on disk."""
    bytes_done: int = 0
    bytes_total: int = 0
    fetched_at: float = 0.0
    failures: int = 0
    """Tries in a row that this group could not do, though the adapter itself may be well."""
    retry_at: float = 0.0
    """Seconds on the loop's clock before which this group does not try again."""
    failure: RouterError | None = None
    """Why this group could not have it, where another one has."""

    @property
    def on_disk(self) -> bool:
        return self.state is AdapterState.ON_DISK


@dataclass(slots=True, eq=False)
class Adapter:
    """One version under one name. Its bytes are unknown before the first fetch, and never change after it."""

    key: str
    name: str
    source: Source | Merge
    owner: str | None
    """The only tenant that may name it; None: everyone."""
    registered: bool
    """Named by the operator or by a load; otherwise by a request's first use of its source."""
    token: str = field(default="", repr=False)
    scaling: float = 1.0
    """Multiplies the weight of every use."""
    copies: dict[int, Copy] = field(default_factory=dict)
    """By the index of the shard group. A group without one has nothing of it."""
    manifest: Manifest | None = None
    """Of the newest fetch: every later one must arrive at its digest."""
    pinned: bool = False
    """It stays resident on one group at least."""
    candidate: bool = False
    """A load of its name still tries it out; until it is resident the name stands for another version."""
    closing: bool = False
    """Its name is gone, or stands for another version: it is freed when its last request ends."""
    leases: int = 0
    """Calls that are to use it and have not handed their requests to the engine yet."""
    failures: int = 0
    retry_at: float = 0.0
    """Seconds on the loop's clock before which no group tries it again."""
    failure: RouterError | None = None
    """Why no group could have it; cleared by the next fetch."""

    def copy(self, group: int) -> Copy:
        return self.copies.get(group) or Copy()

    @property
    def state(self) -> AdapterState:
        """On the disks: how far the furthest group has come."""
        states = {copy.state for copy in self.copies.values()}
        for state in (AdapterState.ON_DISK, AdapterState.FETCHING):
            if state in states:
                return state
        return AdapterState.FAILED if self.failure else AdapterState.ABSENT

    @property
    def on_disk(self) -> bool:
        """Some group has it."""
        return self.state is AdapterState.ON_DISK

    @property
    def fetching(self) -> bool:
        return any(copy.state is AdapterState.FETCHING for copy in self.copies.values())

    def failing(self, now: float) -> bool:
        """It has failed, and it is too early for another try."""
        return self.failure is not None and self.retry_at > now

    def refusal(self, group: int, now: float) -> RouterError | None:
        """Why this group cannot have it at present, if it has tried."""
        if self.failing(now):
            return self.error(now)
        copy = self.copy(group)
        return copy.failure if copy.failure is not None and copy.retry_at > now else None

    @property
    def digest(self) -> str:
        return self.manifest.digest if self.manifest else ""

    @property
    def bytes(self) -> int:
        """On the device, of the rank that needs most."""
        return self.manifest.bytes if self.manifest else 0

    @property
    def prepared(self) -> bool:
        """A request that names it can be encoded and checked: what it ships itself can be asked for too."""
        return self.manifest is not None and (self.on_disk or not self.manifest.ships_text)

    def error(self, now: float) -> RouterError:
        """A fresh copy of what it failed with, to be raised to one caller."""
        assert self.failure is not None
        return type(self.failure)(
            self.failure.message, param=self.failure.param, retry_after=max(1.0, self.retry_at - now)
        )


def read_manifest(message: shard_pb2.AdapterManifest) -> Manifest:
    return Manifest(
        digest=message.digest,
        revision=message.revision,
        bytes=max(message.rank_bytes, default=0),
        max_rank=message.max_rank,
        modules=message.modules,
        kind=message.kind,
        alone=message.alone,
        owns=tuple(message.owns),
        invocation_tokens=tuple(message.invocation_tokens),
        vocab_size=message.vocab_size,
        own_tokenizer=message.own_tokenizer,
        own_chat_template=message.own_chat_template,
        warnings=tuple(message.warnings),
    )
