"""The CUDA backend, its kernels run on the CPU, against the float64 oracle over awkward batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from loraplex.kernels.cuda import DeviceRouting
from loraplex.kernels.cuda_decoder import CudaDecoderOps
from loraplex.kernels.ops import EmbeddingLora, Entries, LoraPart, LoraWeights, route
from loraplex.kernels.reference import reference_embedding, reference_lora

from .cases import BATCHES, DTYPES, IN, OUT, WIDTHS, Table, batch, embeddings, table_of
from .conftest import MakeAdapter
from .target import Target

HALVES = (torch.bfloat16, torch.float16)


class Site:
    """One site on the device, with these adapters resident."""

    def __init__(self, target: Target, table: Table, widths: Sequence[int] = WIDTHS) -> None:
        self.device = target.device
        self.ops = target.ops()
        self.table = self.ops.site_table(widths)
        self.table.update(target.adapters(table))

    def run(
        self, y: torch.Tensor, x: torch.Tensor, entries: Sequence[Entries], decode_rows: int = 0
    ) -> torch.Tensor:
        """What becomes of y, its hidden values NaN before."""
        got = y.to(self.device, copy=True)
        placed = self.ops.place(route(entries, decode_rows=decode_rows))
        placed.hidden.fill_(torch.nan)
        self.ops.start_lora(x.to(self.device), placed, self.table).add_to(got)
        return got.cpu()

    def run_reserved(self, y: torch.Tensor, x: torch.Tensor, reserved: DeviceRouting) -> torch.Tensor:
        got = y.to(self.device, copy=True)
        self.ops.start_lora(x.to(self.device), reserved, self.table).add_to(got)
        return got.cpu()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest excess over the rounding of y, as a share of the largest output."""
    rounding = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
    excess = (got.double() - want).abs() - rounding * want.abs()
    return (excess.max() / want.abs().max()).item()


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""In half precision x A^T is rounded once more, as the base's and PEFT's own outputs are."""


@pytest.mark.parametrize("phase", ["decode", "prompt", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_oracle(
    name: str, dtype: torch.dtype, phase: str, make_adapter: MakeAdapter, target: Target
) -> None:
    entries, table = BATCHES[name], table_of(make_adapter, dtype)
    y, x = batch(len(entries), dtype)
    decode_rows = {"decode": len(entries), "prompt": 0, "mixed": len(entries) // 2}[phase]
    got = Site(target, table).run(y, x, entries, decode_rows)
    assert error(got, reference_lora(y, x, entries, table)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("features", [8, 64, 136, 520, 1600, 4104, 10248])
def test_inputs_of_any_width(
    features: int, dtype: torch.dtype, make_adapter: MakeAdapter, target: Target
) -> None:
    """Splits, quarters of splits and steps that end in the middle of each other."""
    widths, entries = (136, 8), [((slot, 1.0),) for slot in (0, 1, 1, 0, 2) for _ in range(4)]
    table = {
        slot: make_adapter(ranks, features, widths, dtype)
        for slot, ranks in enumerate([(16, 8), (40, 1), (3, 70)])
    }
    y, x = torch.randn(20, 144).to(dtype), torch.randn(20, features).to(dtype)
    want = reference_lora(y, x, entries, table)
    for decode_rows in (20, 0):
        assert error(Site(target, table, widths).run(y, x, entries, decode_rows), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("widths", [(12, 20), (7,), (5, 3, 1)])
@pytest.mark.parametrize("features", [24, 9])
def test_shapes_that_are_no_whole_vectors(
    features: int, widths: tuple[int, ...], make_adapter: MakeAdapter, target: Target
) -> None:
    table = {0: make_adapter([4] * len(widths), features, widths, torch.bfloat16, scale=True, shift=True)}
    entries: list[Entries] = [((0, 0.5),), (), ((0, 0.5),)]
    y, x = torch.randn(3, sum(widths)).bfloat16(), torch.randn(3, features).bfloat16()
    got = Site(target, table, widths).run(y, x, entries, 3)
    assert error(got, reference_lora(y, x, entries, table)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decode", [True, False])
def test_a_row_has_the_same_bits_in_any_company(
    decode: bool, dtype: torch.dtype, make_adapter: MakeAdapter, target: Target
) -> None:
    site = Site(target, table_of(make_adapter, dtype))
    entries: list[Entries] = [((row % 11, 1.0),) if row % 5 else () for row in range(40)] + [((1, 1.0),)] * 40
    y, x = batch(80, dtype)
    together = site.run(y, x, entries, 80 if decode else 0)
    for row in range(0, 80, 3):
        one = slice(row, row + 1)
        alone = site.run(y[one], x[one], entries[one], 1 if decode else 0)
        assert torch.equal(together[one].view(torch.uint8), alone.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_without_an_adapter_keep_their_bits(
    dtype: torch.dtype, make_adapter: MakeAdapter, target: Target
) -> None:
    y, x = batch(6, dtype)
    y[0, 0], y[2, 1], y[4, 0] = torch.nan, -0.0, torch.nan
    entries: list[Entries] = [(), ((3, 1.0),), (), ((3, 1.0),), ((5, 1.0),), ((99, 1.0),)]
    for decode_rows in (6, 0):
        got = Site(target, table_of(make_adapter, dtype)).run(y, x, entries, decode_rows)
        for row in (0, 2, 5):
            assert torch.equal(got[row].view(torch.uint8), y[row].view(torch.uint8))
        outside = [*range(WIDTHS[0]), *range(WIDTHS[0] + WIDTHS[1], OUT)]
        assert torch.equal(got[4, outside].view(torch.uint8), y[4, outside].view(torch.uint8))
        assert not torch.equal(
            got[4, WIDTHS[0] : WIDTHS[0] + WIDTHS[1]], y[4, WIDTHS[0] : WIDTHS[0] + WIDTHS[1]]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_with_room_between_their_rows(
    dtype: torch.dtype, make_adapter: MakeAdapter, target: Target
) -> None:
    """Aligned ones, and ones that begin in the middle of a vector."""
    table = table_of(make_adapter, dtype)
    entries: list[Entries] = [((0, 1.0),), ((1, 1.0),), ((0, 1.0),), (), ((2, 1.0),), ((8, 1.0),)]
    for margin in (8, 3):
        wide_y, wide_x = (torch.randn(6, width + 16).to(target.device, dtype) for width in (OUT, IN))
        y, x = wide_y[:, margin : margin + OUT], wide_x[:, margin : margin + IN]
        want, before = reference_lora(y.cpu(), x.cpu(), entries, table), wide_y.clone()
        site = Site(target, table)
        placed = site.ops.place(route(entries, decode_rows=6))
        site.ops.start_lora(x, placed, site.table).add_to(y)
        assert error(y.cpu(), want) < TOLERANCE[dtype]
        before[:, margin : margin + OUT] = y
        assert torch.equal(wide_y, before)


def test_an_adapter_of_nan_stays_in_its_rows(make_adapter: MakeAdapter, target: Target) -> None:
    table = table_of(make_adapter, torch.bfloat16)
    table[3] = replace(table[3], a=torch.full_like(table[3].a, torch.nan))
    y, x = batch(4, torch.bfloat16)
    got = Site(target, table).run(y, x, [((0, 1.0),), ((3, 1.0),), (), ((1, 1.0),)], 4)
    assert torch.isfinite(got[[0, 2, 3]]).all()
    assert got[1].isnan().all()


def test_several_adapters_round_once(target: Target) -> None:
    """Deltas that each vanish in a bf16 rounding of y, and together do not."""
    x, y = torch.zeros(1, 8).bfloat16(), torch.ones(1, 8).bfloat16()
    x[0, 0] = 1
    small = torch.full((1, 8), 2.0**-9).bfloat16()
    table = {slot: LoraWeights(torch.ones(1, 8).bfloat16(), (LoraPart(0, 0, small),)) for slot in range(4)}
    got = Site(target, table, (8,)).run(y, x, [tuple((slot, 1.0) for slot in range(4))], 1)
    assert (got == 1 + 2.0**-7).all()


def test_reserved_room_serves_one_routing_after_another(make_adapter: MakeAdapter, target: Target) -> None:
    """As captured steps do: launched for one segmentation, right for every other."""
    dtype = torch.bfloat16
    table = table_of(make_adapter, dtype)
    site = Site(target, table)
    reserved = site.ops.reserve(rows=24, slots=12, hidden=24 * 768)
    y, x = batch(24, dtype)
    for entries in (
        [((2, 1.0),)] * 24,
        [((row % 11, 1.0),) for row in range(24)],
        [()] * 24,
        [((11, 1.0),)] + [()] * 23,
    ):
        assert site.ops.fill(reserved, route(entries), 24)
        got = site.run_reserved(y, x, reserved)
        assert error(got, reference_lora(y, x, entries, table)) < TOLERANCE[dtype]


def test_reserved_room_is_left_alone_until_something_changes(
    make_adapter: MakeAdapter, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16
    table = table_of(make_adapter, dtype)
    site = Site(target, table)
    reserved = site.ops.reserve(rows=24, slots=12, hidden=24 * 768)
    written = []
    write = reserved.write
    monkeypatch.setattr(reserved, "write", lambda plan: written.append(plan) or write(plan))
    y, x = batch(24, dtype)
    entries: list[Entries] = [((2, 1.0),)] * 20 + [((4, 0.5),)] * 4
    for changed in (False, True, False):
        if changed:
            table = table | {2: table[7]}
            site.table.update(target.adapters({2: table[2]}))
        for _ in range(3):
            assert site.ops.fill(reserved, route(entries), 24)
            got = site.run_reserved(y, x, reserved)
            assert error(got, reference_lora(y, x, entries, table)) < TOLERANCE[dtype]
    assert len(written) == 2
    entries[0] = ((2, 2.0),)
    assert site.ops.fill(reserved, route(entries), 24)
    assert site.ops.fill(reserved, route(entries), 28)
    assert len(written) == 4


def test_reserved_room_refuses_what_does_not_fit(make_adapter: MakeAdapter, target: Target) -> None:
    site = Site(target, table_of(make_adapter, torch.bfloat16))
    reserved = site.ops.reserve(rows=4, slots=12, hidden=4 * 24)
    assert site.ops.fill(reserved, route([((2, 1.0),)] * 4), 4)
    assert site.ops.fill(reserved, route([((2, 1.0),)] * 3), 4)
    assert not site.ops.fill(reserved, route([((2, 1.0), (0, 1.0))] * 4), 4)
    assert not site.ops.fill(reserved, route([((0, 1.0),)] * 65), 65)


def test_a_reserved_step_is_launched_before_any_adapter_is_resident(
    make_adapter: MakeAdapter, target: Target
) -> None:
    site = Site(target, {})
    reserved = site.ops.reserve(rows=2, slots=4, hidden=4096)
    y, x = batch(2, torch.bfloat16)
    assert torch.equal(site.run_reserved(y, x, reserved), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_embeddings_equal_the_oracle(name: str, dtype: torch.dtype, target: Target) -> None:
    entries, table = BATCHES[name], embeddings(dtype)
    e, tokens = torch.randn(len(entries), OUT).to(dtype), torch.arange(len(entries)) * 7 % 30
    want = reference_embedding(e, tokens, entries, table)
    ops, got = target.ops(), e.to(target.device)
    resident = ops.embedding_table()
    resident.update(target.embeddings(table))
    placed = ops.place(route(entries, decode_rows=len(entries) // 2))
    ops.add_embedding(got, tokens.to(target.device), placed, resident)
    assert error(got.cpu(), want) < 1e-5


def test_an_adapter_of_another_dtype_is_refused(make_adapter: MakeAdapter, target: Target) -> None:
    site = Site(target, table_of(make_adapter, torch.float16))
    y, x = batch(1, torch.bfloat16)
    with pytest.raises(ValueError, match="float16"):
        site.run(y, x, [((0, 1.0),)], 1)


def test_experts_have_shares(make_adapter: MakeAdapter, target: Target) -> None:
    ops = target.ops()
    table = {key: make_adapter([key + 1], 24, (16,), torch.bfloat16) for key in (0, 2, 4)}
    resident = ops.site_table([16], shares=3)
    resident.update(target.adapters(table))
    entries: list[Entries] = [((4, 1.0),), ((0, 1.0), (4, 0.5)), ((2, 1.0),), ((1, 1.0),)]
    y, x = torch.randn(4, 16).bfloat16(), torch.randn(4, 24).bfloat16()
    want = reference_lora(y, x, entries, table)
    got = y.to(target.device)
    ops.start_lora(x.to(target.device), ops.place(route(entries), shares=3), resident).add_to(got)
    assert error(got.cpu(), want) < TOLERANCE[torch.bfloat16]


def test_an_empty_vocabulary_entry_changes_nothing(target: Target) -> None:
    ops = target.ops()
    table = ops.embedding_table()
    table.update(target.embeddings({0: EmbeddingLora(torch.randn(2, 3), torch.randn(3, 5), None)}))
    e = torch.randn(2, 5, device=target.device)
    before = e.clone()
    tokens = torch.tensor([2, 1], device=target.device)
    ops.add_embedding(e, tokens, ops.place(route([((0, 1.0),)] * 2)), table)
    assert torch.equal(e[0], before[0])
    assert not torch.equal(e[1], before[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("decode_rows", [0, 21, 70])
def test_the_gate_of_what_the_adapters_make(
    decode_rows: int, dtype: torch.dtype, make_adapter: MakeAdapter, target: Target
) -> None:
    """Bit for bit what adding and then gating gives, for rows without adapters too."""
    widths, rows = (136, 136), 70
    table = {
        0: make_adapter([16, 3], 64, widths, dtype),
        1: make_adapter([0, 8], 64, widths, dtype, scale=True),
    }
    entries: list[Entries] = [((row % 3, 1.0),) if row % 3 < 2 else () for row in range(rows)]
    entries[5] = ((0, 0.5), (0, -2.0))
    y, x = torch.randn(rows, 272).to(dtype), torch.randn(rows, 64).to(dtype)
    site = Site(target, table, widths)
    added = site.run(y, x, entries, decode_rows).to(target.device)
    want, got = (torch.full((rows, 136), torch.nan, dtype=dtype, device=target.device) for _ in range(2))
    CudaDecoderOps(target.launcher).silu_mul(want, added)
    placed = site.ops.place(route(entries, decode_rows=decode_rows))
    delta = site.ops.start_lora(x.to(target.device), placed, site.table)
    assert delta.is_gated is (decode_rows < rows)
    delta.gate_into(got, y.to(target.device))
    assert torch.equal(got, want)
