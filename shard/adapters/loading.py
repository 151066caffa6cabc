"""Making adapters resident while steps go on: the device thread sees to their slots and tables only."""

from __future__ import annotations

import asyncio

from ..device import DeviceThread
from .pool import AdapterPool, Reservation
from .upload import PlacedAdapter, Uploader
from .weights import PackedAdapter


class AdapterLoading:
    """Loads and unloads, from the service's loop."""

    def __init__(self, thread: DeviceThread, pool: AdapterPool, uploader: Uploader) -> None:
        self._thread = thread
        self._pool = pool
        self._uploader = uploader

    async def load(self, slot: int, digest: str, packed: PackedAdapter) -> None:
        """Make an adapter resident in an empty slot. Where that fails the slot is empty again.

        Raises what `AdapterPool.reserve` and `AdapterPool.commit` raise.
        """
        taken: list[Reservation] = []
        """Known on the device thread, whatever becomes of the caller who waits."""

        def reserve() -> Reservation | None:
            reservation = self._pool.reserve(slot, digest, packed.nbytes)
            if reservation is not None:
                taken.append(reservation)
            return reservation

        def give_up() -> None:
            for reservation in taken:
                self._pool.give_up(reservation)

        try:
            reservation = await self._thread.submit(reserve)
            if reservation is not None:
                placed = await asyncio.to_thread(self._uploader.upload, packed)
                await self._thread.submit(lambda: self._commit(reservation, placed))
        finally:
            self._thread.submit(give_up)

    def _commit(self, reservation: Reservation, placed: PlacedAdapter) -> None:
        self._uploader.hand_over(placed)
        self._pool.commit(reservation, placed)

    async def unload(self, slot: int) -> int:
        """Empty a slot. Returns the bytes freed."""
        return await self._thread.submit(lambda: self._pool.unload(slot))

    async def clear(self) -> None:
        """Empty every slot, also those whose adapters are still on their way."""
        await self._thread.submit(self._pool.clear)
