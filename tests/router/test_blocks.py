"""Block accounting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.router.blocks import BlockPool


def test_block_zero_is_nobodys() -> None:
    pool = BlockPool(5, 16)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.free_count, pool.used_count, pool.total) == (0, 4, 4)


def test_more_than_there_is_is_refused_whole() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(2)
    with pytest.raises(ValueError, match="2 blocks asked for, 1 are free"):
        pool.allocate(2)
    assert pool.free_count == 1


@pytest.mark.parametrize("block", [0, 1, 9])
def test_a_block_not_in_use_cannot_be_freed(block: int) -> None:
    with pytest.raises(ValueError, match="not in use"):
        BlockPool(4, 16).free([block])


def test_a_pool_needs_room() -> None:
    with pytest.raises(ValueError, match="two blocks"):
        BlockPool(1, 16)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert BlockPool(9, 16).blocks_for(tokens) == blocks


@given(st.lists(st.integers(0, 6)))
def test_free_and_used_are_always_the_whole(sizes: list[int]) -> None:
    pool = BlockPool(12, 4)
    held: list[list[int]] = []
    for size in sizes:
        if size <= pool.free_count:
            held.append(pool.allocate(size))
        elif held:
            pool.free(held.pop(0))
        pool.check()
        taken = [block for blocks in held for block in blocks]
        assert len(set(taken)) == len(taken) == pool.used_count


def test_the_check_notices_a_lost_block() -> None:
    pool = BlockPool(4, 4)
    pool._free.pop()
    with pytest.raises(RuntimeError, match="of 3 blocks 2 are free"):
        pool.check()
