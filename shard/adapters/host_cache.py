"""The host-memory tier: parsed adapters by digest, least recently used leaves first."""

from __future__ import annotations

from collections import OrderedDict

from .weights import PackedAdapter


class HostCache:
    """Keeps at most `budget` bytes of packed adapters; with a budget of 0, none."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self.used_bytes = 0

    def get(self, digest: str) -> PackedAdapter | None:
        """The adapter if it is here, now the most recently used."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, digest: str, adapter: PackedAdapter) -> None:
        """Keep `adapter`, letting go of others to make room. One larger than the budget is not kept."""
        self._drop(digest)
        if adapter.nbytes > self._budget:
            return
        while self.used_bytes + adapter.nbytes > self._budget:
            self._drop(next(iter(self._adapters)))
        self._adapters[digest] = adapter
        self.used_bytes += adapter.nbytes

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def _drop(self, digest: str) -> None:
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.used_bytes -= adapter.nbytes
