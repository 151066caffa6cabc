"""One version of an adapter: where its bytes come from, what a shard found in them, and how it fares."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..proto import shard_pb2
from .client import AdapterState, Manifest
from .errors import RouterError
from .merges import Merge
from .sources import Source


@dataclass(slots=True, eq=False)
class Adapter:
    """One version under one name. Its bytes are unknown before the first fetch, and never change after it.

    `state` is never LOADING or RESIDENT: see `residency`.
    """

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
    state: AdapterState = AdapterState.ABSENT
    manifest: Manifest | None = None
    """Of the first fetch: every later one must arrive at its digest."""
    bytes_done: int = 0
    bytes_total: int = 0
    fetched_at: float = 0.0
    pinned: bool = False
    candidate: bool = False
    """A load of its name still tries it out; until it is resident the name stands for another version."""
    closing: bool = False
    """Its name is gone, or stands for another version: it is freed when its last request ends."""
    leases: int = 0
    """Calls that are to use it and have not handed their requests to the engine yet."""
    failures: int = 0
    retry_at: float = 0.0
    """Seconds on the loop's clock before which it is not fetched or loaded again."""
    failure: RouterError | None = None

    @property
    def on_disk(self) -> bool:
        return self.state is AdapterState.ON_DISK

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
