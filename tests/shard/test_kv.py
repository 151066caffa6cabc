"""The paged cache: what is written at a slot is read through a block table."""

from __future__ import annotations

import torch

from loraplex.shard.kv import KvCache, LayerShape, block_bytes

SHAPES = {0: LayerShape(2, 8, 6), 3: LayerShape(1, 4, 4)}
BLOCK = 4


def cache() -> KvCache:
    return KvCache(SHAPES, blocks=6, block_size=BLOCK, dtype=torch.float32, device=torch.device("cpu"))


def test_a_block_table_reads_what_was_written_to_its_blocks() -> None:
    kv = cache()
    keys, values = torch.randn(7, 2, 8), torch.randn(7, 2, 6)
    table = [5, 2]
    slots = torch.tensor([table[p // BLOCK] * BLOCK + p % BLOCK for p in range(7)])
    kv.write(0, slots, keys, values)
    read_keys, read_values = kv.read(0, torch.tensor(table))
    assert torch.equal(read_keys[:7], keys)
    assert torch.equal(read_values[:7], values)
    assert not read_keys[7:].any()
    both_keys, _ = kv.read(0, torch.tensor([[2, 5], [0, 5]]))
    assert torch.equal(both_keys[0, 4:], keys[:4])
    assert torch.equal(both_keys[1, 4:], keys[:4])
    assert not kv.read(3, torch.tensor(table))[0].any()


def test_a_copied_block_is_equal_in_every_layer() -> None:
    kv = cache()
    for layer, shape in SHAPES.items():
        kv.write(
            layer,
            torch.arange(4, 8),
            torch.randn(4, shape.kv_heads, shape.key_dim),
            torch.randn(4, shape.kv_heads, shape.value_dim),
        )
    kv.copy_block(1, 3)
    for layer in SHAPES:
        for before, after in zip(
            kv.read(layer, torch.tensor([1])), kv.read(layer, torch.tensor([3])), strict=True
        ):
            assert before.any()
            assert torch.equal(before, after)


def test_block_bytes_are_what_a_block_takes() -> None:
    kv = cache()
    assert kv.layers == (0, 3)
    held = sum(tensor.nbytes for store in (kv._keys, kv._values) for tensor in store.values())
    assert block_bytes(SHAPES, BLOCK, torch.float32) * kv.blocks == held
