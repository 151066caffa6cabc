"""The resident pool: which adapter is in which slot of the device, by bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import AdapterMemoryFull, BadPlan, EpochEnded, SlotBusy
from .upload import PlacedAdapter
from .weights import PackedAdapter, SiteWeights


class Site(Protocol):
    """A place in the model that adapters change. It keeps what each slot brings, for its rows."""

    def put(self, slot: int, weights: SiteWeights) -> None:
        """Keep one adapter's weights, of the kind this site takes."""
        ...

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known."""
        ...


@dataclass(slots=True, eq=False)
class Reservation:
    """A slot and bytes that are taken."""

    slot: int
    digest: str
    nbytes: int
    adapter: PackedAdapter | None = None
    """None while it is on its way."""


class AdapterPool:
    """Adapters on the device at their true rank. Called on the device thread only.

    An adapter is loaded in two steps, so that its way to the device, which lies between them, holds up
    nobody: `reserve` takes its slot and bytes, `commit` puts it into the sites. Only `commit` and `unload`
    change what the sites hold.
    """

    def __init__(self, sites: Sequence[Site], *, slots: int, budget: int) -> None:
        """`sites`: the model's, in the order of the layout's numbers, all empty. `budget` in bytes."""
        self._sites = sites
        self._slots = slots
        self._budget = budget
        self._residents: dict[int, Reservation] = {}
        self.used_bytes = 0

    def reserve(self, slot: int, digest: str, nbytes: int) -> Reservation | None:
        """Take an empty slot for an adapter of so many bytes. None where it is resident in that slot already.

        Raises SlotBusy where the slot is taken, AdapterMemoryFull over the budget.
        """
        self._check_slot(slot)
        if (resident := self._residents.get(slot)) is not None:
            if resident.digest == digest and resident.adapter is not None:
                return None
            raise SlotBusy(f"slot {slot} holds adapter {resident.digest}; unload it first")
        if self.used_bytes + nbytes > self._budget:
            raise AdapterMemoryFull(
                f"adapter {digest} needs {nbytes} bytes, of {self._budget} only "
                f"{self._budget - self.used_bytes} are free; unload another or raise --adapter-memory"
            )
        reservation = self._residents[slot] = Reservation(slot, digest, nbytes)
        self.used_bytes += nbytes
        return reservation

    def commit(self, reservation: Reservation, adapter: PlacedAdapter) -> None:
        """Make an adapter resident that now is on the device. Raises EpochEnded where its slot was emptied
        meanwhile."""
        if self._residents.get(reservation.slot) is not reservation:
            raise EpochEnded(f"slot {reservation.slot} was emptied while its adapter was on its way")
        for site, weights in adapter.weights.items():
            self._sites[site].put(reservation.slot, weights)
        reservation.adapter = adapter.packed

    def give_up(self, reservation: Reservation) -> None:
        """Free what is still only reserved; nothing where it is resident or was freed."""
        if reservation.adapter is None and self._residents.get(reservation.slot) is reservation:
            self.unload(reservation.slot)

    def load(self, slot: int, digest: str, adapter: PackedAdapter) -> int:
        """Reserve and commit an adapter that already is on the device. Returns its bytes."""
        reservation = self.reserve(slot, digest, adapter.nbytes)
        if reservation is not None:
            self.commit(reservation, PlacedAdapter.of(adapter))
        return adapter.nbytes

    def unload(self, slot: int) -> int:
        """Empty a slot. Returns the bytes freed: 0 where it was empty."""
        self._check_slot(slot)
        resident = self._residents.pop(slot, None)
        if resident is None:
            return 0
        for site in self._sites:
            site.drop(slot)
        self.used_bytes -= resident.nbytes
        return resident.nbytes

    def clear(self) -> None:
        """Empty every slot."""
        for slot in tuple(self._residents):
            self.unload(slot)

    def digest_of(self, slot: int) -> str | None:
        """The digest of the adapter that is resident in a slot, if any."""
        resident = self._residents.get(slot)
        return None if resident is None or resident.adapter is None else resident.digest

    def are_plain(self, slots: Iterable[int]) -> bool:
        """Whether the operators alone apply what is in these slots."""
        adapters = (self._residents[slot].adapter for slot in slots if slot in self._residents)
        return all(adapter.is_plain for adapter in adapters if adapter is not None)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self._slots:
            raise BadPlan(f"there is no slot {slot}; slots are numbered 0 to {self._slots - 1}")
