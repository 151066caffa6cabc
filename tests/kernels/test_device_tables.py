"""Tables that kernels read: what the device holds after a flush is what the mapping holds."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from loraplex.kernels.device_tables import PARTS, RECORD_BYTES, DeviceTable, TableArena
from loraplex.kernels.ops import EmbeddingLora, LoraPart, LoraWeights

from .conftest import MakeAdapter

CPU = torch.device("cpu")


PART = np.dtype(
    [
        *((name, "u8") for name in ("b", "scale", "shift")),
        *((name, "i4") for name in ("rank_offset", "rank", "out_offset", "width")),
    ]
)
ADAPTER = np.dtype([("a", "u8"), ("a_rows", "i4"), ("parts", "i4"), ("part", PART, PARTS)])


def read(table: DeviceTable, key: int) -> np.void:
    """The record that a kernel finds for a key, by the addresses that it is given."""
    slot, share = divmod(key, table.shares)
    address = table.address + slot * table.arena.stride + share * RECORD_BYTES
    record = (ctypes.c_uint8 * RECORD_BYTES).from_address(address)
    return np.frombuffer(record, ADAPTER)[0]  # type: ignore[no-any-return]


def test_a_record_holds_an_adapters_addresses_and_shapes(make_adapter: MakeAdapter) -> None:
    arena = TableArena(CPU)
    other, table = DeviceTable(arena, 1, is_vectored=True), DeviceTable(arena, 1, is_vectored=True)
    adapter = make_adapter([4, 0, 9], 16, (8, 16, 24), torch.bfloat16, scale=True)
    table[5] = adapter
    arena.flush()
    record = read(table, 5)
    assert (record["a"], record["a_rows"], record["parts"]) == (adapter.a.data_ptr(), 13, 3)
    for got, part in zip(record["part"], adapter.parts, strict=False):
        assert part.scale is not None
        assert (got["b"], got["scale"], got["shift"]) == (part.b.data_ptr(), part.scale.data_ptr(), 0)
        assert (got["rank_offset"], got["rank"]) == (part.rank_offset, len(part.b))
        assert (got["out_offset"], got["width"]) == (part.out_offset, part.b.shape[1])
    assert read(other, 5)["parts"] == 0
    assert arena.stacked_rank(5) == 13
    assert arena.stacked_rank(4) == arena.stacked_rank(1000) == 0


def test_changes_reach_the_device_with_the_next_flush(make_adapter: MakeAdapter) -> None:
    arena = TableArena(CPU)
    table = DeviceTable(arena, 1, is_vectored=True)
    table[0] = make_adapter([4], 16, (8,))
    arena.flush()
    table[3] = make_adapter([8], 16, (8,))
    assert read(table, 3)["a_rows"] == 0
    arena.flush()
    assert read(table, 3)["a_rows"] == 8
    del table[3]
    arena.flush()
    assert read(table, 3)["a_rows"] == read(table, 3)["a"] == 0
    assert read(table, 0)["a_rows"] == 4
    assert dict(table).keys() == {0}


def test_a_fixed_arena_keeps_its_address_and_does_not_grow(make_adapter: MakeAdapter) -> None:
    arena = TableArena(CPU)
    table = DeviceTable(arena, 1, is_vectored=True)
    table[1] = make_adapter([4], 16, (8,))
    arena.fix(16)
    address = arena.address
    table[15] = make_adapter([2], 16, (8,))
    arena.flush()
    assert arena.address == address
    assert read(table, 15)["a_rows"] == 2
    with pytest.raises(RuntimeError, match="cannot grow"):
        table[16] = make_adapter([2], 16, (8,))
    with pytest.raises(RuntimeError, match="cannot grow"):
        DeviceTable(arena, 1, is_vectored=True)


def test_shares_lie_side_by_side(make_adapter: MakeAdapter) -> None:
    arena = TableArena(CPU)
    table = DeviceTable(arena, 5, is_vectored=True)
    for key in (0, 4, 7):
        table[key] = make_adapter([key + 1], 16, (8,))
    arena.flush()
    assert [read(table, key)["a_rows"] for key in range(10)] == [1, 0, 0, 0, 5, 0, 0, 8, 0, 0]
    assert arena.stacked_rank(1) == 8


def test_an_embedding_has_one_part_and_its_vocabulary() -> None:
    arena = TableArena(CPU)
    table = DeviceTable(arena, 1, is_vectored=False)
    adapter = EmbeddingLora(torch.randn(30, 3), torch.randn(3, 7), torch.ones(7))
    table[2] = adapter
    arena.flush()
    record = read(table, 2)
    assert (record["a_rows"], record["parts"]) == (30, 1)
    assert record["part"][0]["scale"] == adapter.scale.data_ptr()  # type: ignore[union-attr]
    assert (record["part"][0]["rank"], record["part"][0]["width"]) == (3, 7)


def test_what_kernels_cannot_read_is_refused(make_adapter: MakeAdapter) -> None:
    table = DeviceTable(TableArena(CPU), 1, is_vectored=True)
    part = LoraPart(0, 0, torch.randn(2, 8))
    with pytest.raises(ValueError, match=f"{PARTS} are served"):
        table[0] = LoraWeights(torch.randn(2, 16), (part,) * (PARTS + 1))
    with pytest.raises(ValueError, match="multiples of 8"):
        table[0] = make_adapter([2], 16, (12,))
    with pytest.raises(ValueError, match="16-byte"):
        table[0] = LoraWeights(torch.randn(65)[1:].view(4, 16), (LoraPart(0, 0, torch.randn(4, 8)),))
    assert len(table) == 0
    table[0] = make_adapter([2], 16, (8,), torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        table[1] = make_adapter([2], 16, (8,), torch.float16)
    with pytest.raises(ValueError, match="float32"):
        table.check(torch.float32)
