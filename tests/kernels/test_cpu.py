"""The CPU backend against the float64 oracle, over awkward batches.

Tolerances: in fp32, 1e-5 of the largest output. In half precision, the one rounding to the output's
dtype (half a unit in the last place) plus 1e-5: the backend itself may add nothing more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import EmbeddingLora, Entries, LoraPart, LoraWeights, route
from loraplex.kernels.reference import reference_embedding, reference_lora

from .conftest import MakeAdapter

IN = 48
WIDTHS = (40, 16, 24)
OUT = sum(WIDTHS)
RANKS = (1, 3, 8, 64, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Table = Mapping[int, LoraWeights]


def table_of(make_adapter: MakeAdapter, dtype: torch.dtype) -> dict[int, LoraWeights]:
    """Slots 0..4 of every rank, 5 and 6 that leave linears of the site out, 7..10 with vectors."""
    table = {slot: make_adapter([rank] * 3, IN, WIDTHS, dtype) for slot, rank in enumerate(RANKS)}
    table[5] = make_adapter([0, 4, 0], IN, WIDTHS, dtype)
    table[6] = make_adapter([2, 0, 7], IN, WIDTHS, dtype)
    table[7] = make_adapter([0, 0, 0], IN, WIDTHS, dtype, scale=True)
    table[8] = make_adapter([8, 0, 3], IN, WIDTHS, dtype, scale=True)
    table[9] = make_adapter([0, 0, 0], IN, WIDTHS, dtype, shift=True)
    table[10] = make_adapter([1, 16, 0], IN, WIDTHS, dtype, scale=True, shift=True)
    return table


def batch(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, OUT).to(dtype), torch.randn(rows, IN).to(dtype)


def error(y: torch.Tensor, x: torch.Tensor, row_entries: Sequence[Entries], table: Table) -> float:
    """Largest excess of |backend - oracle| over the dtype's rounding, as a share of the largest output."""
    want = reference_lora(y, x, row_entries, table)
    got = y.clone()
    CpuLoraOps().add_lora(got, x, route(row_entries), table)
    rounding = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2
    excess = (got.double() - want).abs() - rounding * want.abs()
    return (excess.max() / want.abs().max()).item()


BATCHES: dict[str, list[Entries]] = {
    "one token": [((2, 1.0),)],
    "one base token": [()],
    "all base": [()] * 9,
    "all distinct": [((slot, 1.0),) for slot in range(7)],
    "identical": [((3, 1.0),)] * 33,
    "skewed": [((0, 1.0),)] * 60 + [((slot, 1.0),) for slot in (1, 2, 3, 4)],
    "non-adjacent": [((slot, 1.0),) if slot is not None else () for slot in (1, None, 4, 1, 4, None, 1, 2)],
    "several a row": [((0, 0.5), (3, -1.5)), ((3, -1.5), (0, 0.5)), (), ((4, -0.25), (5, 2.0), (6, 1.0))],
    "same slot twice": [((2, 1.0), (2, -0.5)), ((2, 0.5),)],
    "parts missing": [((5, 1.0),), ((6, 1.0),), ((5, -1.0), (6, 1.0)), ((0, 1.0),)],
    "vectors": [((7, 1.0),), ((8, 1.0),), ((9, -0.5),), ((10, 2.0),), (), ((8, 1.0),)],
    "a scale between others": [((9, 2.0), (8, 0.5), (0, 1.0)), ((0, 1.0), (8, 0.5), (9, 2.0))],
    "slot leaves the site alone": [((99, 1.0),), ((99, 1.0), (1, 1.0)), ()],
    "prefill": [((1, 1.0),)] * 150 + [()] * 31 + [((4, 1.0),)] * 97,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_oracle(name: str, dtype: torch.dtype, make_adapter: MakeAdapter) -> None:
    row_entries = BATCHES[name]
    y, x = batch(len(row_entries), dtype)
    assert error(y, x, row_entries, table_of(make_adapter, dtype)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slot", [*range(7), 9])
def test_the_tolerance_catches_an_adapter_scaled_by_a_hundredth(
    slot: int, dtype: torch.dtype, make_adapter: MakeAdapter
) -> None:
    table = table_of(make_adapter, dtype)
    row_entries: list[Entries] = [((slot, 1.0),)] * 4
    y, x = batch(4, dtype)
    y.zero_()
    got = y.clone()
    CpuLoraOps().add_lora(got, x, route([((slot, 1.01),)] * 4), table)
    want = reference_lora(y, x, row_entries, table)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    excess = (got.double() - want).abs() - rounding * want.abs()
    assert excess.max() / want.abs().max() > 5e-3
    assert error(y, x, row_entries, table) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_without_an_adapter_keep_their_bits(
    dtype: torch.dtype, make_adapter: MakeAdapter
) -> None:
    table = table_of(make_adapter, dtype)
    y, x = batch(6, dtype)
    y[0, 0], y[2, 1] = torch.nan, -0.0
    before = y.clone()
    CpuLoraOps().add_lora(y, x, route([(), ((3, 1.0),), (), ((3, 1.0),), ((5, 1.0),), ((99, 1.0),)]), table)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for row in (0, 2, 5):
        assert torch.equal(y[row].view(integers), before[row].view(integers))
    outside = [*range(WIDTHS[0]), *range(WIDTHS[0] + WIDTHS[1], OUT)]
    assert torch.equal(y[4, outside], before[4, outside])
    assert not torch.equal(y[4], before[4])
    assert not torch.equal(y[1], before[1])


def test_an_empty_routing_reads_and_writes_nothing() -> None:
    CpuLoraOps().add_lora(
        torch.empty(3, OUT, device="meta"), torch.empty(3, IN, device="meta"), route([()] * 3), {}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype, make_adapter: MakeAdapter) -> None:
    table = table_of(make_adapter, dtype)
    row_entries: list[Entries] = [((row % 7, 1.0),) if row % 5 else () for row in range(40)]
    y, x = batch(40, dtype)
    together = y.clone()
    CpuLoraOps().add_lora(together, x, route(row_entries), table)
    for row in range(40):
        alone = y[row : row + 1].clone()
        CpuLoraOps().add_lora(alone, x[row : row + 1], route(row_entries[row : row + 1]), table)
        rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(together[row], alone[0], rtol=rtol, atol=1e-5)


def test_an_adapter_of_nan_stays_in_its_rows(make_adapter: MakeAdapter) -> None:
    table = table_of(make_adapter, torch.float32)
    bad = table[3]
    table[3] = dataclasses.replace(bad, a=torch.full_like(bad.a, torch.nan))
    y, x = batch(4, torch.float32)
    row_entries: list[Entries] = [((0, 1.0),), ((3, 1.0),), (), ((1, 1.0),)]
    CpuLoraOps().add_lora(y, x, route(row_entries), table)
    assert torch.isfinite(y[[0, 2, 3]]).all()
    assert y[1].isnan().all()


def test_several_adapters_round_once() -> None:
    """Two deltas that each vanish in a bf16 rounding of y, and together do not."""
    x, y = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    one, small = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16)
    table = {slot: LoraWeights(one, (LoraPart(0, 0, small),)) for slot in range(4)}
    CpuLoraOps().add_lora(y, x, route([tuple((slot, 1.0) for slot in range(4))]), table)
    assert y.item() == 1 + 2.0**-7


def test_y_may_be_a_strided_view(make_adapter: MakeAdapter) -> None:
    table = table_of(make_adapter, torch.bfloat16)
    wide = torch.randn(6, OUT + 8).to(torch.bfloat16)
    y, x = wide[:, 4:-4], torch.randn(6, IN).to(torch.bfloat16)
    row_entries: list[Entries] = [((0, 1.0),), ((1, 1.0),), ((0, 1.0),), (), ((2, 1.0),), ((2, 1.0),)]
    margins = wide[:, [*range(4), *range(-4, 0)]].clone()
    want = reference_lora(y, x, row_entries, table)
    CpuLoraOps().add_lora(y, x, route(row_entries), table)
    torch.testing.assert_close(y.double(), want, rtol=2.0**-8, atol=1e-5)
    assert torch.equal(wide[:, [*range(4), *range(-4, 0)]], margins)


def embeddings(dtype: torch.dtype) -> dict[int, EmbeddingLora]:
    """Slots 0..2 at ranks 1, 3 and 64, and slot 3 with a scale and a vocabulary of its own."""

    def make(vocabulary: int, rank: int, scale: torch.Tensor | None = None) -> EmbeddingLora:
        a, b = torch.randn(vocabulary, rank), torch.randn(rank, OUT) / rank**0.5
        return EmbeddingLora(a.to(dtype), b.to(dtype), scale)

    table = {slot: make(30, rank) for slot, rank in enumerate((1, 3, 64))}
    return table | {3: make(34, 8, 1 + torch.randn(OUT) / 4), 4: make(20, 2)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_embeddings_equal_the_oracle(name: str, dtype: torch.dtype) -> None:
    """Tokens reach beyond the smallest vocabulary, which is that of slot 4."""
    row_entries = BATCHES[name]
    table = embeddings(dtype)
    e = torch.randn(len(row_entries), OUT).to(dtype)
    tokens = torch.arange(len(row_entries)) * 7 % 30
    want = reference_embedding(e, tokens, row_entries, table)
    CpuLoraOps().add_embedding(e, tokens, route(row_entries), table)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    excess = (e.double() - want).abs() - rounding * want.abs()
    assert excess.max() / want.abs().max() < 1e-5


def test_a_token_beyond_an_adapters_vocabulary_keeps_the_bases_embedding() -> None:
    table = embeddings(torch.float32)
    e = torch.randn(2, OUT)
    before = e.clone()
    CpuLoraOps().add_embedding(e, torch.tensor([20, 19]), route([((4, 1.0),)] * 2), table)
    assert torch.equal(e[0], before[0])
    assert not torch.equal(e[1], before[1])
