"""The adapters that may be named, the versions behind the names, and how failures are remembered."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from .client import AdapterState, Manifest
from .config import MAX_SCALING, AdapterSpec
from .errors import InvalidRequest, Overloaded, RouterError
from .merges import Merge
from .sources import Source, SourcePolicy, adapter_not_found, check_name, trusted_source
from .versions import Adapter, Copy

BACKOFF_FIRST = 1.0
BACKOFF_MOST = 120.0
"""Seconds before another try after the first failure, and at most."""

MAX_UNREGISTERED = 10_000
"""Adapters remembered because a request once named them; idle ones beyond this are forgotten."""
MAX_UNLOADED = 10_000
"""Names remembered because they were unloaded."""

_Name = tuple[str | None, str]
"""Owner and name. Owner None: a name of everyone's."""


class AdapterRegistry:
    """Names to versions of adapters, and their states on disks. Changed by the engine loop, by first use, and
    by the calls that load and unload.

    A name stands for one version at a time. A load of a name that has one makes a candidate; `promote` lets
    the name stand for it, and the version before it is closing from then on.
    """

    def __init__(
        self, policy: SourcePolicy, *, base: str, specs: Iterable[AdapterSpec] = (), jitter: random.Random
    ) -> None:
        self._policy = policy
        self._base = base
        self._jitter = jitter
        self._serial = 0
        self._adapters: dict[str, Adapter] = {}
        self._names: dict[_Name, Adapter] = {}
        self._merges: dict[tuple[str | None, Merge], Adapter] = {}
        """Merges that requests asked for, which have no name."""
        self._unloaded: OrderedDict[_Name, None] = OrderedDict()
        for spec in specs:
            adapter = self._add(spec.name, trusted_source(spec.source), owner=None, registered=True)
            adapter.scaling = spec.scaling
            self._names[None, spec.name] = adapter

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, key: str) -> Adapter | None:
        return self._adapters.get(key)

    def visible(self, tenant: str) -> list[Adapter]:
        """What this tenant may name, in order of registration."""
        return [a for a in self if a.owner in (None, tenant) and self.named(a) is a]

    def named(self, adapter: Adapter) -> Adapter | None:
        """The version that this one's name stands for."""
        return self._names.get((adapter.owner, adapter.name))

    def digests_on_disk(self, group: int) -> set[str]:
        return {adapter.digest for adapter in self if adapter.copy(group).on_disk}

    # What a request or a call names.

    def find(self, name: str, tenant: str) -> Adapter:
        """What `name` means to this tenant: its own first. Raises AdapterNotFound."""
        adapter = self._names.get((tenant, name)) or self._names.get((None, name))
        if adapter is None:
            raise adapter_not_found(name)
        return adapter

    def resolve(self, name: str, *, tenant: str, source: str = "", token: str = "") -> Adapter:
        """What a request names; a hub id or an allowed directory is registered on first use.

        One fetched with a caller's own token belongs to that caller's tenant alone.
        Raises AdapterNotFound for what is unknown, forbidden or unloaded.
        """
        public = self._names.get((None, name))
        if public is not None and public.registered:
            return public
        own = self._names.get((tenant, name))
        if own is not None:
            self._renew_token(own, token)
            return own
        if (tenant, name) in self._unloaded or (None, name) in self._unloaded:
            raise adapter_not_found(name)
        if public is not None and not token:
            return public
        found = self._policy.requested(name, source)
        self._check_room()
        adapter = self._add(name, found, owner=tenant if token else None, registered=False, token=token)
        self._names[adapter.owner, name] = adapter
        return adapter

    def merged(self, merge: Merge, owner: str | None) -> Adapter:
        """The merge that a request asks for; equal ones are one adapter."""
        adapter = self._merges.get((owner, merge))
        if adapter is None:
            self._check_room()
            adapter = self._add(str(merge), merge, owner=owner, registered=False)
            self._merges[owner, merge] = adapter
        return adapter

    # Loads and unloads.

    def register(
        self, name: str, source: str, *, tenant: str, token: str = "", scaling: float = 1.0
    ) -> Adapter:
        """The version that a load of this name is to make resident; see `_version`.

        Raises:
            InvalidRequest: a bad name, the base's name, or a bad scaling.
            AdapterNotFound: the source is unknown or forbidden.
        """
        self.check_new_name(name)
        if not abs(scaling) <= MAX_SCALING:
            raise InvalidRequest(
                f"scaling must lie between -{MAX_SCALING:g} and {MAX_SCALING:g}", param="scaling"
            )
        known = self._names.get((tenant, name)) or self._names.get((None, name))
        if known is not None and known.registered and source in _spellings(known):
            own = token or known.token if known.owner is not None else ""
            return self._version(name, known.source, known.owner, own, scaling)
        found = self._policy.requested(source or name)
        return self._version(name, found, tenant if token else None, token, scaling)

    def register_merge(self, name: str, merge: Merge, owner: str | None) -> Adapter:
        """As `register`, for an adapter that is made of others."""
        self.check_new_name(name)
        return self._version(name, merge, owner, "", 1.0)

    def check_new_name(self, name: str) -> None:
        """InvalidRequest unless an adapter may be loaded under this name."""
        check_name(name)
        if name == self._base:
            raise InvalidRequest("An adapter must not have the base model's name.", param="lora_name")

    def _version(
        self, name: str, source: Source | Merge, owner: str | None, token: str, scaling: float
    ) -> Adapter:
        """A new name's first version, or one whose bytes are not known yet; else a candidate."""
        known = self._names.get((owner, name))
        if (
            known is not None
            and known.manifest is None
            and (known.source, known.scaling) == (source, scaling)
        ):
            self._renew_token(known, token)
            known.registered = True
            return known
        adapter = self._add(name, source, owner=owner, registered=True, token=token)
        adapter.scaling = scaling
        if known is None:
            self._names[owner, name] = adapter
            self._unloaded.pop((owner, name), None)
        else:
            adapter.candidate = True
        return adapter

    def promote(self, candidate: Adapter) -> Adapter | None:
        """Let the name stand for this version; answers the one it stood for."""
        before = self.named(candidate)
        candidate.candidate = False
        self._names[candidate.owner, candidate.name] = candidate
        if before is not None:
            candidate.pinned |= before.pinned
            before.pinned, before.closing = False, True
        return before

    def adopt(self, candidate: Adapter, now: float) -> Adapter:
        """The candidate's bytes are those that its name stands for: that version takes over what the load
        said, and the candidate is forgotten."""
        known = self.named(candidate)
        assert known is not None
        assert candidate.manifest is not None
        known.source, known.token, known.registered = candidate.source, candidate.token, True
        known.scaling = candidate.scaling
        known.pinned |= candidate.pinned
        known.failures = 0
        for group, copy in candidate.copies.items():
            if copy.on_disk and not known.copy(group).on_disk:
                self.fetched(known, group, candidate.manifest, now)
        self.forget(candidate)
        return known

    def close(self, name: str, tenant: str) -> list[Adapter]:
        """Make the name unknown, until it is loaded again; answers its versions, which stay until `forget`.

        Raises AdapterNotFound.
        """
        current = self.find(name, tenant)
        versions = [a for a in self if (a.owner, a.name) == (current.owner, name)]
        for adapter in versions:
            adapter.closing = True
            adapter.pinned = adapter.candidate = False
        del self._names[current.owner, name]
        self._unloaded[current.owner, name] = None
        if len(self._unloaded) > MAX_UNLOADED:
            self._unloaded.popitem(last=False)
        return versions

    def forget(self, adapter: Adapter) -> None:
        """Drop a version nobody uses any more."""
        del self._adapters[adapter.key]
        if self.named(adapter) is adapter:
            del self._names[adapter.owner, adapter.name]
        if isinstance(adapter.source, Merge) and self._merges.get((adapter.owner, adapter.source)) is adapter:
            del self._merges[adapter.owner, adapter.source]

    # What becomes of a version.

    def fetching(self, adapter: Adapter, group: int) -> None:
        copy = adapter.copies.setdefault(group, Copy())
        copy.state = AdapterState.FETCHING
        copy.bytes_done = copy.bytes_total = 0

    def fetched(self, adapter: Adapter, group: int, manifest: Manifest, now: float) -> None:
        copy = adapter.copies.setdefault(group, Copy())
        copy.state, copy.bytes, copy.fetched_at = AdapterState.ON_DISK, manifest.bytes, now
        copy.failure, copy.retry_at = None, 0.0
        adapter.manifest = manifest
        adapter.failure, adapter.retry_at = None, 0.0

    def failed(self, adapter: Adapter, group: int, error: RouterError, now: float) -> None:
        """No group can have it. Remember the error; the next try waits twice as long as the last, give or
        take a quarter."""
        adapter.retry_at = now + self._backoff(adapter.failures)
        adapter.failures = min(adapter.failures + 1, 16)
        adapter.failure = error
        adapter.copies.pop(group, None)

    def failed_here(self, adapter: Adapter, group: int, error: RouterError, now: float) -> None:
        """As `failed`, for one group, while another has it or is about to."""
        failures = adapter.copy(group).failures
        adapter.copies[group] = Copy(
            failures=min(failures + 1, 16), retry_at=now + self._backoff(failures), failure=error
        )

    def postpone(self, adapter: Adapter, group: int, retry_at: float) -> None:
        """This group does not try again before `retry_at`."""
        copy = adapter.copies.setdefault(group, Copy())
        copy.failures += 1
        copy.retry_at = retry_at

    def absent(self, adapter: Adapter, group: int, retry_at: float = 0.0) -> None:
        """This group has nothing on disk: it fetches again when that is wanted, not before `retry_at`."""
        adapter.copies[group] = Copy(failures=adapter.copy(group).failures, retry_at=retry_at)

    def trim(self, in_use: Callable[[str], bool]) -> None:
        """Bound what requests alone make us remember: forget the oldest that nobody uses."""
        surplus = len(self._adapters) - MAX_UNREGISTERED
        for adapter in list(self) if surplus > 0 else ():
            kept = adapter.registered or adapter.pinned or adapter.closing or adapter.leases
            if surplus > 0 and not (kept or adapter.fetching or in_use(adapter.key)):
                self.forget(adapter)
                surplus -= 1

    def lost(self, group: int) -> None:
        """A shard group is gone; what it had on disk is asked for anew. Failures stay remembered."""
        for adapter in self:
            adapter.copies.pop(group, None)

    def _backoff(self, failures: int) -> float:
        longest: float = min(BACKOFF_MOST, BACKOFF_FIRST * 2**failures)
        return longest * self._jitter.uniform(0.75, 1.25)

    def _add(
        self, name: str, source: Source | Merge, *, owner: str | None, registered: bool, token: str = ""
    ) -> Adapter:
        self._serial += 1
        adapter = Adapter(f"{name}#{self._serial}", name, source, owner, registered, token)
        self._adapters[adapter.key] = adapter
        return adapter

    def _check_room(self) -> None:
        if len(self._adapters) >= 2 * MAX_UNREGISTERED:
            raise Overloaded("Too many different adapters were named; try again later.", retry_after=60.0)

    def _renew_token(self, adapter: Adapter, token: str) -> None:
        if token and token != adapter.token and adapter.owner is not None:
            adapter.token = token
            adapter.failure, adapter.retry_at = None, 0.0


def _spellings(adapter: Adapter) -> tuple[str, ...]:
    """How a load may name the source that a registered name has, even one that requests may not name."""
    own = (adapter.source.id,) if isinstance(adapter.source, Source) else ()
    return ("", str(adapter.source), *own)
