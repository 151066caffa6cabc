"""Tables of adapters that kernels read: mappings on the host, mirrored slot by slot in device memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch

from .ops import EmbeddingLora, LoraPart, LoraWeights

PARTS = 4
"""Linears of one site that an adapter can change at most."""
VECTOR = 8
"""Half-precision values in 16 bytes, what kernels read at once."""

_HEAD, _PART = "=Qii", "QQQiiii"
RECORD_BYTES = struct.calcsize(_HEAD + PARTS * _PART)
"""Of one `Adapter` in lora_tables.cuh."""
_FORMATS = tuple(struct.Struct(_HEAD + parts * _PART) for parts in range(PARTS + 1))
"""Of a record with so many parts, up to its last."""

_EMPTY = bytes(RECORD_BYTES)


class TableArena:
    """Records [slots, places] on the host and the device: a load or an unload changes one line.

    Grows as tables and slots are added, until it is fixed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = np.zeros((0, 0, RECORD_BYTES), np.uint8)
        self._stacked = np.zeros((0, 0), np.int32)
        """Rows of A at each place."""
        self._most: list[int] = []
        """Of each slot, over its places."""
        self._mirror: torch.Tensor | None = None
        self._dirty: set[int] = set()
        self._is_fixed = False
        self.version = 0
        """Another one after every change."""

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        return self._host.shape[1] * RECORD_BYTES

    @property
    def address(self) -> int:
        """Of the first record on the device, valid until the arena grows."""
        assert self._mirror is not None
        return self._mirror.data_ptr()

    def add_places(self, count: int) -> int:
        """Room for `count` more records in every slot; answers the first one's place."""
        first = self._host.shape[1]
        self._grow(self._host.shape[0], first + count)
        return first

    def cover(self, slots: int) -> None:
        """Have a line for each of so many slots: a kernel reads the line of every slot that a row names."""
        if slots > self._host.shape[0]:
            self._grow(max(8, 2 * slots), self._host.shape[1])

    def write(self, slot: int, place: int, record: bytes, stacked_rank: int) -> None:
        """Change one record; the device has it after the next `flush`. `stacked_rank`: rows of its A."""
        self.cover(slot + 1)
        self._host[slot, place].data[:] = record
        before, most = self._stacked[slot, place], self._most[slot]
        self._stacked[slot, place] = stacked_rank
        if stacked_rank >= most:
            self._most[slot] = stacked_rank
        elif before == most:
            self._most[slot] = int(self._stacked[slot].max())
        self.version += 1
        self._dirty.add(slot)

    def stacked_rank(self, slot: int) -> int:
        """The most rows that A has at any place of a slot."""
        return self._most[slot] if slot < len(self._most) else 0

    def flush(self) -> None:
        """Bring the device up to date, in the order of the current stream."""
        if self._mirror is None:
            slots = len(self._host)
            size = max(1, self._host.size)
            self._mirror = torch.zeros(size, dtype=torch.uint8, device=self._device)
            self._dirty = set(range(slots))
        for slot in self._dirty:
            line = torch.from_numpy(self._host[slot].reshape(-1))
            self._mirror[slot * self.stride : (slot + 1) * self.stride].copy_(line)
        self._dirty.clear()

    def fix(self, slots: int) -> None:
        """Make room for `slots` slots and keep the address from now on, as captured graphs need."""
        self._grow(max(slots, self._host.shape[0]), self._host.shape[1])
        self._is_fixed = True
        self.flush()

    def _grow(self, slots: int, places: int) -> None:
        old_slots, old_places = self._stacked.shape
        if (slots, places) == (old_slots, old_places):
            return
        if self._is_fixed:
            raise RuntimeError("captured graphs read this table where it is: it cannot grow any more")
        host, stacked = np.zeros((slots, places, RECORD_BYTES), np.uint8), np.zeros((slots, places), np.int32)
        host[:old_slots, :old_places] = self._host
        stacked[:old_slots, :old_places] = self._stacked
        self._host, self._stacked, self._mirror = host, stacked, None
        self._most += [0] * (slots - old_slots)
        self.version += 1


class DeviceTable(MutableMapping[int, Any]):
    """One site's or embedding's slots. `shares` as in `LoraOps.site_table`."""

    def __init__(self, arena: TableArena, shares: int, *, is_vectored: bool) -> None:
        """`is_vectored`: the site's linears begin and end at whole vectors, and so must adapters' parts."""
        self.arena = arena
        self.shares = shares
        self.is_vectored = is_vectored
        self._place = arena.add_places(shares)
        self._weights: dict[int, LoraWeights | EmbeddingLora] = {}
        self._dtype: torch.dtype | None = None

    @property
    def address(self) -> int:
        """Of the first slot's first share on the device."""
        return self.arena.address + self._place * RECORD_BYTES

    def check(self, dtype: torch.dtype) -> None:
        """Raises ValueError unless what is resident can be applied to values of this dtype."""
        if self._dtype not in (None, dtype):
            raise ValueError(f"adapters in {self._dtype} cannot be applied to {dtype}")

    def __getitem__(self, key: int) -> Any:
        return self._weights[key]

    def __setitem__(self, key: int, weights: LoraWeights | EmbeddingLora) -> None:
        parts, dtype = _parts_of(weights), weights.a.dtype
        if self.is_vectored:
            _check_vectors(weights.a, parts)
        if dtype != self._dtype:
            if self._weights.keys() - {key}:
                self.check(dtype)
            self._dtype = dtype
        slot, share = divmod(key, self.shares)
        self.arena.write(slot, self._place + share, _record(weights.a, parts), weights.a.shape[0])
        self._weights[key] = weights

    def __delitem__(self, key: int) -> None:
        del self._weights[key]
        slot, share = divmod(key, self.shares)
        self.arena.write(slot, self._place + share, _EMPTY, 0)

    def __iter__(self) -> Iterator[int]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class LoraTables:
    """Every table of one model's adapters, in the arenas that kernels read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sites = TableArena(device)
        self._embeddings = TableArena(device)
        self._arenas = [self._sites, self._embeddings]

    def site_table(self, widths: Sequence[int], shares: int, *, vector: int = 1) -> DeviceTable:
        """As `LoraOps.site_table`. Tables of several shares are apart: steps with them are not captured.

        `vector`: values that kernels read at once where all of a site's linears begin and end at multiples.
        """
        arena = self._sites
        if shares > 1:
            arena = TableArena(self._device)
            self._arenas.append(arena)
        is_vectored = vector > 1 and all(width % vector == 0 for width in widths)
        return DeviceTable(arena, shares, is_vectored=is_vectored)

    def embedding_table(self) -> DeviceTable:
        return DeviceTable(self._embeddings, 1, is_vectored=False)

    def update(self, slots: int) -> None:
        """Bring what kernels read up to date, with a line for each of so many slots."""
        for arena in self._arenas:
            arena.cover(slots)
            arena.flush()

    def fix(self, slots: int) -> None:
        """Keep every address from now on, as captured graphs need; see `TableArena.fix`."""
        self._sites.fix(slots)
        self._embeddings.fix(slots)

    def stacked_rank(self, slot: int) -> int:
        """The most rows that A has at any one site of a slot."""
        return max(arena.stacked_rank(slot) for arena in self._arenas)

    @property
    def versions(self) -> list[int]:
        """Other ones after every change."""
        return [arena.version for arena in self._arenas]


def _parts_of(weights: LoraWeights | EmbeddingLora) -> tuple[LoraPart, ...]:
    parts = weights.parts if isinstance(weights, LoraWeights) else (LoraPart(0, 0, weights.b, weights.scale),)
    if len(parts) > PARTS:
        raise ValueError(f"an adapter with {len(parts)} parts at one site; {PARTS} are served")
    return parts


def _record(a: torch.Tensor, parts: tuple[LoraPart, ...]) -> bytes:
    """Addresses and shapes of an adapter; the tensors must live as long as the record is read."""
    numbers = [a.data_ptr(), a.shape[0], len(parts)]
    for part in parts:
        rank, width = part.b.shape
        numbers += (part.b.data_ptr(), _address(part.scale), _address(part.shift))
        numbers += (part.rank_offset, rank, part.out_offset, width)
    return _FORMATS[len(parts)].pack(*numbers).ljust(RECORD_BYTES, b"\0")


def _address(vector: torch.Tensor | None) -> int:
    return 0 if vector is None else vector.data_ptr()


def _check_vectors(a: torch.Tensor, parts: tuple[LoraPart, ...]) -> None:
    addresses = a.data_ptr()
    for part in parts:
        if part.out_offset % VECTOR or part.b.shape[1] % VECTOR:
            raise ValueError(f"an adapter's parts must begin and end at multiples of {VECTOR} columns here")
        addresses |= part.b.data_ptr()
    if addresses % 16:
        raise ValueError("an adapter's A and B must begin at 16-byte boundaries")
