"""The places in a model that adapters change, collected while the model is specialised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..kernels.ops import LoraOps, Routing
from .adapters.changes import AnyTarget
from .adapters.layout import EmbeddingTarget, ExpertsTarget, ModuleTarget, Target
from .adapters.pool import Site
from .trace import Trace


@dataclass(slots=True)
class RoutingCell:
    """The routing of the rows that a set of sites sees in this step; set before each forward pass."""

    routing: Routing


@dataclass(frozen=True, slots=True)
class SiteContext:
    """What every site is given."""

    ops: LoraOps
    tokens: RoutingCell
    """For sites that see every token of a step."""
    logits: RoutingCell
    """For sites that see only the tokens whose logits are wanted."""


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
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    """The base's weights at these sites by path, as `BaseWeights.read` describes them."""

    def add(self, site: Site) -> int:
        """Take a site; answers its number."""
        self.sites.append(site)
        return len(self.sites) - 1

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
