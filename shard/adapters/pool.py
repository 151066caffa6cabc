"""The resident pool: which adapter is in which slot of the device, by bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import AdapterMemoryFull, BadPlan, SlotBusy
from .weights import PackedAdapter, SiteWeights

_CPU = torch.device("cpu")


class Site(Protocol):
    """A place in the model that adapters change. It keeps what each slot brings, for its rows."""

    def put(self, slot: int, weights: SiteWeights) -> None:
        """Keep one adapter's weights, of the kind this site takes."""
        ...

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known."""
        ...


@dataclass(frozen=True, slots=True)
class _Resident:
    digest: str
    adapter: PackedAdapter


class AdapterPool:
    """Adapters on the device at their true rank. Called on the device thread only.

    Only `load` and `unload` change what the sites hold.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        slots: int,
        budget: int,
        device: torch.device = _CPU,
    ) -> None:
        """`sites`: the model's, in the order of the layout's numbers, all empty. `budget` in bytes."""
        self._sites = sites
        self._slots = slots
        self._budget = budget
        self._device = device
        self._residents: dict[int, _Resident] = {}
        self.used_bytes = 0

    def load(self, slot: int, digest: str, adapter: PackedAdapter) -> int:
        """Make an adapter resident in an empty slot. Returns its bytes.

        On a CPU the pool shares the adapter's buffer. Loading what the slot already holds changes nothing.
        Raises SlotBusy where another adapter is in the slot, AdapterMemoryFull over the budget.
        """
        self._check_slot(slot)
        if (resident := self._residents.get(slot)) is not None:
            if resident.digest == digest:
                return resident.adapter.nbytes
            raise SlotBusy(f"slot {slot} holds adapter {resident.digest}; unload it first")
        if self.used_bytes + adapter.nbytes > self._budget:
            raise AdapterMemoryFull(
                f"adapter {digest} needs {adapter.nbytes} bytes, of {self._budget} only "
                f"{self._budget - self.used_bytes} are free; unload another or raise --adapter-memory"
            )
        resident = _Resident(digest, adapter.to(self._device))
        for site, weights in resident.adapter.site_weights().items():
            self._sites[site].put(slot, weights)
        self._residents[slot] = resident
        self.used_bytes += adapter.nbytes
        return adapter.nbytes

    def unload(self, slot: int) -> int:
        """Empty a slot. Returns the bytes freed: 0 where it was empty."""
        self._check_slot(slot)
        resident = self._residents.pop(slot, None)
        if resident is None:
            return 0
        for site in self._sites:
            site.drop(slot)
        self.used_bytes -= resident.adapter.nbytes
        return resident.adapter.nbytes

    def clear(self) -> None:
        """Empty every slot."""
        for slot in tuple(self._residents):
            self.unload(slot)

    def digest_of(self, slot: int) -> str | None:
        """The digest of the adapter in a slot, if any."""
        resident = self._residents.get(slot)
        return resident.digest if resident is not None else None

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self._slots:
            raise BadPlan(f"there is no slot {slot}; slots are numbered 0 to {self._slots - 1}")
