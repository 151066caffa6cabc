"""Heads of several widths in one batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import Entries, LoraPart, LoraWeights, route
from loraplex.shard.adapters.weights import LinearWeights, ReplacedRows
from loraplex.shard.head import HeadSite
from loraplex.shard.linear import DenseWeight
from loraplex.shard.parallel.ranks import Alone
from loraplex.shard.parallel.vocabulary import VocabularyShare
from loraplex.shard.sites import RoutingCell

HIDDEN, VOCAB = 8, 10


def head_for(row_entries: list[Entries], *, bias: bool = False) -> tuple[HeadSite, nn.Linear, RoutingCell]:
    linear = nn.Linear(HIDDEN, VOCAB, bias)
    cell = RoutingCell(CpuLoraOps(), route(row_entries))
    weight = DenseWeight(linear.weight.data, linear.bias.data if bias else None)
    return HeadSite(weight, CpuLoraOps(), cell, VocabularyShare(VOCAB, Alone())), linear, cell


def whole(rows: int) -> LinearWeights:
    """A head of another size."""
    return LinearWeights(None, None, (ReplacedRows(0, None, torch.randn(rows, HIDDEN), None, rows),))


def added(*ids: int) -> LinearWeights:
    """Single rows, which may lie beyond the base's last."""
    rows = ReplacedRows(
        0, torch.tensor(ids), torch.randn(len(ids), HIDDEN), None, max(VOCAB, *(1 + each for each in ids))
    )
    return LinearWeights(None, None, (rows,))


WIDTHS = {0: whole(13), 1: whole(7), 2: added(3, 11), 3: added(4), 4: whole(10)}
EXPECTED = {None: VOCAB, 0: 13, 1: 7, 2: 12, 3: VOCAB, 4: VOCAB}
ONE = 1.0


@pytest.mark.parametrize(
    "slots",
    [
        [0, None, 1, 2, 3, 0, None, 4],
        [1, 1],
        [1],
        [1, None],
        [0, 0],
        [0, 1],
        [2, None],
        [3, 4, None],
        [None, None],
    ],
    ids=str,
)
def test_every_row_has_the_logits_of_its_own_vocabulary(slots: list[int | None]) -> None:
    entries: list[Entries] = [() if slot is None else ((slot, ONE),) for slot in slots]
    site, linear, cell = head_for(entries)
    for slot, weights in WIDTHS.items():
        site.put(slot, weights)
    x = torch.randn(len(slots), HIDDEN)
    with torch.no_grad():
        logits = site.mask(site.output(x[None])[0], cell.routing)
    assert logits.shape[1] >= max(EXPECTED[slot] for slot in slots)
    for row, slot in enumerate(slots):
        width = EXPECTED[slot]
        assert logits[row, width:].isneginf().all()
        assert logits[row, :width].isfinite().all()
        want = linear.weight.data if slot is None else None
        if slot in (0, 1, 4):
            want = WIDTHS[slot].rows[0].weight
        if want is not None:
            torch.testing.assert_close(logits[row, :width], want @ x[row])


def test_low_rank_over_a_taller_head() -> None:
    site, _, cell = head_for([((0, 2.0),), ()])
    tall = whole(13)
    lora = LoraWeights(torch.randn(2, HIDDEN), (LoraPart(0, 0, torch.randn(2, 13)),))
    site.put(0, LinearWeights(lora, None, tall.rows))
    x = torch.randn(1, 2, HIDDEN)
    with torch.no_grad():
        logits = site.mask(site.output(x)[0], cell.routing)
    want = tall.rows[0].weight @ x[0, 0] + 2 * (x[0, 0] @ lora.a.T @ lora.parts[0].b)
    torch.testing.assert_close(logits[0], want)
    assert logits[1, VOCAB:].isneginf().all()


def test_a_weighted_sum_has_the_width_of_the_one_that_brings_a_head() -> None:
    site, _, cell = head_for([((5, 0.5), (0, 0.5)), ()])
    site.put(0, WIDTHS[0])
    with torch.no_grad():
        logits = site.mask(site.output(torch.randn(1, 2, HIDDEN))[0], cell.routing)
    assert logits[0].isfinite().all()
    assert logits.shape[1] == 13


def test_a_resident_head_that_no_row_names_costs_no_width() -> None:
    site, _, cell = head_for([((3, 1.0),)])
    site.put(0, WIDTHS[0])
    site.put(3, WIDTHS[3])
    with torch.no_grad():
        logits = site.mask(site.output(torch.randn(1, 1, HIDDEN))[0], cell.routing)
    assert logits.shape[1] == VOCAB


def test_rows_beyond_the_bases_last_have_no_bias_unless_they_bring_one() -> None:
    site, linear, _ = head_for([((0, 1.0),)], bias=True)
    (own,) = added(3, 11).rows
    site.put(0, LinearWeights(None, None, (own,)))
    x = torch.randn(1, 1, HIDDEN)
    with torch.no_grad():
        logits = site.output(x)[0, 0]
        torch.testing.assert_close(logits[3], own.weight[0] @ x[0, 0] + linear.bias[3])
        torch.testing.assert_close(logits[11], own.weight[1] @ x[0, 0])


@pytest.mark.parametrize("slot", [0, 4])
def test_a_dropped_head_is_forgotten(slot: int) -> None:
    site, linear, cell = head_for([((slot, 1.0),)])
    site.put(slot, WIDTHS[slot])
    site.drop(slot)
    x = torch.randn(1, 1, HIDDEN)
    with torch.no_grad():
        assert torch.equal(site.mask(site.output(x)[0], cell.routing), linear(x)[0])
