"""DoRA's norms by parts: what ranks bring together is what one process computes of the whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loraplex.shard.adapters.assemble import assemble
from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.changes import LinearChange, ParsedAdapter, Placed, Traits
from loraplex.shard.adapters.families.lora_dora import divided_change, magnitude_scale
from loraplex.shard.adapters.layout import Target
from loraplex.shard.adapters.norms import KEPT, GroupNorms
from loraplex.shard.adapters.share import Axis, Share
from loraplex.shard.adapters.weights import LinearWeights, PackedAdapter, read_packed
from loraplex.shard.errors import AdapterFetchFailed, AdapterRejected, RanksLost

from .layouts import held

IN, OUT, RANK = 10, 6, 3
HALVES = (Axis(IN, ((0, 4),)), Axis(IN, ((4, IN),)))
NAME = "model.layers.0.mlp.down_proj"
WHOLE = Target(NAME, 0, IN, OUT, 0, has_bias=True)


class Shelf:
    """`Board` in this process."""

    def __init__(self, patience: float = 30.0) -> None:
        self.values: dict[str, bytes] = {}
        self._patience = patience
        self._changed = threading.Condition()

    def post(self, key: str, value: bytes) -> None:
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def read(self, key: str) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, self._patience):
                raise RanksLost(f"nobody posts {key}")
            return self.values[key]

    def remove(self, key: str) -> None:
        with self._changed:
            del self.values[key]


class Dora:
    """One adapter's tensors at one linear of one base."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.weight = random.standard_normal((OUT, IN), np.float32)
        self.bias = random.standard_normal(OUT, np.float32)
        self.a = random.standard_normal((RANK, IN), np.float32)
        self.b = random.standard_normal((OUT, RANK), np.float32)
        self.magnitude = 1 + random.random(OUT, np.float32)
        self.own_bias = random.standard_normal(OUT, np.float32)

    def whole(self) -> LinearChange:
        scale = magnitude_scale(self.magnitude, self.weight, self.a, self.b)
        return LinearChange(self.a, scale[:, None] * self.b, scale, self.own_bias - scale * self.bias)

    def part(self, rank: int, folder: Path, dtype: str = "float32") -> PackedAdapter:
        """What one of two ranks packs."""
        target = replace(WHOLE, share=Share(inputs=HALVES[rank], adds_bias=rank == 0))
        columns = HALVES[rank].positions(IN)
        base = BaseTensors(
            {f"{NAME}.bias": lambda: torch.from_numpy(self.bias)},
            {f"{NAME}.weight": lambda: torch.from_numpy(self.weight[:, columns])},
        )
        change = divided_change(target, base, self.a, self.b, self.magnitude, self.own_bias)
        return pack(target, change, folder / f"{rank}", dtype)


def pack(target: Target, change: LinearChange, path: Path, dtype: str) -> PackedAdapter:
    adapter = ParsedAdapter((Placed(target, RANK, lambda: change),), Traits(kind="LORA"))
    with path.open("wb") as file:
        index = assemble(adapter, file, dtype)
    return read_packed(path, index, pin=False)


def complete(parts: Sequence[PackedAdapter], board: Shelf, digest: str = "d") -> list[PackedAdapter]:
    """By ranks that do so at the same time."""

    async def together() -> list[PackedAdapter]:
        ranks = [GroupNorms(rank, len(parts), board) for rank in range(len(parts))]
        pairs = zip(ranks, parts, strict=True)
        return await asyncio.gather(*(rank.complete(digest, part) for rank, part in pairs))

    return asyncio.run(together())


def linear(adapter: PackedAdapter) -> LinearWeights:
    weights = adapter.site_weights()[0]
    assert isinstance(weights, LinearWeights)
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2.0**-7)])
def test_ranks_have_the_scale_of_the_whole(dtype: str, tolerance: float, tmp_path: Path) -> None:
    dora = Dora()
    want = linear(pack(WHOLE, dora.whole(), tmp_path / "whole", dtype)).lora
    first, second = (
        linear(part).lora for part in complete([dora.part(rank, tmp_path, dtype) for rank in (0, 1)], Shelf())
    )
    assert want is not None
    assert first is not None
    assert second is not None
    assert torch.equal(torch.cat([first.a, second.a], dim=1), want.a)
    for part in (first.parts[0], second.parts[0]):
        torch.testing.assert_close(part.b, want.parts[0].b, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(part.scale, want.parts[0].scale, rtol=1e-6, atol=1e-6)
    assert torch.equal(first.parts[0].b, second.parts[0].b)
    torch.testing.assert_close(first.parts[0].shift, want.parts[0].shift, rtol=1e-5, atol=1e-5)
    assert second.parts[0].shift is None


def test_what_is_not_complete_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not complete"):
        Dora().part(0, tmp_path).site_weights()


def test_a_rank_that_lost_its_own_gets_the_others_squares_again(tmp_path: Path) -> None:
    dora, board = Dora(), Shelf()
    first, _ = complete([dora.part(rank, tmp_path) for rank in (0, 1)], board)
    before = linear(first).lora
    board.values.clear()
    again, second = complete([first, dora.part(1, tmp_path)], board)
    assert again is first
    assert before is not None
    assert torch.equal(linear(again).lora.parts[0].b, before.parts[0].b)  # type: ignore[union-attr]
    assert torch.equal(linear(second).lora.parts[0].b, before.parts[0].b)  # type: ignore[union-attr]


def test_adapters_without_norms_ask_nobody(tmp_path: Path) -> None:
    board = Shelf()
    plain = pack(WHOLE, Dora().whole(), tmp_path / "plain", "float32")
    assert complete([plain, plain], board) == [plain, plain]
    assert board.values == {}


def test_a_rank_that_brings_nothing_is_told_of(tmp_path: Path) -> None:
    part = Dora().part(0, tmp_path)
    with pytest.raises(RanksLost, match="norms of d on rank 1"):
        asyncio.run(GroupNorms(0, 2, Shelf(patience=0.05)).complete("d", part))
    assert all(one.scale is None for one in part.index.linears[0].parts)


def test_ranks_of_different_models_are_told_apart(tmp_path: Path) -> None:
    board = Shelf()
    board.post("norms of d on rank 1", bytes(4 * (OUT + 1)))
    with pytest.raises(AdapterFetchFailed, match=r"rank 1 has norms of 7 rows of adapter d, rank 0 of 6"):
        asyncio.run(GroupNorms(0, 2, board).complete("d", Dora().part(0, tmp_path)))


def test_a_row_without_length_is_refused_by_every_rank(tmp_path: Path) -> None:
    dora = Dora()
    dora.weight[2], dora.b[2] = 0, 0
    parts, board = [dora.part(rank, tmp_path) for rank in (0, 1)], Shelf()
    before = parts[0].buffer.clone()
    for rank in (1, 0):
        board.post(f"norms of d on rank {rank}", squares_of(parts[rank]))
    for rank in (0, 1):
        with pytest.raises(AdapterRejected, match="no length"):
            asyncio.run(GroupNorms(rank, 2, board).complete("d", parts[rank]))
    assert torch.equal(parts[0].buffer, before)


def squares_of(part: PackedAdapter) -> bytes:
    """What its rank posts."""
    board = Shelf(patience=0.0)
    with pytest.raises(RanksLost):
        asyncio.run(GroupNorms(0, 2, board).complete("d", part))
    return board.values["norms of d on rank 0"]


def test_squares_do_not_pile_up(tmp_path: Path) -> None:
    board = Shelf()
    ready = complete([Dora().part(rank, tmp_path) for rank in (0, 1)], board)[0]
    rank = GroupNorms(0, 2, board)

    async def load_many() -> None:
        for number in (*range(KEPT + 3), KEPT):
            await rank.complete(str(number), ready)

    asyncio.run(load_many())
    left = {key for key in board.values if not key.startswith("norms of d ")}
    assert left == {f"norms of {number} on rank 0" for number in range(3, KEPT + 3)}


def test_a_base_without_other_ranks_holds_the_whole() -> None:
    weight = torch.randn(2, 3)
    base = held({"linear.weight": weight})
    assert np.array_equal(base.read_held("linear.weight"), weight.numpy())
