"""Sites: one GEMM for linears that share an input, and the adapter delta on top."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from loraplex.kernels.ops import LoraPart, LoraWeights, Routing, SiteTable, route
from loraplex.shard.linear import DenseWeight, Site, SiteLinear

NOTHING = Routing((), ())


class Counting:
    """A base weight that counts its GEMMs, and an operator that records its calls."""

    def __init__(self, *linears: nn.Linear) -> None:
        self._dense = DenseWeight.stack(
            [DenseWeight(m.weight.data, None if m.bias is None else m.bias.data) for m in linears]
        )
        self.gemms = 0
        self.deltas: list[tuple[int, Routing]] = []

    @property
    def out_features(self) -> int:
        return self._dense.out_features

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        self.gemms += 1
        return self._dense.apply(x)

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, routing: Routing, table: SiteTable) -> None:
        self.deltas.append((x.shape[0], routing))


def site_of(
    *linears: nn.Linear, routing: Routing = NOTHING, table: SiteTable | None = None
) -> tuple[Counting, list[SiteLinear]]:
    base = Counting(*linears)
    site = Site(base, len(linears), base, {} if table is None else table, SimpleNamespace(routing=routing))
    members, offset = [], 0
    for linear in linears:
        members.append(SiteLinear(site, offset, linear.out_features, None))
        offset += linear.out_features
    return base, members


def test_members_share_one_gemm_and_each_gets_its_columns() -> None:
    linears = [nn.Linear(8, 6), nn.Linear(8, 2, bias=False), nn.Linear(8, 3)]
    base, members = site_of(*linears)
    for _ in range(2):
        x = torch.randn(1, 5, 8)
        for linear, member in zip(linears, members, strict=True):
            torch.testing.assert_close(member(x), linear(x))
    assert base.gemms == 2


def test_another_input_is_computed_anew() -> None:
    linears = [nn.Linear(8, 6), nn.Linear(8, 2)]
    base, members = site_of(*linears)
    x, other = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    members[0](x)
    torch.testing.assert_close(members[1](other), linears[1](other))
    assert base.gemms == 2


def test_no_operator_call_without_adapters_in_the_step_or_at_the_site() -> None:
    routing = route([((1, 1.0),), ()])
    weights = LoraWeights(torch.zeros(1, 8), (LoraPart(0, 0, torch.zeros(1, 6)),))
    for used, table in ((NOTHING, {1: weights}), (routing, {})):
        base, members = site_of(nn.Linear(8, 6), routing=used, table=table)
        members[0](torch.randn(1, 2, 8))
        assert base.deltas == []
    base, members = site_of(nn.Linear(8, 6), routing=routing, table={1: weights})
    members[0](torch.randn(1, 2, 8))
    assert base.deltas == [(2, routing)]


def test_zero_rows_pass() -> None:
    _, members = site_of(nn.Linear(8, 6))
    assert members[0](torch.empty(1, 0, 8)).shape == (1, 0, 6)
