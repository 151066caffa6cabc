"""The CPU backends, torch's and the extension's with each set of instructions, against the float64 oracle.

Tolerances: in fp32, 1e-5 of the largest output. In half precision, the one rounding to the output's
dtype (half a unit in the last place) plus 1e-5: the backend itself may add nothing more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from loraplex.kernels.ops import Entries, LoraPart, LoraWeights, route
from loraplex.kernels.reference import reference_embedding, reference_lora

from .cases import BATCHES, DTYPES, IN, OUT, WIDTHS, Table, batch, embeddings, table_of
from .conftest import MakeAdapter
from .forms import LEVELS, Form, form_named


def error(
    form: Form, y: torch.Tensor, x: torch.Tensor, row_entries: Sequence[Entries], table: Table
) -> float:
    """Largest excess of |backend - oracle| over the dtype's rounding, as a share of the largest output."""
    want = reference_lora(y, x, row_entries, table)
    got = y.clone()
    form.add_to(got, x, row_entries, table)
    rounding = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2
    excess = (got.double() - want).abs() - rounding * want.abs()
    return (excess.max() / want.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_oracle(name: str, dtype: torch.dtype, make_adapter: MakeAdapter, form: Form) -> None:
    row_entries = BATCHES[name]
    y, x = batch(len(row_entries), dtype)
    assert error(form, y, x, row_entries, table_of(make_adapter, dtype)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slot", [*range(7), 9])
def test_the_tolerance_catches_an_adapter_scaled_by_a_hundredth(
    slot: int, dtype: torch.dtype, make_adapter: MakeAdapter, form: Form
) -> None:
    table = table_of(make_adapter, dtype)
    row_entries: list[Entries] = [((slot, 1.0),)] * 4
    y, x = batch(4, dtype)
    y.zero_()
    got = y.clone()
    form.add_to(got, x, [((slot, 1.01),)] * 4, table)
    want = reference_lora(y, x, row_entries, table)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    excess = (got.double() - want).abs() - rounding * want.abs()
    assert excess.max() / want.abs().max() > 5e-3
    assert error(form, y, x, row_entries, table) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_without_an_adapter_keep_their_bits(
    dtype: torch.dtype, make_adapter: MakeAdapter, form: Form
) -> None:
    table = table_of(make_adapter, dtype)
    y, x = batch(6, dtype)
    y[0, 0], y[2, 1] = torch.nan, -0.0
    before = y.clone()
    form.add_to(y, x, [(), ((3, 1.0),), (), ((3, 1.0),), ((5, 1.0),), ((99, 1.0),)], table)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for row in (0, 2, 5):
        assert torch.equal(y[row].view(integers), before[row].view(integers))
    outside = [*range(WIDTHS[0]), *range(WIDTHS[0] + WIDTHS[1], OUT)]
    assert torch.equal(y[4, outside], before[4, outside])
    assert not torch.equal(y[4], before[4])
    assert not torch.equal(y[1], before[1])


def test_an_empty_routing_reads_and_writes_nothing(form: Form) -> None:
    form.add_to(torch.empty(3, OUT, device="meta"), torch.empty(3, IN, device="meta"), [()] * 3, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_company(
    dtype: torch.dtype, make_adapter: MakeAdapter, form: Form
) -> None:
    table = table_of(make_adapter, dtype)
    row_entries: list[Entries] = [((row % 7, 1.0),) if row % 5 else () for row in range(40)]
    y, x = batch(40, dtype)
    together = y.clone()
    form.add_to(together, x, row_entries, table)
    for row in range(40):
        alone = y[row : row + 1].clone()
        form.add_to(alone, x[row : row + 1], row_entries[row : row + 1], table)
        rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(together[row], alone[0], rtol=rtol, atol=1e-5)


def test_an_adapter_of_nan_stays_in_its_rows(make_adapter: MakeAdapter, form: Form) -> None:
    table = table_of(make_adapter, torch.float32)
    bad = table[3]
    table[3] = dataclasses.replace(bad, a=torch.full_like(bad.a, torch.nan))
    y, x = batch(4, torch.float32)
    row_entries: list[Entries] = [((0, 1.0),), ((3, 1.0),), (), ((1, 1.0),)]
    form.add_to(y, x, row_entries, table)
    assert torch.isfinite(y[[0, 2, 3]]).all()
    assert y[1].isnan().all()


def test_several_adapters_round_once(form: Form) -> None:
    """Two deltas that each vanish in a bf16 rounding of y, and together do not."""
    x, y = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    one, small = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16)
    table = {slot: LoraWeights(one, (LoraPart(0, 0, small),)) for slot in range(4)}
    form.add_to(y, x, [tuple((slot, 1.0) for slot in range(4))], table)
    assert y.item() == 1 + 2.0**-7


def test_y_may_be_a_strided_view(make_adapter: MakeAdapter, form: Form) -> None:
    table = table_of(make_adapter, torch.bfloat16)
    wide = torch.randn(6, OUT + 8).to(torch.bfloat16)
    y, x = wide[:, 4:-4], torch.randn(6, IN).to(torch.bfloat16)
    row_entries: list[Entries] = [((0, 1.0),), ((1, 1.0),), ((0, 1.0),), (), ((2, 1.0),), ((2, 1.0),)]
    margins = wide[:, [*range(4), *range(-4, 0)]].clone()
    want = reference_lora(y, x, row_entries, table)
    form.add_to(y, x, row_entries, table)
    torch.testing.assert_close(y.double(), want, rtol=2.0**-8, atol=1e-5)
    assert torch.equal(wide[:, [*range(4), *range(-4, 0)]], margins)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_embeddings_equal_the_oracle(name: str, dtype: torch.dtype, form: Form) -> None:
    """Tokens reach beyond the smallest vocabulary, which is that of slot 4."""
    row_entries = BATCHES[name]
    table = embeddings(dtype)
    e = torch.randn(len(row_entries), OUT).to(dtype)
    tokens = torch.arange(len(row_entries)) * 7 % 30
    want = reference_embedding(e, tokens, row_entries, table)
    form.add_embedding(e, tokens, row_entries, table)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    excess = (e.double() - want).abs() - rounding * want.abs()
    assert excess.max() / want.abs().max() < 1e-5


def test_a_token_beyond_an_adapters_vocabulary_keeps_the_bases_embedding(form: Form) -> None:
    table = embeddings(torch.float32)
    e = torch.randn(2, OUT)
    before = e.clone()
    form.add_embedding(e, torch.tensor([20, 19]), [((4, 1.0),)] * 2, table)
    assert torch.equal(e[0], before[0])
    assert not torch.equal(e[1], before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 15, 16, 37, 530])
def test_inputs_of_any_width(
    features: int, dtype: torch.dtype, make_adapter: MakeAdapter, form: Form
) -> None:
    """Vectors, tiles of rows and pieces of work that end in the middle of each other."""
    widths, entries = (300, 7, 290), [((slot, 1.0),) for slot in (0, 1, 1, 0, 2) for _ in range(7)]
    ranks = [(16, 8, 1), (40, 1, 70), (3, 0, 9)]
    table = {slot: make_adapter(each, features, widths, dtype) for slot, each in enumerate(ranks)}
    y, x = torch.randn(35, sum(widths)).to(dtype), torch.randn(35, features).to(dtype)
    assert error(form, y, x, entries, table) < 1e-5


@pytest.mark.usefixtures("two_threads")
def test_several_threads_share_the_work(make_adapter: MakeAdapter, form: Form) -> None:
    entries = BATCHES["all distinct"] + BATCHES["several a row"] + BATCHES["vectors"]
    y, x = batch(len(entries), torch.bfloat16)
    table = table_of(make_adapter, torch.bfloat16)
    for _ in range(5):
        assert error(form, y, x, entries, table) < 1e-5


def test_rows_of_x_may_lie_apart(make_adapter: MakeAdapter, form: Form) -> None:
    table = table_of(make_adapter, torch.float32)
    wide = torch.randn(5, 2 * IN)
    y, entries = torch.randn(5, OUT), [((slot, 1.0),) for slot in (0, 1, 2, 1, 10)]
    for x in (wide[:, :IN], wide[:, ::2]):
        assert error(form, y, x, entries, table) < 1e-5


def test_shares_are_slots_of_their_own(make_adapter: MakeAdapter, form: Form) -> None:
    table = {key: make_adapter([2] * 3, IN, WIDTHS) for key in (0, 2, 4, 7)}
    entries: list[Entries] = [((4, 1.0),), ((0, 1.0), (4, 0.5)), ((2, 1.0),), ((1, 1.0),), ((7, -1.0),)]
    y, x = batch(5, torch.float32)
    want = reference_lora(y, x, entries, table)
    form.add_to(y, x, entries, table, shares=3)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_a_site_of_many_linears(make_adapter: MakeAdapter, form: Form) -> None:
    widths = (3, 5, 2, 4, 6, 1)
    table = {0: make_adapter([2, 1, 0, 3, 4, 1], IN, widths, scale=True)}
    y, x = torch.randn(3, 21), torch.randn(3, IN)
    want = reference_lora(y, x, [((0, 1.0),), (), ((0, 2.0),)], table)
    form.add_to(y, x, [((0, 1.0),), (), ((0, 2.0),)], table, linears=6)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LEVELS[:1])
def test_an_adapter_of_another_dtype_is_an_error(name: str, make_adapter: MakeAdapter) -> None:
    y, x = batch(1, torch.bfloat16)
    table = table_of(make_adapter, torch.float32)
    with form_named(name) as form, pytest.raises(ValueError, match=r"torch\.float32 .* to torch\.bfloat16"):
        form.add_to(y, x, [((0, 1.0),)], table)


@pytest.mark.parametrize("name", LEVELS[:1])
def test_what_was_placed_serves_until_something_changes(name: str, make_adapter: MakeAdapter) -> None:
    table = table_of(make_adapter, torch.float32)
    with form_named(name) as form:
        ops, resident = form.ops, form.ops.site_table(WIDTHS)
        resident.update({2: table[2]})
        entries: list[Entries] = [((2, 1.0),)] * 3
        y, x = batch(3, torch.float32)
        first = ops.place(route(entries))
        assert ops.place(route(entries)) is first
        assert ops.place(route([((2, 0.5),)] * 3)) is not first
        resident[2] = table[4]
        again = ops.place(route(entries))
        assert again is not first
        want = reference_lora(y, x, entries, {2: table[4]})
        ops.start_lora(x, again, resident).add_to(y)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
