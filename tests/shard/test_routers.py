"""Routers with adapters, row by row, against the base's own module with merged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import Entries, LoraPart, LoraWeights, Routing, route
from loraplex.shard.adapters.weights import LinearWeights
from loraplex.shard.routers import RouterSite, add_router_sites
from loraplex.shard.sites import ModelSites, RoutingCell, SiteContext
from loraplex.shard.trace import TOKENS, ModuleCall, Trace

EXPERTS, HIDDEN = 5, 16


class Fp32Router(nn.Module):
    """Logits in fp32, whatever the model is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, HIDDEN))
        self.register_buffer("correction", torch.linspace(0, 1, EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x.type(torch.float32), self.weight.type(torch.float32))
        return logits.sigmoid() + self.correction


class TwoLinears(nn.Module):
    """Applies its weight twice: no router."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.weight), self.weight)


class OtherWeight(TwoLinears):
    """Applies its weight transposed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.t())


_SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": 2}
ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralTopKRouter(MixtralConfig(num_local_experts=EXPERTS, **_SIZES)),
    "qwen3_moe": lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=EXPERTS, **_SIZES)),
    "gpt_oss": lambda: GptOssTopKRouter(GptOssConfig(num_local_experts=EXPERTS, **_SIZES)),
    "fp32": Fp32Router,
}


class Bench:
    """A model of one router, with its site."""

    def __init__(self, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(1)
        self.plain = build().to(dtype).requires_grad_(False)
        for parameter in self.plain.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.router = copy.deepcopy(self.plain)
        self.cell = RoutingCell(CpuLoraOps(), Routing((), ()))
        self.found = ModelSites()
        call = ModuleCall("gate", 1, (TOKENS, HIDDEN), (), True)
        context = SiteContext(CpuLoraOps(), self.cell, RoutingCell(CpuLoraOps(), Routing((), ())))
        add_router_sites(nn.ModuleDict({"gate": self.router}), Trace([call]), context, self.found)

    def put(self, slot: int, lora: LoraWeights) -> None:
        [site] = self.found.sites
        site.put(slot, LinearWeights(lora, None, ()))

    def merged(self, entries: Entries, adapters: dict[int, LoraWeights]) -> nn.Module:
        result = copy.deepcopy(self.plain)
        for slot, weight in entries:
            lora = adapters[slot]
            delta = weight * lora.parts[0].b.t().double() @ lora.a.double()
            result.weight.data = (result.weight.double() + delta).to(result.weight.dtype)
        return result

    def run(self, x: torch.Tensor, row_entries: list[Entries]) -> list[torch.Tensor]:
        """The router's outputs; that which is not by row is left out."""
        self.cell.begin(route(row_entries))
        return outputs(self.router, x)


def outputs(router: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    result = router(x)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def lora(rank: int, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, HIDDEN, generator=generator), torch.randn(rank, EXPERTS, generator=generator)
    return LoraWeights(a, (LoraPart(0, 0, b),))


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ROUTERS)
def test_every_row_has_its_own_adapters(name: str) -> None:
    bench = Bench(ROUTERS[name])
    adapters = {0: lora(2, 1), 3: lora(5, 2)}
    for slot, weights in adapters.items():
        bench.put(slot, weights)
    row_entries: list[Entries] = [(), ((0, 1.0),), ((3, 0.5),), ((0, -0.5), (3, 1.0)), (), ((0, 1.0),)]
    x = rows(len(row_entries))
    got = bench.run(x, row_entries)
    for row, entries in enumerate(row_entries):
        one = slice(row, row + 1)
        expected = outputs(bench.merged(entries, adapters), x[one])
        for ours, other in zip(got, expected, strict=True):
            torch.testing.assert_close(ours[one], other, rtol=1e-5, atol=1e-5)
    base = outputs(bench.plain, x)[0]
    assert (got[0] - base).abs().max(1).values.gt(1e-3).tolist() == [bool(entries) for entries in row_entries]


def test_a_router_in_fp32_of_a_model_in_bf16() -> None:
    bench = Bench(Fp32Router, torch.bfloat16)
    weights = lora(2, 1)
    bench.put(0, weights)
    x = rows(4).bfloat16()
    exact = copy.deepcopy(bench.plain).float()
    exact.weight.data += weights.parts[0].b.t() @ weights.a
    [got] = bench.run(x, [((0, 1.0),)] * 4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact(x), rtol=1e-5, atol=1e-5)


def test_a_step_without_adapters_for_it_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(ROUTERS["mixtral"])
    bench.put(0, lora(2, 1))
    monkeypatch.setattr(RouterSite, "compute", None)
    x = rows(3)
    for entries in ((), ((1, 1.0),)):
        for ours, other in zip(bench.run(x, [entries] * 3), outputs(bench.plain, x), strict=True):
            assert torch.equal(ours, other)
    [site] = bench.found.sites
    site.drop(0)
    site.drop(0)
    bench.run(x, [((0, 1.0),)] * 3)


def test_what_adapters_can_change_is_an_ordinary_linear() -> None:
    bench = Bench(ROUTERS["gpt_oss"])
    [target] = bench.found.linears
    assert (target.name, target.site, target.in_features, target.out_features) == ("gate", 0, HIDDEN, EXPERTS)
    assert target.has_bias
    assert torch.equal(bench.found.parameters["gate.weight"](), bench.plain.weight)
    assert torch.equal(bench.found.parameters["gate.bias"](), bench.plain.bias)


def test_models_still_see_the_rest_of_their_router() -> None:
    assert torch.equal(Bench(Fp32Router).router.correction, torch.linspace(0, 1, EXPERTS))


@pytest.mark.parametrize("build", [TwoLinears, OtherWeight])
def test_other_modules_are_left_alone(build: Callable[[], nn.Module]) -> None:
    assert Bench(build).found.sites == []
