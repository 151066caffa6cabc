"""Launch planning: tasks hold every row and entry once, splits cover the input, grids cover the work."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.kernels import placement
from loraplex.kernels.ops import Entries, route
from loraplex.kernels.placement import TaskArray, plan_tasks

RANKS = {0: 4, 1: 48, 2: 0, 3: 9}


def rank_of(slot: int) -> int:
    return RANKS.get(slot, 0)


def entries_of(tasks: TaskArray) -> dict[int, list[tuple[int, float]]]:
    """The entries of each row in the order of the tasks."""
    found: dict[int, list[tuple[int, float]]] = {}
    for task in tasks[tasks["slot"] >= 0]:
        for row in task["row"][: task["count"]]:
            found.setdefault(int(row), []).append((int(task["slot"]), float(task["weight"])))
    return found


entry_lists = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, 0.5, -2.0])), max_size=3).map(tuple),
    max_size=90,
)


@given(entry_lists, st.data())
def test_every_row_is_in_the_tasks_of_its_phase_with_its_entries(
    rows: list[Entries], data: st.DataObject
) -> None:
    decode_rows = data.draw(st.integers(0, len(rows)))
    plan = plan_tasks(route(rows, decode_rows=decode_rows), rank_of)
    wanted = {row: list(entries) for row, entries in enumerate(rows) if entries}
    assert entries_of(plan.decode) == {row: each for row, each in wanted.items() if row < decode_rows}
    assert entries_of(plan.prompt) == {row: each for row, each in wanted.items() if row >= decode_rows}


@given(entry_lists)
def test_lists_are_whole_and_hidden_values_apart(rows: list[Entries]) -> None:
    plan = plan_tasks(route(rows, decode_rows=len(rows) // 2), rank_of)
    end = 0
    for tasks, family in ((plan.decode, placement.DECODE), (plan.prompt, placement.PROMPT)):
        index = 0
        while index < len(tasks):
            if tasks[index]["slot"] < 0:
                index += 1
                continue
            length = int(tasks[index]["length"])
            chunk = tasks[index : index + length]
            assert length >= 1
            assert len(chunk) == length
            assert not chunk[1:]["length"].any()
            assert (chunk["count"] == chunk[0]["count"]).all()
            assert (chunk["row"] == chunk[0]["row"]).all()
            assert 1 <= chunk[0]["count"] <= family.rows
            index += length
        for task in tasks[tasks["slot"] >= 0]:
            assert task["hidden"] == end
            end += family.splits * int(task["count"]) * -(-rank_of(int(task["slot"])) // 8) * 8
    assert plan.hidden_values == end
    ranks = [rank_of(slot) for entries in rows for slot, _ in entries]
    assert plan.stretches == -(-max(ranks, default=0) // placement.STRETCH)


@given(entry_lists)
def test_rows_without_entries_have_tasks_without_a_slot(rows: list[Entries]) -> None:
    plan = plan_tasks(route(rows, decode_rows=len(rows) // 2), rank_of)
    bare = [task for tasks in (plan.decode, plan.prompt) for task in tasks if task["slot"] < 0]
    found = sorted(int(row) for task in bare for row in task["row"][: task["count"]])
    assert found == [row for row, entries in enumerate(rows) if not entries]
    assert not any(task["length"] for task in bare)


def test_chunks_are_cut_at_eight_and_at_sixty_four_rows() -> None:
    plan = plan_tasks(route([((0, 1.0),)] * 233, decode_rows=33), rank_of)
    assert plan.decode["count"].tolist() == [8, 8, 8, 8, 1]
    assert plan.prompt["count"].tolist() == [64, 64, 64, 8]
    assert plan.prompt["row"][3][:8].tolist() == list(range(225, 233))


def test_the_records_are_as_wide_as_the_kernels_read_them() -> None:
    assert placement.task_dtype(16).itemsize == 32 + 16 * 4
    assert placement.task_dtype(64).itemsize == 32 + 64 * 4
    assert placement.task_dtype(16).fields is not None
    offsets = {name: field[1] for name, field in placement.task_dtype(16).fields.items()}
    assert offsets == {
        "slot": 0,
        "weight": 4,
        "hidden": 8,
        "count": 12,
        "length": 16,
        "unused": 20,
        "row": 32,
    }


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("tasks", [0, 1, 7, 10_000])
@pytest.mark.parametrize("family", [placement.DECODE, placement.PROMPT])
def test_grids_are_persistent_and_never_empty(family: placement.Family, tasks: int, processors: int) -> None:
    for splits in range(1, family.splits + 1):
        x, y, z = placement.shrink_grid(tasks, family, splits, processors)
        assert (y, z) == (splits, 1)
        assert 1 <= x <= max(1, tasks * family.rows // family.shrink_rows * placement.MANY_STRETCHES)
        assert x * splits < placement.SHRINK_BLOCKS * processors + splits
    units = tasks * family.rows // family.expand_rows * 64
    assert placement.expand_grid(tasks, family, 4096, 5 * processors) == (
        max(1, min(-(-units // placement.WARPS), 5 * processors)),
        1,
        1,
    )
    assert placement.plain_grid(tasks, 16, processors) == (max(1, min(16 * tasks, 8 * processors)), 1, 1)


@pytest.mark.parametrize("family", [placement.DECODE, placement.PROMPT])
@given(features=st.integers(1, 60_000))
def test_splits_cover_the_input_and_none_is_empty(family: placement.Family, features: int) -> None:
    splits = placement.Splits.of(features, family)
    block = splits.slice * placement.SHRINK_WARPS
    assert splits.slice % placement.DEPTH == 0
    assert 1 <= splits.count <= family.splits
    assert (splits.count - 1) * block < features <= splits.count * block


def test_a_group_of_scattered_rows_is_planned_like_one_that_lies_together() -> None:
    rows: list[Entries] = list(itertools.chain.from_iterable([((0, 1.0),), ()] for _ in range(20)))
    plan = plan_tasks(route(rows, decode_rows=len(rows)), rank_of)
    tasks = plan.decode[plan.decode["slot"] >= 0]
    assert np.concatenate([task["row"][: task["count"]] for task in tasks]).tolist() == list(range(0, 40, 2))
