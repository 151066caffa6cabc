"""Sites: one GEMM for linears that share an input, and what adapters change on top."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import LoraDelta, LoraPart, LoraWeights, Placed, Routing, SiteTable, route
from loraplex.shard.adapters.weights import LinearWeights, ReplacedRows
from loraplex.shard.linear import DenseWeight, LinearSite, SiteLinear
from loraplex.shard.sites import RoutingCell

NOTHING = Routing((), ())


class Counting(CpuLoraOps):
    """A base weight that counts its GEMMs, and an operator that records its calls."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self._dense = DenseWeight.stack(
            [DenseWeight(m.weight.data, None if m.bias is None else m.bias.data) for m in linears]
        )
        self.gemms = 0
        self.deltas: list[tuple[int, Placed]] = []

    @property
    def bias(self) -> torch.Tensor | None:
        return self._dense.bias

    @property
    def out_features(self) -> int:
        return self._dense.out_features

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        self.gemms += 1
        return self._dense.apply(x)

    def start_lora(self, x: torch.Tensor, placed: Placed, table: SiteTable) -> LoraDelta:
        if table:
            self.deltas.append((x.shape[0], placed))
        return super().start_lora(x, placed, table)


def site_of(*linears: nn.Linear, routing: Routing = NOTHING) -> tuple[Counting, LinearSite, list[SiteLinear]]:
    base = Counting(*linears)
    site = LinearSite(base, [each.out_features for each in linears], base, RoutingCell(base, routing))
    members, offset = [], 0
    for linear in linears:
        columns = slice(offset, offset + linear.out_features) if len(linears) > 1 else None
        members.append(SiteLinear(site, columns, None))
        offset += linear.out_features
    return base, site, members


def lora(rank: int, in_features: int, out_features: int) -> LoraWeights:
    b = torch.randn(rank, out_features)
    return LoraWeights(torch.randn(rank, in_features), (LoraPart(0, 0, b),))


def test_members_share_one_gemm_and_each_gets_its_columns() -> None:
    linears = [nn.Linear(8, 6), nn.Linear(8, 2, bias=False), nn.Linear(8, 3)]
    base, _, members = site_of(*linears)
    for _ in range(2):
        x = torch.randn(1, 5, 8)
        for linear, member in zip(linears, members, strict=True):
            torch.testing.assert_close(member(x), linear(x))
    assert base.gemms == 2


def test_another_input_is_computed_anew() -> None:
    linears = [nn.Linear(8, 6), nn.Linear(8, 2)]
    base, _, members = site_of(*linears)
    x, other = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    members[0](x)
    torch.testing.assert_close(members[1](other), linears[1](other))
    assert base.gemms == 2


def test_no_operator_call_without_adapters_in_the_step_or_at_the_site() -> None:
    routing = route([((1, 1.0),), ()])
    weights = LinearWeights(lora(1, 8, 6), None, ())
    for used, resident in ((NOTHING, True), (routing, False)):
        base, site, members = site_of(nn.Linear(8, 6), routing=used)
        if resident:
            site.put(1, weights)
        members[0](torch.randn(1, 2, 8))
        assert base.deltas == []
    base, site, members = site_of(nn.Linear(8, 6), routing=routing)
    site.put(1, weights)
    members[0](torch.randn(1, 2, 8))
    assert base.deltas == [(2, routing)]


def test_zero_rows_pass() -> None:
    _, _, members = site_of(nn.Linear(8, 6))
    assert members[0](torch.empty(1, 0, 8)).shape == (1, 0, 6)


def test_effects_come_in_order_and_touch_their_own_rows_only() -> None:
    """The input scale reaches the base and the replaced rows, not A; the scale reaches both."""
    linear = nn.Linear(8, 6)
    input_scale, scale, shift = torch.rand(8) + 1, torch.rand(6) + 1, torch.randn(6)
    own = ReplacedRows(0, torch.tensor([1, 4]), torch.randn(2, 8), torch.randn(2), 6)
    plain = lora(3, 8, 6)
    part = LoraPart(0, 0, plain.parts[0].b, scale, shift)
    entries = [((5, 0.5),), (), ((5, 0.5),), ((7, 1.0),)]
    _, site, (member,) = site_of(linear, routing=route(entries))
    site.put(5, LinearWeights(LoraWeights(plain.a, (part,)), input_scale, (own,)))
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        got, base = member(x)[0], linear(x)[0]
        w, b = linear.weight.clone(), linear.bias.clone()
        w[own.ids], b[own.ids] = own.weight, own.bias
        x = x[0]
        want = scale * F.linear(x * input_scale, w, b) + 0.5 * (shift + x @ plain.a.T @ plain.parts[0].b)
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])
    assert torch.equal(got[[1, 3]], base[[1, 3]])


def test_the_input_is_left_as_it_is() -> None:
    _, site, (member,) = site_of(nn.Linear(8, 6), routing=route([((0, 1.0),)]))
    site.put(0, LinearWeights(None, torch.rand(8), ()))
    x = torch.randn(1, 1, 8)
    before = x.clone()
    member(x)
    assert torch.equal(x, before)


def test_replaced_rows_lie_at_their_linears_columns_and_keep_the_bases_bias() -> None:
    linears = [nn.Linear(8, 6), nn.Linear(8, 4)]
    own = ReplacedRows(6, None, torch.randn(4, 8), None, 4)
    _, site, members = site_of(*linears, routing=route([(), ((3, 1.0),)]))
    site.put(3, LinearWeights(None, None, (own,)))
    x = torch.randn(1, 2, 8)
    with torch.no_grad():
        first, second = members[0](x)[0], members[1](x)[0]
        torch.testing.assert_close(first, linears[0](x)[0])
        torch.testing.assert_close(second[0], linears[1](x)[0, 0])
        torch.testing.assert_close(second[1], own.weight @ x[0, 1] + linears[1].bias)


def test_a_dropped_slot_changes_nothing_any_more() -> None:
    linear = nn.Linear(8, 6)
    own = ReplacedRows(0, torch.tensor([2]), torch.randn(1, 8), None, 6)
    base, site, (member,) = site_of(linear, routing=route([((2, 1.0),)]))
    site.put(2, LinearWeights(lora(2, 8, 6), torch.rand(8), (own,)))
    x = torch.randn(1, 1, 8)
    assert not torch.allclose(member(x), linear(x))
    site.drop(2)
    site.drop(9)
    base.deltas.clear()
    assert torch.equal(member(x), linear(x))
    assert base.deltas == []
