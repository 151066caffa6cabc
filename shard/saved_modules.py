"""Modules that an adapter brings whole: norms, and whatever else has vectors for weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call

from .adapters.layout import ModuleTarget
from .adapters.weights import ModuleWeights, SiteWeights
from .sites import ModelSites, RoutingCell, SiteContext, replace_module
from .trace import LOGITS, TOKENS, ModuleCall, Trace


class ModuleSite:
    """A module that runs again, with an adapter's parameters, on the rows of adapters that bring some."""

    def __init__(self, module: nn.Module, axis: int, cell: RoutingCell) -> None:
        """`axis`: of its input and output, the one along which the step's rows lie."""
        self.module = module
        self._axis = axis
        self._cell = cell
        self._parameters: dict[int, Mapping[str, torch.Tensor]] = {}

    def put(self, slot: int, weights: SiteWeights) -> None:
        """Keep one adapter's ModuleWeights."""
        assert isinstance(weights, ModuleWeights)
        self._parameters[slot] = weights.parameters

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known."""
        self._parameters.pop(slot, None)

    @property
    def is_idle(self) -> bool:
        """Whether no adapter of this step brings parameters."""
        return not self._parameters or self._parameters.keys().isdisjoint(self._cell.routing.slots)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """What the module makes of x, in its shape."""
        y: torch.Tensor = self.module.forward(x)
        if not self.is_idle:
            self._replace_rows(y, x)
        return y

    def _replace_rows(self, y: torch.Tensor, x: torch.Tensor) -> None:
        before = (slice(None),) * self._axis
        for group in self._cell.routing.groups:
            for slot, _ in group.entries:
                if slot in self._parameters:
                    rows = (*before, group.rows)
                    y[rows] = functional_call(self.module, dict(self._parameters[slot]), (x[rows],))


class SiteModule(nn.Module):
    """Stands where the base's module stood. Its parameters stay visible under their names."""

    def __init__(self, site: ModuleSite, module: nn.Module) -> None:
        super().__init__()
        self.site = site
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site.output(x)


def add_module_sites(model: nn.Module, trace: Trace, context: SiteContext, sites: ModelSites) -> None:
    """The SiteBuilder of modules whose parameters are vectors; of those that no other builder has taken."""
    served = sites.names
    for call in trace.calls:
        if call.name in served:
            continue
        module = model.get_submodule(call.name)
        place = _place(call, context)
        if place is None or not _has_only_vectors(module):
            continue
        axis, cell = place
        site = ModuleSite(module, axis, cell)
        own = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
        sites.modules.append(ModuleTarget(call.name, sites.add(site), own))
        for name, value in module.named_parameters():
            sites.keep(f"{call.name}.{name}", value, context)
        replace_module(model, call.name, SiteModule(site, module))


def _place(call: ModuleCall, context: SiteContext) -> tuple[int, RoutingCell] | None:
    """The axis along which the rows lie, and their routing. None where that is not certain."""
    if not call.is_plain or call.input_shape != call.output_shape:
        return None
    if call.input_shape[:-1].count(TOKENS) == 1:
        return call.input_shape.index(TOKENS), context.tokens
    return (1, context.logits) if call.input_shape[:-1] == (1, LOGITS) else None


def _has_only_vectors(module: nn.Module) -> bool:
    return all(parameter.dim() == 1 for parameter in module.parameters()) and not list(module.children())
