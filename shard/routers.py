"""The routers of mixture-of-experts layers: modules, not linears, that apply one weight of their own as one.

What a router makes of its logits differs from model to model and stays the model's own: only the one call of
`torch.nn.functional.linear` within its forward is diverted to a site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..kernels.ops import LoraOps
from .adapters.layout import Target
from .adapters.weights import SiteWeights
from .linear import DenseWeight, LinearSite
from .sites import ModelSites, RoutingCell, SiteContext
from .trace import TOKENS, ModuleCall, Trace


class RouterWeight(DenseWeight):
    """A router's weight and bias. Some models have their routers compute in fp32."""

    __slots__ = ()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RouterSite(LinearSite):
    """A router's one linear."""

    def __init__(self, weight: RouterWeight, ops: LoraOps, cell: RoutingCell) -> None:
        super().__init__(weight, [weight.out_features], ops, cell)
        self._slots: set[int] = set()

    def put(self, slot: int, weights: SiteWeights) -> None:
        """Keep one adapter's LinearWeights."""
        super().put(slot, weights)
        self._slots.add(slot)

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known."""
        super().drop(slot)
        self._slots.discard(slot)

    @property
    def is_idle(self) -> bool:
        """Whether no adapter of this step changes the router."""
        return self._slots.isdisjoint(self._cell.routing.slots)


class _Diverted(TorchFunctionMode):
    """Answers `linear` by a function of ours while it is entered."""

    def __init__(self, linear: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._linear = linear

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def add_router_sites(model: nn.Module, trace: Trace, context: SiteContext, sites: ModelSites) -> None:
    """The SiteBuilder of routers that see all tokens of a step."""
    served = sites.names
    for call in trace.calls:
        module = model.get_submodule(call.name)
        weight = None if call.name in served else _router_weight(module, call)
        if weight is None:
            continue
        site = RouterSite(weight, context.ops, context.tokens)
        out_features, in_features = weight.weight.shape
        has_bias = weight.bias is not None
        sites.linears.append(
            Target(call.name, sites.add(site), in_features, out_features, 0, has_bias=has_bias)
        )
        sites.keep(f"{call.name}.weight", weight.weight, context)
        if weight.bias is not None:
            sites.keep(f"{call.name}.bias", weight.bias, context)
        _divert(module, site)


def _divert(module: nn.Module, site: RouterSite) -> None:
    """Have `module` compute its one linear by `site`. It stays in its place: models read more of it."""
    forward = module.forward

    def diverted(*args: Any, **kwargs: Any) -> Any:
        if site.is_idle:
            return forward(*args, **kwargs)
        with _Diverted(lambda x, *weights: site.output(x)):
            return forward(*args, **kwargs)

    module.forward = diverted


def _router_weight(module: nn.Module, call: ModuleCall) -> RouterWeight | None:
    """The weight that `module` applies to its input, if that is the one linear in it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    if not call.is_plain or call.input_rows != TOKENS or call.input_shape[-1] != weight.shape[1]:
        return None
    linears = _linears_within(module, torch.ones(call.input_shape, dtype=weight.dtype, device=weight.device))
    if len(linears) != 1:
        return None
    x, used, bias = linears[0]
    if x.numel() != math.prod(call.input_shape) or not torch.equal(used.to(weight.dtype), weight):
        return None
    if bias is not None and bias is not getattr(module, "bias", None):
        return None
    return RouterWeight(weight.data, None if bias is None else bias.data)


@torch.inference_mode()
def _linears_within(
    module: nn.Module, x: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Input, weight and bias of every linear that `module` computes of x."""
    linears = []

    def note(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        linears.append((x, weight, bias))
        return F.linear(x, weight, bias)

    with _Diverted(note):
        module(x)
    return linears
