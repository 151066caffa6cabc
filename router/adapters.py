"""The adapters that may be named, what is known of each, and how failures are remembered."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ..proto import shard_pb2
from .client import AdapterState
from .config import AdapterSpec
from .errors import InvalidRequest, Overloaded, RouterError
from .sources import Source, SourcePolicy, adapter_not_found, check_name, trusted_source

BACKOFF_FIRST = 1.0
BACKOFF_MOST = 120.0
"""Seconds before another try after the first failure, and at most."""

MAX_UNREGISTERED = 10_000
"""Adapters remembered because a request once named them; idle ones beyond this are forgotten."""


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter and what is on disk of it. `state` is never LOADING or RESIDENT: see `residency`."""

    key: str
    name: str
    source: Source
    owner: str | None
    """The only tenant that may name it; None: everyone."""
    registered: bool
    """Named by the operator or by a load; otherwise by a request's first use of its source."""
    token: str = field(default="", repr=False)
    state: AdapterState = AdapterState.ABSENT
    digest: str = ""
    bytes: int = 0
    """On the device, of the rank that needs most."""
    max_rank: int = 0
    modules: int = 0
    warnings: tuple[str, ...] = ()
    bytes_done: int = 0
    bytes_total: int = 0
    fetched_at: float = 0.0
    pinned: bool = False
    closing: bool = False
    """Unloading: no new request may name it."""
    failures: int = 0
    retry_at: float = 0.0
    """Seconds on the loop's clock before which it is not fetched or loaded again."""
    failure: RouterError | None = None

    @property
    def on_disk(self) -> bool:
        return self.state is AdapterState.ON_DISK

    def error(self, now: float) -> RouterError:
        """A fresh copy of what it failed with, to be raised to one caller."""
        assert self.failure is not None
        return type(self.failure)(
            self.failure.message, param=self.failure.param, retry_after=max(1.0, self.retry_at - now)
        )


class AdapterRegistry:
    """Names to adapters, and their states on disk. Changed by the engine loop and by first use."""

    def __init__(
        self, policy: SourcePolicy, *, base: str, specs: Iterable[AdapterSpec] = (), jitter: random.Random
    ) -> None:
        self._policy = policy
        self._base = base
        self._jitter = jitter
        self._serial = 0
        self._adapters: dict[str, Adapter] = {}
        self._names: dict[tuple[str | None, str], Adapter] = {}
        for spec in specs:
            self._add(spec.name, trusted_source(spec.source), owner=None, registered=True)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, key: str) -> Adapter | None:
        return self._adapters.get(key)

    def visible(self, tenant: str) -> list[Adapter]:
        """Adapters this tenant may name, in order of registration."""
        return [a for a in self if a.owner in (None, tenant) and not a.closing]

    def find(self, name: str, tenant: str) -> Adapter:
        """What `name` means to this tenant: its own first. Raises AdapterNotFound."""
        adapter = self._names.get((tenant, name)) or self._names.get((None, name))
        if adapter is None:
            raise adapter_not_found(name)
        return adapter

    def resolve(self, name: str, *, tenant: str, source: str = "", token: str = "") -> str:
        """The key of what a request names; a hub id or an allowed directory is registered on first use.

        One fetched with a caller's own token belongs to that caller's tenant alone.
        Raises AdapterNotFound for what is unknown or forbidden.
        """
        public = self._names.get((None, name))
        if public is not None and public.registered:
            return public.key
        own = self._names.get((tenant, name))
        if own is not None:
            self._renew_token(own, token)
            return own.key
        if public is not None and not token:
            return public.key
        found = self._policy.requested(name, source)
        if len(self._adapters) >= 2 * MAX_UNREGISTERED:
            raise Overloaded("Too many different adapters were named; try again later.", retry_after=60.0)
        return self._add(name, found, owner=tenant if token else None, registered=False, token=token).key

    def register(self, name: str, source: str, *, tenant: str, token: str = "") -> Adapter:
        """Register a name for a source, or answer the adapter that has both already.

        Raises:
            InvalidRequest: a bad name, the base's name, or a name that stands for another source.
            AdapterNotFound: the source is unknown or forbidden.
        """
        check_name(name)
        if name == self._base:
            raise InvalidRequest("An adapter must not have the base model's name.", param="lora_name")
        known = self._names.get((tenant, name)) or self._names.get((None, name))
        if known is not None and known.registered and source in ("", known.source.id, str(known.source)):
            return known
        found = self._policy.requested(source or name)
        if known is not None and known.source != found:
            raise InvalidRequest(
                f"The name {name} stands for another source already; unload it first.", param="lora_name"
            )
        if known is not None and (known.owner is None) == (not token):
            self._renew_token(known, token)
            known.registered = True
            return known
        return self._add(name, found, owner=tenant if token else None, registered=True, token=token)

    def close(self, adapter: Adapter) -> None:
        """Make the name unknown; the adapter itself stays until `forget`."""
        adapter.closing = True
        del self._names[adapter.owner, adapter.name]

    def forget(self, adapter: Adapter) -> None:
        """Drop a closed adapter nobody uses any more."""
        del self._adapters[adapter.key]

    def fetching(self, adapter: Adapter) -> None:
        adapter.state = AdapterState.FETCHING
        adapter.bytes_done = adapter.bytes_total = 0

    def fetched(self, adapter: Adapter, manifest: shard_pb2.AdapterManifest, now: float) -> None:
        adapter.state, adapter.fetched_at = AdapterState.ON_DISK, now
        adapter.digest = manifest.digest
        adapter.bytes = max(manifest.rank_bytes, default=0)
        adapter.max_rank, adapter.modules = manifest.max_rank, manifest.modules
        adapter.warnings = tuple(manifest.warnings)
        adapter.failure = None

    def failed(self, adapter: Adapter, error: RouterError, now: float) -> None:
        """Remember the error; the next try waits twice as long as the last, give or take a quarter."""
        delay = min(BACKOFF_MOST, BACKOFF_FIRST * 2**adapter.failures)
        adapter.failures = min(adapter.failures + 1, 16)
        adapter.retry_at = now + delay * self._jitter.uniform(0.75, 1.25)
        adapter.failure, adapter.state = error, AdapterState.FAILED

    def absent(self, adapter: Adapter, retry_at: float = 0.0) -> None:
        """Nothing is known to be on disk: fetch it again when it is wanted, not before `retry_at`."""
        adapter.state = AdapterState.ABSENT
        adapter.retry_at = retry_at

    def trim(self, in_use: Callable[[str], bool]) -> None:
        """Bound what requests alone make us remember: forget the oldest that nobody uses."""
        surplus = len(self._adapters) - MAX_UNREGISTERED
        for adapter in list(self) if surplus > 0 else ():
            idle = adapter.state is not AdapterState.FETCHING and not in_use(adapter.key)
            if surplus > 0 and idle and not (adapter.registered or adapter.pinned or adapter.closing):
                self.close(adapter)
                self.forget(adapter)
                surplus -= 1

    def reset(self) -> None:
        """The shard group is gone; what it had on disk is asked for anew. Failures stay remembered."""
        for adapter in self:
            if adapter.state is not AdapterState.FAILED:
                self.absent(adapter)

    def _add(
        self, name: str, source: Source, *, owner: str | None, registered: bool, token: str = ""
    ) -> Adapter:
        self._serial += 1
        adapter = Adapter(f"{name}#{self._serial}", name, source, owner, registered, token)
        self._adapters[adapter.key] = adapter
        self._names[owner, name] = adapter
        return adapter

    def _renew_token(self, adapter: Adapter, token: str) -> None:
        if token and token != adapter.token and adapter.owner is not None:
            adapter.token = token
            if adapter.state is AdapterState.FAILED:
                self.absent(adapter)
