"""Modules that run with an adapter's own parameters on that adapter's rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import Routing, route
from loraplex.shard.adapters.weights import ModuleWeights
from loraplex.shard.saved_modules import ModuleSite, SiteModule, add_module_sites
from loraplex.shard.sites import ModelSites, RoutingCell, SiteContext
from loraplex.shard.trace import LOGITS, TOKENS, ModuleCall, Trace

DIM = 4
NOTHING = Routing((), ())


@pytest.mark.parametrize(("shape", "axis"), [((1, 5, DIM), 1), ((1, 3, 5, DIM), 2), ((5, DIM), 0)])
def test_each_row_has_its_adapters_parameters(shape: tuple[int, ...], axis: int) -> None:
    entries = [((1, 1.0),), (), ((2, 1.0),), ((1, 1.0),), ((3, 1.0),)]
    norm = nn.LayerNorm(DIM)
    site = ModuleSite(norm, axis, RoutingCell(CpuLoraOps(), route(entries)))
    own = {slot: {"weight": torch.rand(DIM) + 1, "bias": torch.randn(DIM)} for slot in (1, 2)}
    for slot, parameters in own.items():
        site.put(slot, ModuleWeights(parameters))
    x = torch.randn(shape)
    with torch.no_grad():
        got = site.output(x)
        for row, used in enumerate(entries):
            alone = nn.LayerNorm(DIM)
            if used and used[0][0] in own:
                alone.load_state_dict(own[used[0][0]])
            torch.testing.assert_close(got.select(axis, row), alone(x.select(axis, row)))
        site.drop(1)
        site.drop(2)
        assert torch.equal(site.output(x), norm(x))
        assert torch.equal(norm.weight, torch.ones(DIM)), "the base's own parameters are as they were"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("tokens", "heads", "logits", "unclear", "reshaping", "several"):
            self.add_module(name, nn.LayerNorm(DIM))
        self.linear = nn.Linear(DIM, DIM)


def test_only_modules_whose_rows_are_certain_become_sites() -> None:
    model, sites = Model(), ModelSites()
    before = dict(model.named_modules())

    def call(name: str, *shape: int, out: tuple[int, ...] | None = None, plain: bool = True) -> ModuleCall:
        return ModuleCall(name, 1, shape, shape if out is None else out, plain)

    calls = [
        call("tokens", 1, TOKENS, DIM),
        call("heads", 1, 3, TOKENS, DIM),
        call("logits", 1, LOGITS, DIM),
        call("unclear", TOKENS, TOKENS, DIM),
        call("reshaping", 1, TOKENS, DIM, out=(1, TOKENS, 2 * DIM)),
        call("several", 1, TOKENS, DIM, plain=False),
        call("linear", 1, TOKENS, DIM),
    ]
    cells = RoutingCell(CpuLoraOps(), NOTHING), RoutingCell(CpuLoraOps(), route([((0, 1.0),), ()]))
    add_module_sites(model, Trace(calls), SiteContext(CpuLoraOps(), *cells), sites)
    assert [target.name for target in sites.modules] == ["tokens", "heads", "logits"]
    assert [target.site for target in sites.modules] == [0, 1, 2]
    assert sites.modules[0].parameters == (("weight", (DIM,)), ("bias", (DIM,)))
    replaced = {name for name, module in model.named_modules() if module is not before.get(name)}
    assert replaced == {"tokens", "heads", "logits"}
    assert isinstance(model.tokens, SiteModule)
    assert model.tokens.weight is before["tokens"].weight is sites.parameters["tokens.weight"]()
    sites.sites[2].put(0, ModuleWeights({"weight": torch.zeros(DIM), "bias": torch.ones(DIM)}))
    y = model.logits(torch.randn(1, LOGITS, DIM))
    assert (y[0, 0] == 1).all()
    assert not (y[0, 1] == 1).any()
