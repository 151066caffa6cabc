"""Paged attention against one plain softmax over each row's whole context."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraplex.proto import shard_pb2 as pb
from loraplex.shard.attention import PagedAttention
from loraplex.shard.batch import Batch, build_batch
from loraplex.shard.errors import ModelRefused
from loraplex.shard.kv import KvCache, LayerShape
from loraplex.shard.rows import Row, RowTable

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 4
CPU = torch.device("cpu")


def by_torch(kv: KvCache) -> PagedAttention:
    return PagedAttention(kv)


def by_extension(kv: KvCache) -> PagedAttention:
    pytest.importorskip("loraplex.kernels._native")
    from loraplex.kernels.native_decoder import NativeDecoderOps
    from loraplex.shard.attention_native import NativeAttention

    return NativeAttention(kv, NativeDecoderOps())


FORMS = {
    "torch": (by_torch, 6),
    "extension": (by_extension, 8),
    "extension, values of another size": (by_extension, 6),
}
"""Who attends, and the size of a value."""


@pytest.fixture(params=FORMS, autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    make, value_dim = FORMS[request.param]
    monkeypatch.setattr(Paged, "make", staticmethod(make), raising=False)
    monkeypatch.setattr(Paged, "value_dim", value_dim, raising=False)


class Paged:
    """Rows whose queries, keys and values are known for every position, run step by step."""

    make: Callable[[KvCache], PagedAttention]
    value_dim: int

    def __init__(self, contexts: dict[int, int], *, shuffled: bool = True) -> None:
        generator = torch.Generator().manual_seed(7)
        self.kv = KvCache(
            {0: LayerShape(KV_HEADS, DIM, self.value_dim)},
            blocks=64,
            block_size=BLOCK,
            dtype=torch.float32,
            device=CPU,
        )
        self.attention = self.make(self.kv)
        self.rows = RowTable(16, 63)
        order = torch.randperm(63, generator=generator).add(1).tolist() if shuffled else list(range(1, 64))
        self.q: dict[int, torch.Tensor] = {}
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}
        for row_id, length in contexts.items():
            row = Row.from_proto(pb.RowStart(row=row_id, prompt_length=length))
            self.rows.start(row)
            self.rows.extend(row_id, [order.pop() for _ in range(-(-length // BLOCK))])
            self.q[row_id] = torch.randn(length, HEADS, DIM, generator=generator)
            self.k[row_id] = torch.randn(length, KV_HEADS, DIM, generator=generator)
            self.v[row_id] = torch.randn(length, KV_HEADS, self.value_dim, generator=generator)

    def step(self, chunks: dict[int, int], decode: list[int], **options: Any) -> tuple[Batch, torch.Tensor]:
        """Run chunks of these lengths and decode these rows; returns the output [T, heads, value]."""
        plan = pb.StepPlan(decode_rows=decode)
        for row_id in decode:
            self.rows[row_id].tokens.append(0)
        for row_id, length in chunks.items():
            plan.chunks.add(row=row_id, start=len(self.rows[row_id].tokens), tokens=[0] * length)
        batch = build_batch(plan, self.rows, block_size=BLOCK)
        owner = [(r, int(p)) for r, p in zip(self._owners(plan), batch.positions, strict=True)]
        gather = lambda store: torch.stack([store[r][p] for r, p in owner])  # noqa: E731
        self.attention.begin(batch)
        out, _ = self.attention.forward(
            SimpleNamespace(layer_idx=0),  # type: ignore[arg-type]
            gather(self.q).transpose(0, 1)[None],
            gather(self.k).transpose(0, 1)[None],
            gather(self.v).transpose(0, 1)[None],
            None,
            **options,
        )
        self.owner = owner
        return batch, out[0]

    @staticmethod
    def _owners(plan: pb.StepPlan) -> list[int]:
        return [*plan.decode_rows, *(chunk.row for chunk in plan.chunks for _ in chunk.tokens)]

    def expected(self, *, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        lines = []
        for row, position in self.owner:
            first = 0 if window is None else max(0, position - window + 1)
            keys = self.k[row][first : position + 1].repeat_interleave(HEADS // KV_HEADS, dim=1)
            values = self.v[row][first : position + 1].repeat_interleave(HEADS // KV_HEADS, dim=1)
            scores = torch.einsum("hd,nhd->hn", self.q[row][position], keys) / DIM**0.5
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            lines.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values))
        return torch.stack(lines)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunks_and_decode_rows_in_one_step(window: int | None, softcap: float | None) -> None:
    paged = Paged({0: 13, 1: 30, 2: 5, 3: 9})
    options = {"sliding_window": window, "softcap": softcap}
    paged.step({0: 9, 1: 11}, [], **options)
    torch.testing.assert_close(
        paged.step({2: 4, 1: 6}, [0], **options)[1], paged.expected(window=window, softcap=softcap)
    )
    torch.testing.assert_close(
        paged.step({3: 9, 1: 13}, [0, 2], **options)[1], paged.expected(window=window, softcap=softcap)
    )


def test_scale_is_the_models_own() -> None:
    paged = Paged({0: 6})
    out = paged.step({0: 6}, [], scaling=DIM**-0.5)[1]
    torch.testing.assert_close(out, paged.expected())
    other = Paged({0: 6}).step({0: 6}, [], scaling=1.0)[1]
    assert (out - other).abs().max() > 0.01


def test_padding_of_a_neighbour_changes_nothing() -> None:
    """A row's output is the same beside a row many blocks longer."""
    alone, together = Paged({0: 4}), Paged({0: 4, 1: 60})
    for paged in (alone, together):
        paged.step({0: 3}, [])
    together.step({1: 59}, [])
    single = alone.step({}, [0])[1]
    both = together.step({}, [0, 1])[1]
    torch.testing.assert_close(both[:1], single, rtol=1e-6, atol=1e-6)


def test_unknown_arguments_are_refused_and_outputs_asked_for_are_not() -> None:
    paged = Paged({0: 4})
    with pytest.raises(ModelRefused, match="position_bias"):
        paged.step({0: 2}, [], position_bias=torch.zeros(1))
    Paged({0: 4}).step({0: 2}, [], output_attentions=False, dropout=0.0, position_bias=None)
