"""The places in a model that adapters change, collected while the model is specialised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..kernels.ops import LoraOps, Placed, Routing
from .adapters.base_tensors import ReadTensor
from .adapters.changes import AnyTarget
from .adapters.layout import EmbeddingTarget, ExpertsTarget, ModuleTarget, Target
from .adapters.pool import Site
from .parallel.split import WHOLE, Split
from .trace import Trace

NOTHING = Routing((), ())


class RoutingCell:
    """The routing of the rows that a set of sites sees in this step; set before each forward pass."""

    def __init__(self, ops: LoraOps, routing: Routing = NOTHING) -> None:
        self._ops = ops
        self.begin(routing)

    def begin(self, routing: Routing) -> None:
        """Serve rows of this routing until the next call."""
        self.routing = routing
        self.placed: Placed | None = self._ops.place(routing) if routing.groups else None
        """The routing as the operators read it; None where no row has an adapter."""

    def begin_placed(self, placed: Placed | None) -> None:
        """Serve rows whose adapters only the operators know: those of a captured step."""
        self.routing = NOTHING
        self.placed = placed


@dataclass(frozen=True, slots=True)
class SiteContext:
    """What every site is given."""

    ops: LoraOps
    tokens: RoutingCell
    """For sites that see every token of a step."""
    logits: RoutingCell
    """For sites that see only the tokens whose logits are wanted."""
    split: Split = WHOLE
    """What this rank has of the model."""
    read_whole: Callable[[str], torch.Tensor] | None = None
    """Reads a parameter of which this rank has a part; None where it has the whole model."""


@dataclass(slots=True)
class ModelSites:
    """What adapters can change in one model. Builders add to it."""

    sites: list[Site] = field(default_factory=list)
    """By number."""
    linears: list[Target] = field(default_factory=list)
    aliases: list[Target] = field(default_factory=list)
    embeddings: list[EmbeddingTarget] = field(default_factory=list)
    modules: list[ModuleTarget] = field(default_factory=list)
    experts: list[ExpertsTarget] = field(default_factory=list)
    parameters: dict[str, ReadTensor] = field(default_factory=dict)
    """The base's weights at these sites by path, as `BaseWeights.read` describes them."""
    held: dict[str, ReadTensor] = field(default_factory=dict)
    """Of linears' and the embedding's weights, what this rank holds."""

    def add(self, site: Site) -> int:
        """Take a site; answers its number."""
        self.sites.append(site)
        return len(self.sites) - 1

    def keep(self, path: str, value: torch.Tensor, context: SiteContext) -> None:
        """Add one of the base's weights that is stored as it is meant."""
        read = context.read_whole
        is_part = path in context.split.parameters and read is not None
        self.parameters[path] = partial(read, path) if is_part and read else lambda: value

    @property
    def names(self) -> set[str]:
        """Modules that adapters can change."""
        targets: tuple[AnyTarget, ...] = (*self.linears, *self.embeddings, *self.modules, *self.experts)
        return {target.name for target in targets}


SiteBuilder = Callable[[nn.Module, Trace, SiteContext, ModelSites], None]
"""Finds the places of one kind, puts a stand-in of ours in each of them, and adds their sites and targets."""


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one at this path."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
