"""Routing, and the oracle itself against a formula written another way."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.kernels.load import BackendMissing, load
from loraplex.kernels.ops import EmbeddingLora, Entries, LoraPart, LoraWeights, route
from loraplex.kernels.reference import reference_embedding, reference_lora

from .forms import LEVELS

entry_lists = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1.0, 0.5, -2.0])), max_size=3).map(tuple),
    max_size=24,
)


def rows_of(rows: slice | torch.Tensor) -> list[int]:
    return rows.tolist() if isinstance(rows, torch.Tensor) else list(range(rows.start, rows.stop))


@given(entry_lists)
def test_route_puts_every_row_with_entries_in_the_one_group_of_its_list(row_entries: list[Entries]) -> None:
    routing = route(row_entries)
    found = {}
    for group in routing.groups:
        rows = rows_of(group.rows)
        assert group.count == len(rows) > 0
        assert rows == sorted(rows)
        for row in rows:
            assert row not in found
            found[row] = group.entries
    assert found == {row: entries for row, entries in enumerate(row_entries) if entries}
    lists = [group.entries for group in routing.groups]
    assert len(lists) == len(set(lists))
    assert list(routing.slots) == sorted({slot for entries in row_entries for slot, _ in entries})


@given(entry_lists)
def test_adjacent_rows_are_a_slice_and_others_are_indices(row_entries: list[Entries]) -> None:
    for group in route(row_entries).groups:
        rows = rows_of(group.rows)
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        assert isinstance(group.rows, slice) == adjacent


def test_groups_follow_first_appearance_and_entry_order_matters() -> None:
    first, second = ((7, 1.0), (2, 0.5)), ((2, 0.5), (7, 1.0))
    routing = route([(), second, first, second])
    assert [group.entries for group in routing.groups] == [second, first]
    assert routing.slots == (2, 7)


def test_an_all_base_batch_routes_nowhere() -> None:
    routing = route([(), (), ()])
    assert routing.groups == ()
    assert routing.slots == ()


def test_the_oracle_is_the_dense_product_of_b_and_a() -> None:
    torch.manual_seed(0)
    a, b_first, b_last = torch.randn(5, 6), torch.randn(2, 4), torch.randn(3, 7)
    weights = LoraWeights(a, (LoraPart(0, 0, b_first), LoraPart(2, 9, b_last)))
    x, y = torch.randn(3, 6), torch.randn(3, 16)
    got = reference_lora(y, x, [((4, -2.0),), (), ((4, 1.0), (4, 0.5), (9, 1.0))], {4: weights})
    dense = torch.zeros(6, 16, dtype=torch.float64)
    dense[:, 0:4] = a[:2].double().T @ b_first.double()
    dense[:, 9:16] = a[2:].double().T @ b_last.double()
    want = (x.double() @ dense) * torch.tensor([[-2.0], [0.0], [1.5]], dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, y.double() + want, rtol=1e-12, atol=1e-12)


def test_the_oracle_scales_the_base_alone_and_weighs_the_shift() -> None:
    scale, shift = torch.tensor([2.0, -1.0]), torch.tensor([10.0, 20.0])
    part = LoraPart(0, 1, torch.tensor([[1.0, 3.0]]), scale, shift)
    weights = LoraWeights(torch.tensor([[5.0]]), (part,))
    y = torch.tensor([[7.0, 7.0, 7.0]])
    got = reference_lora(y, torch.tensor([[1.0]]), [((0, 0.5),)], {0: weights})
    assert got.tolist() == [[7.0, 2 * 7 + 0.5 * (10 + 5), -7 + 0.5 * (20 + 15)]]
    bare = LoraWeights(torch.zeros(0, 1), (LoraPart(0, 1, torch.zeros(0, 2), scale),))
    got = reference_lora(y, torch.tensor([[1.0]]), [((0, 0.5),)], {0: bare})
    assert got.tolist() == [[7.0, 14.0, -7.0]]


def test_the_oracle_looks_tokens_up_in_a() -> None:
    own = EmbeddingLora(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 5.0]]), torch.tensor([2.0, 1.0]))
    e = torch.full((3, 2), 10.0)
    got = reference_embedding(e, torch.tensor([1, 1, 2]), [((0, 0.5),), (), ((0, 1.0),)], {0: own})
    assert got.tolist() == [[20 + 0.5 * 6, 10 + 0.5 * 10], [10, 10], [20, 10]]


def test_the_oracle_wants_one_entry_list_a_row() -> None:
    with pytest.raises(ValueError, match="1 entry lists for 2 rows"):
        reference_lora(torch.zeros(2, 3), torch.zeros(2, 3), [()], {})


def test_load_gives_the_extension_on_a_cpu_and_refuses_others_by_name() -> None:
    backend = load(torch.device("cpu"))
    assert type(backend.lora).__name__ == ("NativeLoraOps" if LEVELS else "CpuLoraOps")
    assert (backend.decoder is not None) == bool(LEVELS)
    with pytest.raises(BackendMissing, match="meta"):
        load(torch.device("meta"))


def test_torch_alone_serves_where_the_extension_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("native_lora", "native_decoder"):
        monkeypatch.delitem(sys.modules, f"loraplex.kernels.{name}", raising=False)
    monkeypatch.delattr("loraplex.kernels._native", raising=False)
    monkeypatch.setitem(sys.modules, "loraplex.kernels._native", None)
    backend = load(torch.device("cpu"))
    assert type(backend.lora).__name__ == "CpuLoraOps"
    assert backend.decoder is None
