"""Experts with adapters, row by row, against the base's own module with merged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import Entries, Placed, SiteTable, route
from loraplex.shard.adapters.weights import ExpertWeights
from loraplex.shard.config import ShardConfig
from loraplex.shard.experts import ExpertsSite, GroupNumbers, read_experts
from loraplex.shard.load import load_model
from loraplex.shard.sites import RoutingCell

EXPERTS, HIDDEN, INNER, CHOICES, ROWS = 5, 16, 12, 2, 14


@use_experts_implementation(has_gate=False)
class UngatedExperts(nn.Module):
    """Experts without a gate: up, activation, down."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.act_fn = nn.ReLU()

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for row, choice in torch.ones_like(chosen).nonzero().tolist():
            expert = chosen[row, choice]
            hidden = self.act_fn(self.up_proj[expert] @ x[row])
            y[row] += weights[row, choice] * (self.down_proj[expert] @ hidden)
        return y


def gated() -> nn.Module:
    """Gate and up one after the other, stored [experts, out, in]."""
    return MixtralExperts(
        MixtralConfig(
            num_local_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            experts_implementation="eager",
        )
    )


def interleaved() -> nn.Module:
    """Gate and up interleaved, stored [experts, in, out], with biases."""
    return GptOssExperts(
        GptOssConfig(
            num_local_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            experts_implementation="eager",
        )
    )


def ungated() -> nn.Module:
    return UngatedExperts(SimpleNamespace(_experts_implementation="eager"))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "gated": gated,
    "interleaved": interleaved,
    "ungated": ungated,
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(1)
    module = MODULES[kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


def lora(rank: int, in_features: int, out_features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(EXPERTS, rank, in_features, generator=generator) * 0.3,
        torch.randn(EXPERTS, rank, out_features, generator=generator) * 0.3,
    )


def adapters(kind: str) -> dict[int, ExpertWeights]:
    """By slot: both parameters, the last alone, the first alone, and halves of it where there are any."""
    up, wide = ("up_proj", INNER) if kind == "ungated" else ("gate_up_proj", 2 * INNER)
    found = {
        0: ExpertWeights({up: lora(3, HIDDEN, wide, 1), "down_proj": lora(3, INNER, HIDDEN, 2)}),
        2: ExpertWeights({"down_proj": lora(1, INNER, HIDDEN, 3)}),
        7: ExpertWeights({up: lora(8, HIDDEN, wide, 4)}),
    }
    if kind == "gated":
        found[4] = ExpertWeights(
            {"gate_proj": lora(2, HIDDEN, INNER, 5), "up_proj": lora(5, HIDDEN, INNER, 6)}
        )
        found[5] = ExpertWeights({"up_proj": lora(4, HIDDEN, INNER, 7)})
    return found


def merged(module: nn.Module, entries: Entries, by_slot: dict[int, ExpertWeights]) -> nn.Module:
    """The module with the weighted sum of these adapters in its weights."""
    result = copy.deepcopy(module)
    for slot, weight in entries:
        for name, (a, b) in by_slot[slot].parameters.items() if slot in by_slot else ():
            delta = weight * b.transpose(1, 2) @ a
            parameter, rows = {
                "gate_proj": ("gate_up_proj", slice(INNER)),
                "up_proj": ("gate_up_proj", slice(INNER, None)),
            }.get(name, (name, slice(None)))
            if not hasattr(result, parameter):
                parameter, rows = name, slice(None)
            target = getattr(result, parameter).data
            (target.transpose(1, 2) if result.is_transposed else target)[:, rows] += delta
    return result


def step(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, their experts and the experts' weights."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, HIDDEN, generator=generator)
    weights, chosen = torch.rand(rows, EXPERTS, generator=generator).topk(CHOICES)
    return x, chosen, weights


def site_of(module: nn.Module, row_entries: Sequence[Entries], ops: object = None) -> ExpertsSite:
    base = read_experts(module)
    assert base is not None
    numbers = GroupNumbers(RoutingCell(CpuLoraOps(), route(row_entries)))
    return ExpertsSite(base, CpuLoraOps() if ops is None else ops, numbers)  # type: ignore[arg-type]


class NoOps(CpuLoraOps):
    """Adapters' work that must not be asked for."""

    def start_lora(self, x: torch.Tensor, placed: Placed, table: SiteTable) -> NoReturn:
        raise AssertionError("the operator was called")


@pytest.mark.parametrize("kind", MODULES)
def test_every_row_has_its_own_adapters(kind: str) -> None:
    """Base, single adapters, sums, an adapter that leaves the experts alone; rows of one kind lie apart."""
    module, by_slot = build(kind), adapters(kind)
    lists: list[Entries] = [
        (), ((0, 1.0),), ((2, 1.0),), ((7, 0.5),), ((0, 0.5), (7, -1.5)), ((3, 1.0),), ((0, 1.0), (3, 2.0)),
    ]  # fmt: skip
    if kind == "gated":
        lists += [((4, 1.0),), ((5, 1.0), (0, 0.25))]
    row_entries = [lists[row % len(lists)] for row in range(ROWS)]
    site = site_of(module, row_entries)
    for slot, weights in by_slot.items():
        site.put(slot, weights)
    x, chosen, weights = step()
    y = site.output(x, chosen, weights)
    for row, entries in enumerate(row_entries):
        one = slice(row, row + 1)
        expected = merged(module, entries, by_slot)(x[one], chosen[one], weights[one])
        torch.testing.assert_close(y[one], expected, rtol=1e-5, atol=1e-5)
        if any(slot in by_slot for slot, _ in entries):
            plain = module(x[one], chosen[one], weights[one])
            assert (y[one] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MODULES)
def test_the_base_alone_is_the_module_itself(kind: str) -> None:
    module = build(kind)
    x, chosen, weights = step()
    expected = module(x, chosen, weights)
    idle = site_of(module, [((9, 1.0),)] * ROWS, NoOps())
    torch.testing.assert_close(idle.output(x, chosen, weights), expected, rtol=1e-5, atol=1e-6)
    idle.put(2, adapters(kind)[2])
    torch.testing.assert_close(idle.output(x, chosen, weights), expected, rtol=1e-5, atol=1e-6)


def test_a_dropped_slot_is_forgotten() -> None:
    module, by_slot = build("gated"), adapters("gated")
    site = site_of(module, [((4, 1.0), (0, 1.0))] * ROWS)
    for slot, weights in by_slot.items():
        site.put(slot, weights)
    x, chosen, weights = step()
    site.drop(4)
    site.drop(4)
    expected = merged(module, ((0, 1.0),), by_slot)(x, chosen, weights)
    torch.testing.assert_close(site.output(x, chosen, weights), expected, rtol=1e-5, atol=1e-5)
    for slot in by_slot:
        site.drop(slot)
    torch.testing.assert_close(site.output(x, chosen, weights), module(x, chosen, weights))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    module, by_slot = build("gated"), adapters("gated")
    x, chosen, weights = step()
    row_entries: list[Entries] = [((0, 1.0),) if row % 3 else () for row in range(ROWS)]
    together = site_of(module, row_entries)
    together.put(0, by_slot[0])
    y = together.output(x, chosen, weights)
    for row in range(ROWS):
        alone = site_of(module, row_entries[row : row + 1])
        alone.put(0, by_slot[0])
        one = slice(row, row + 1)
        torch.testing.assert_close(alone.output(x[one], chosen[one], weights[one]), y[one])


def test_a_choice_of_no_expert_adds_nothing() -> None:
    module, by_slot = build("interleaved"), adapters("interleaved")
    site = site_of(module, [((0, 1.0),)] * ROWS)
    site.put(0, by_slot[0])
    x, chosen, weights = step()
    chosen[::2, 1] = EXPERTS
    y = site.output(x, chosen, weights)
    first = merged(module, ((0, 1.0),), by_slot)(x[::2], chosen[::2, :1], weights[::2, :1])
    torch.testing.assert_close(y[::2], first, rtol=1e-5, atol=1e-5)


def test_the_next_step_has_its_own_rows() -> None:
    module, by_slot = build("gated"), adapters("gated")
    cell = RoutingCell(CpuLoraOps(), route([((0, 1.0),), ()]))
    base = read_experts(module)
    assert base is not None
    site = ExpertsSite(base, CpuLoraOps(), GroupNumbers(cell))
    site.put(0, by_slot[0])
    x, chosen, weights = step(3)
    adapted = merged(module, ((0, 1.0),), by_slot)
    for row_entries in ([((0, 1.0),), ()], [(), (), ((0, 1.0),)], [()] * 3):
        rows = len(row_entries)
        cell.begin(route(row_entries))
        y = site.output(x[:rows], chosen[:rows], weights[:rows])
        for row, entries in enumerate(row_entries):
            one = slice(row, row + 1)
            expected = (adapted if entries else module)(x[one], chosen[one], weights[one])
            torch.testing.assert_close(y[one], expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_no_worse_than_the_base() -> None:
    module, by_slot = build("gated"), adapters("gated")
    x, chosen, weights = step()
    exact = merged(module, ((0, 1.0),), by_slot)(x, chosen, weights)
    plain = module(x, chosen, weights)
    half = copy.deepcopy(module).bfloat16()
    site = site_of(half, [((0, 1.0),)] * ROWS)
    pairs = by_slot[0].parameters.items()
    site.put(0, ExpertWeights({name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in pairs}))
    y = site.output(x.bfloat16(), chosen, weights)
    assert y.dtype == torch.bfloat16
    base_error = (half(x.bfloat16(), chosen, weights).float() - plain).norm() / plain.norm()
    assert (y.float() - exact).norm() / exact.norm() <= 1.5 * base_error


def test_other_forms_of_experts_are_left_alone() -> None:
    module = build("gated")
    module.has_post_expert_norm = True
    assert read_experts(module) is None
    assert read_experts(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_models_experts_are_sites(kind: str, tiny_model: Callable[[str], Path]) -> None:
    """The gate has compared packed rows through them with the untouched model."""
    loaded = load_model(ShardConfig(model=str(tiny_model(kind)), device="cpu", kv_memory=1 << 20))
    assert [target.name for target in loaded.layout.experts] == [
        f"model.layers.{layer}.mlp.experts" for layer in range(3)
    ]
    for target in loaded.layout.experts:
        site = loaded.sites[target.site]
        assert isinstance(site, ExpertsSite)
        gate_up, down = target.parameters
        assert (gate_up.name, gate_up.halves) == ("gate_up_proj", ("gate_proj", "up_proj"))
        assert (gate_up.in_features, down.out_features) == (64, 64)
        assert gate_up.out_features == 2 * down.in_features
        stored = loaded.base.read(f"{target.name}.{down.name}")
        assert stored.shape == (target.experts, down.out_features, down.in_features)
        assert target.name not in loaded.layout.other_modules
