"""Any adapters, in any batch: the CPU backend equals the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import EmbeddingLora, Entries, LoraPart, LoraWeights, route
from loraplex.kernels.reference import reference_embedding, reference_lora

SLOTS = 6
DTYPES = (torch.float32, torch.bfloat16)

weights = st.sampled_from([1.0, 0.3, -0.7, 0.0, 2.5])
batches = st.lists(
    st.lists(st.tuples(st.integers(0, SLOTS), weights), max_size=3).map(tuple), min_size=1, max_size=40
)
"""Entry lists of rows. The last slot is known to no table."""


@dataclass(frozen=True)
class PartShape:
    """What an adapter has at one linear; None where it leaves the linear alone."""

    rank: int
    scale: bool
    shift: bool


part_shapes = st.none() | st.builds(
    PartShape, st.sampled_from([0, 1, 2, 3, 8, 17, 64]), st.booleans(), st.booleans()
)


@st.composite
def sites(draw: st.DrawFn) -> tuple[int, list[int], list[list[PartShape | None]]]:
    """(in, outputs of the linears, what each slot's adapter has at each linear)."""
    widths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    shapes = st.lists(part_shapes, min_size=len(widths), max_size=len(widths))
    return draw(st.integers(1, 32)), widths, draw(st.lists(shapes, min_size=1, max_size=SLOTS))


def random_adapter(
    in_features: int, widths: list[int], shapes: list[PartShape | None], dtype: torch.dtype
) -> LoraWeights:
    parts = []
    rank_offset = out_offset = 0
    for width, shape in zip(widths, shapes, strict=True):
        if shape is not None:
            parts.append(
                LoraPart(
                    rank_offset,
                    out_offset,
                    (torch.randn(shape.rank, width) / max(shape.rank, 1) ** 0.5).to(dtype),
                    1 + torch.randn(width) / 4 if shape.scale else None,
                    torch.randn(width) if shape.shift else None,
                )
            )
            rank_offset += shape.rank
        out_offset += width
    a = torch.randn(rank_offset, in_features) / in_features**0.5
    return LoraWeights(a.to(dtype), tuple(parts))


def assert_equals(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within one rounding to the result's dtype, and 1e-5 of the largest value."""
    rounding = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
    excess = (got.double() - want).abs() - rounding * want.abs()
    assert excess.max() <= 1e-5 * want.abs().max().clamp_min(1e-3)


@settings(max_examples=150, deadline=None)
@given(site=sites(), rows=batches, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_any_adapters_at_any_site(
    site: tuple[int, list[int], list[list[PartShape | None]]],
    rows: list[Entries],
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    in_features, widths, adapters = site
    table = {slot: random_adapter(in_features, widths, shapes, dtype) for slot, shapes in enumerate(adapters)}
    y = torch.randn(len(rows), sum(widths)).to(dtype)
    x = torch.randn(len(rows), in_features).to(dtype)
    want = reference_lora(y, x, rows, table)
    CpuLoraOps().start_lora(x, route(rows), table).add_to(y)
    assert_equals(y, want)


@settings(max_examples=100, deadline=None)
@given(
    hidden=st.integers(1, 24),
    adapters=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 5, 16]), st.booleans()),
        min_size=1,
        max_size=SLOTS,
    ),
    rows=batches,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_adapters_at_the_embedding(
    hidden: int,
    adapters: list[tuple[int, int, bool]],
    rows: list[Entries],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """`adapters`: (vocabulary, rank, whether it has a scale) of each slot."""
    torch.manual_seed(seed)
    table = {}
    for slot, (vocabulary, rank, has_scale) in enumerate(adapters):
        a, b = torch.randn(vocabulary, rank).to(dtype), (torch.randn(rank, hidden) / rank**0.5).to(dtype)
        table[slot] = EmbeddingLora(a, b, 1 + torch.randn(hidden) / 4 if has_scale else None)
    e = torch.randn(len(rows), hidden).to(dtype)
    tokens = torch.randint(0, 40, (len(rows),))
    want = reference_embedding(e, tokens, rows, table)
    CpuLoraOps().add_embedding(e, tokens, route(rows), table)
    assert_equals(e, want)
