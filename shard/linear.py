"""The base's linears with adapter deltas, grouped into sites that share one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.ops import LoraOps, Routing, SiteTable


class RoutingSource(Protocol):
    """Where a site finds the routing of the rows it is about to see."""

    @property
    def routing(self) -> Routing: ...


class BaseWeight(Protocol):
    """A site's base weight, however it is stored."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out], bias added, in x's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A plain [out, in] matrix with an optional bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    @classmethod
    def stack(cls, parts: Sequence[DenseWeight]) -> DenseWeight:
        """Weights of linears that share an input, one below the other; a single one is kept as it is."""
        if len(parts) == 1:
            return parts[0]
        weight = torch.cat([part.weight for part in parts])
        if all(part.bias is None for part in parts):
            return cls(weight, None)
        biases = [weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
        return cls(weight, torch.cat(biases))


class Site:
    """Linears that share one input: one GEMM and one set of shrinks serve them all.

    The first member that is called with a new input computes every member's output; the others take
    their columns of it. The output is dropped once every member has had its own.
    """

    def __init__(
        self, weight: BaseWeight, members: int, ops: LoraOps, table: SiteTable, source: RoutingSource
    ) -> None:
        self._weight = weight
        self._members = members
        self._ops = ops
        self._table = table
        self._source = source
        self._x: torch.Tensor | None = None
        self._y: torch.Tensor | None = None
        self._served = 0

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., sum of the members' outputs]."""
        if self._x is not x or self._y is None:
            self._x, self._y, self._served = x, self._compute(x), 0
        y = self._y
        self._served += 1
        if self._served == self._members:
            self._x = self._y = None
        return y

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self._weight.apply(rows)
        routing = self._source.routing
        if routing.groups and self._table:
            self._ops.add_lora(y, rows, routing, self._table)
        return y.view(*x.shape[:-1], y.shape[-1])


class SiteLinear(nn.Module):
    """Stands where one linear of the base stood: its columns of the site's output."""

    def __init__(self, site: Site, out_offset: int, out_features: int, weight: torch.Tensor | None) -> None:
        """`weight` stays visible where it is tied to another module's and for code that reads its dtype."""
        super().__init__()
        self._site = site
        self._columns = slice(out_offset, out_offset + out_features)
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._site.output(x)[..., self._columns]
