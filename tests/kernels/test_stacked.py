"""Stacked adapters against the float64 oracle, and when a step's adapters count as steady."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from loraplex.kernels import cpu, stacked
from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import Entries, LoraWeights, Routing, route
from loraplex.kernels.reference import reference_lora
from loraplex.kernels.stacked import STEPS, StackedTable, Steadiness, SteadyRouting, steady

from .cases import IN, OUT, WIDTHS, batch, table_of
from .conftest import MakeAdapter

PLAIN = range(7)
"""Slots of `table_of` that only add a product, some with linears left out."""
BATCHES: dict[str, list[Entries]] = {
    "one token": [((2, 1.0),)],
    "one base token": [()],
    "all distinct": [((slot, 1.0),) for slot in PLAIN],
    "identical": [((3, 1.0),)] * 33,
    "non-adjacent": [((slot, 1.0),) if slot is not None else () for slot in (1, None, 4, 1, 4, None, 1, 2)],
    "several a row": [((0, 1.0), (3, 1.0)), (), ((4, 1.0), (5, 1.0), (6, 1.0)), ((3, 1.0),)],
    "slot leaves the site alone": [((99, 1.0),), ((99, 1.0), (1, 1.0)), ()],
}


def stacked_table(adapters: dict[int, LoraWeights]) -> StackedTable:
    table = StackedTable()
    table.update(adapters)
    return table


def error(y: torch.Tensor, x: torch.Tensor, entries: Sequence[Entries], table: StackedTable) -> float:
    """Largest excess of |stacked - oracle| over the rounding of y, as a share of what adapters bring."""
    want = reference_lora(y, x, entries, table)
    got = y.clone()
    assert table.add_stacked(got, x, steady(route(entries), (*PLAIN, 99)))
    rounding = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2
    excess = (got.double() - want).abs() - rounding * want.abs()
    return (excess.max() / (want - y.double()).abs().max().clamp(min=1e-9)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_oracle(name: str, dtype: torch.dtype, make_adapter: MakeAdapter) -> None:
    """In half precision x A^T is rounded, and nothing else beside y."""
    table = stacked_table(table_of(make_adapter, dtype))
    y, x = batch(len(BATCHES[name]), dtype)
    allowed = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert error(y, x, BATCHES[name], table) < allowed


def test_rows_without_an_adapter_keep_their_values(make_adapter: MakeAdapter) -> None:
    table = stacked_table(table_of(make_adapter, torch.bfloat16))
    y, x = batch(5, torch.bfloat16)
    x[2] = torch.inf
    before = y.clone()
    entries: list[Entries] = [(), ((3, 1.0),), (), ((5, 1.0),), ((99, 1.0),)]
    assert table.add_stacked(y, x, steady(route(entries), (*PLAIN, 99)))
    assert torch.equal(y[[0, 2, 4]], before[[0, 2, 4]])
    columns = [*range(WIDTHS[0]), *range(WIDTHS[0] + WIDTHS[1], OUT)]
    assert torch.equal(y[3, columns], before[3, columns]), "slot 5 has the linear in the middle alone"
    assert not torch.equal(y[3], before[3])
    assert not torch.equal(y[1], before[1])


def test_a_slot_that_changes_is_stacked_anew(make_adapter: MakeAdapter) -> None:
    adapters = table_of(make_adapter, torch.float32)
    table = stacked_table(adapters)
    y, x = batch(7, torch.float32)
    entries = BATCHES["all distinct"]
    assert error(y, x, entries, table) < 1e-5
    table[2] = make_adapter([5] * 3, IN, WIDTHS, torch.float32)
    assert error(y, x, entries, table) < 1e-5
    del table[4]
    assert error(y, x, entries, table) < 1e-5
    table.pop(0)
    assert error(y, x, entries, table) < 1e-5


@pytest.mark.parametrize("slot", [7, 8, 9, 10])
def test_adapters_that_do_more_than_add_are_not_stacked(slot: int, make_adapter: MakeAdapter) -> None:
    refused(stacked_table(table_of(make_adapter, torch.float32)), (0, 1, slot))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["a", "b"])
def test_what_is_not_a_number_is_not_stacked(where: str, value: float, make_adapter: MakeAdapter) -> None:
    """Times nothing it would still reach every row."""
    table = stacked_table(table_of(make_adapter, torch.float32))
    bad = table[1]
    if where == "a":
        bad = dataclasses.replace(bad, a=torch.full_like(bad.a, value))
    else:
        parts = [dataclasses.replace(part, b=torch.full_like(part.b, value)) for part in bad.parts]
        bad = dataclasses.replace(bad, parts=tuple(parts))
    table[1] = bad
    refused(table, (0, 1, 2))


def refused(table: StackedTable, slots: tuple[int, ...]) -> None:
    entries: list[Entries] = [((slot, 1.0),) for slot in slots]
    y, x = batch(len(slots), torch.float32)
    before = y.clone()
    assert not table.add_stacked(y, x, steady(route(entries), slots))
    assert torch.equal(y, before)


def step(slots: Sequence[int]) -> Routing:
    return route([((slot, 1.0),) for slot in slots])


def test_adapters_are_stacked_once_they_stay() -> None:
    steadiness = Steadiness()
    placed = [steadiness.place(step(range(5))) for _ in range(STEPS + 2)]
    assert [isinstance(each, SteadyRouting) for each in placed] == [False] * (STEPS - 1) + [True] * 3
    assert placed[-1] is placed[-2]


def test_some_of_the_stacked_do_not_change_the_stack() -> None:
    steadiness = Steadiness()
    for _ in range(STEPS):
        steadiness.place(step(range(8)))
    fewer = steadiness.place(step([7, 1, 2, 3]))
    assert isinstance(fewer, SteadyRouting)
    assert fewer.stacked == tuple(range(8))
    assert fewer.member.nonzero().tolist() == [[0, 7], [1, 1], [2, 2], [3, 3]]


def test_others_are_stacked_in_their_turn() -> None:
    steadiness = Steadiness()
    for _ in range(STEPS):
        steadiness.place(step(range(10)))
    for slots in (range(4), range(5, 15)):
        kinds = [isinstance(steadiness.place(step(slots)), SteadyRouting) for _ in range(STEPS)]
        assert kinds == [False] * (STEPS - 1) + [True], "far fewer, or others"


@pytest.mark.parametrize(
    "routing",
    [
        step(range(stacked.SLOTS - 1)),
        step([*range(8)] * (stacked.ROWS // 8) + [0]),
        route([((0, 0.5),), *(((slot, 1.0),) for slot in range(1, 8))]),
        route([()] * 8),
    ],
    ids=["few adapters", "many rows", "weights", "base alone"],
)
def test_what_gains_nothing_is_never_stacked(routing: Routing) -> None:
    steadiness = Steadiness()
    for _ in range(3 * STEPS):
        assert steadiness.place(routing) is routing


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backend_gives_the_same_in_steady_steps(
    dtype: torch.dtype, pays: bool, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters of every kind, and with plain ones alone."""
    monkeypatch.setattr(cpu, "stacking_pays", lambda _: pays)
    ops = CpuLoraOps()
    table = ops.site_table(WIDTHS)
    table.update(table_of(make_adapter, dtype))
    for slots in ([*PLAIN], [*PLAIN, 8], [*PLAIN]):
        for _ in range(2 * STEPS):
            entries: list[Entries] = [((slot, 1.0),) for slot in slots] + [()]
            y, x = batch(len(entries), dtype)
            want = reference_lora(y, x, entries, table)
            ops.start_lora(x, ops.place(route(entries)), table).add_to(y)
            rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(y.double(), want, rtol=rtol, atol=2e-2 if rtol > 1e-5 else 1e-4)


def test_the_measurement_answers_for_every_dtype() -> None:
    """Which way is the machine's business; that it does not change is ours."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert cpu.stacking_pays(dtype) is cpu.stacking_pays(dtype)
