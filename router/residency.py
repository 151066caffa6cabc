"""Which adapters one shard group holds on its device, in which slots, and who uses them."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Place(enum.Enum):
    LOADING = "loading"
    RESIDENT = "resident"
    UNLOADING = "unloading"


@dataclass(slots=True, eq=False)
class Resident:
    """One adapter in one slot. `references` counts sequences whose row a plan in flight may name."""

    key: str
    slot: int
    bytes: int
    place: Place = Place.LOADING
    references: int = 0
    last_used: float = 0.0


class Residency:
    """Slots and bytes of one group's adapter pool. A slot changes only while nobody refers to it."""

    def __init__(self, slots: int, budget: int) -> None:
        self.slots = slots
        self.budget = budget
        self.free_bytes = budget
        self._free_slots = list(range(slots - 1, -1, -1))
        self._entries: dict[str, Resident] = {}

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def get(self, key: str) -> Resident | None:
        return self._entries.get(key)

    def entries(self) -> Iterable[Resident]:
        return self._entries.values()

    def ready(self, keys: Iterable[str]) -> bool:
        """Every one of these adapters is resident."""
        entries = self._entries
        for key in keys:
            entry = entries.get(key)
            if entry is None or entry.place is not Place.RESIDENT:
                return False
        return True

    def slot(self, key: str) -> int:
        return self._entries[key].slot

    def begin_load(self, key: str, size: int) -> int:
        """Reserve a slot and bytes; answers the slot. ValueError without room, or if it has one already."""
        if key in self._entries or not self._free_slots or size > self.free_bytes:
            raise ValueError(f"no room to load adapter {key}")
        slot = self._free_slots.pop()
        self._entries[key] = Resident(key, slot, size)
        self.free_bytes -= size
        return slot

    def loaded(self, key: str, size: int, now: float) -> None:
        """The shard answered: resident from here on, with the bytes it says."""
        entry = self._entries[key]
        self.free_bytes -= size - entry.bytes
        entry.bytes, entry.place, entry.last_used = size, Place.RESIDENT, now

    def begin_unload(self, key: str) -> int:
        """No plan may name it any more; answers the slot. ValueError while it is in use."""
        entry = self._entries[key]
        if entry.place is not Place.RESIDENT or entry.references:
            raise ValueError(f"adapter {key} is {entry.place.value} with {entry.references} references")
        entry.place = Place.UNLOADING
        return entry.slot

    def remove(self, key: str) -> int:
        """The slot is empty again, after an unload or a failed load; answers the bytes it held."""
        entry = self._entries.pop(key)
        self._free_slots.append(entry.slot)
        self.free_bytes += entry.bytes
        return entry.bytes

    def acquire(self, keys: Iterable[str], now: float) -> None:
        for key in keys:
            entry = self._entries[key]
            entry.references += 1
            entry.last_used = now

    def release(self, keys: Iterable[str], now: float) -> None:
        for key in keys:
            entry = self._entries[key]
            if entry.references == 0:
                raise ValueError(f"adapter {key} has no reference to release")
            entry.references -= 1
            entry.last_used = now
