"""The base's linears with what adapters change in them, grouped into sites that share one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.ops import LoraDelta, LoraOps, Placed, Routing, SiteTable
from .adapters.weights import LinearWeights, ReplacedRows, SiteWeights
from .parallel.ranks import Ranks
from .sites import RoutingCell


class BaseWeight(Protocol):
    """A site's base weight, however it is stored."""

    @property
    def bias(self) -> torch.Tensor | None:
        """[out]."""
        ...

    @property
    def out_features(self) -> int: ...

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out], bias added, in x's dtype."""
        ...

    def dense(self) -> torch.Tensor:
        """[out, in]: what is multiplied by; a copy where it is not stored like that."""
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

    def dense(self) -> torch.Tensor:
        return self.weight

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


class LinearSite:
    """Linears that share one input: one GEMM and one set of shrinks serve them all.

    The first member that is called with a new input computes every member's output; the others take
    their columns of it. The output is dropped once every member has had its own. What adapters bring is
    kept in a table for each kind of change, so that a kind that no resident adapter uses costs nothing.
    """

    def __init__(
        self,
        weight: BaseWeight,
        widths: Sequence[int],
        ops: LoraOps,
        cell: RoutingCell,
        adders: Ranks | None = None,
    ) -> None:
        """
        Args:
            widths: outputs of the linears, in the order in which `weight` has them.
            adders: who adds up this site's outputs, where each rank has a part of its inputs.
        """
        self._weight = weight
        self.width = sum(widths)
        self._members = len(widths)
        self._ops = ops
        self._cell = cell
        self._adders = adders
        self._lora = ops.site_table(widths)
        self._input_scales: dict[int, torch.Tensor] = {}
        self._rows: dict[int, tuple[ReplacedRows, ...]] = {}
        self._x: torch.Tensor | None = None
        self._y: torch.Tensor | None = None
        self._served = 0

    @property
    def weight(self) -> BaseWeight:
        """The base's."""
        return self._weight

    @property
    def table(self) -> SiteTable:
        """What the operators apply."""
        return self._lora

    @property
    def placed(self) -> Placed | None:
        """This step's adapters, as the operators read them."""
        return self._cell.placed

    @property
    def is_partial(self) -> bool:
        """Whether ranks add up what each of them makes here."""
        return self._adders is not None

    @property
    def is_plain(self) -> bool:
        """Whether the operators alone apply what resident adapters change here."""
        return not (self._input_scales or self._rows)

    def put(self, slot: int, weights: SiteWeights) -> None:
        """Keep one adapter's LinearWeights."""
        assert isinstance(weights, LinearWeights)
        if weights.lora is not None:
            self._lora[slot] = weights.lora
        if weights.input_scale is not None:
            self._input_scales[slot] = weights.input_scale
        if weights.rows:
            self._rows[slot] = weights.rows

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known."""
        for table in (self._lora, self._input_scales, self._rows):
            table.pop(slot, None)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., sum of the members' outputs]."""
        if self._members == 1:
            return self.compute(x)
        if self._x is not x or self._y is None:
            self._x, self._y, self._served = x, self.compute(x), 0
        y = self._y
        self._served += 1
        if self._served == self._members:
            self._x = self._y = None
        return y

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """As `output`, for a caller that wants all of it once."""
        y, delta = self.begin(x.reshape(-1, x.shape[-1]))
        if delta is not None:
            delta.add_to(y)
        if self._adders is not None:
            y = self._adders.sum(y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, LoraDelta | None]:
        """What the base makes of x [rows, in], and what is still to be added to it; of this rank alone."""
        placed = self._cell.placed
        if placed is None:
            return self._weight.apply(x), None
        routing = self._cell.routing
        delta = self._ops.start_lora(x, placed, self._lora)
        inputs = self._scale_input(x, routing) if self._input_scales else x
        y = self._base_output(inputs, routing)
        if self._rows:
            self._replace_rows(y, inputs, routing)
        return y, delta

    def _base_output(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """What the base makes of x [rows, in], with room for every column that these rows' adapters bring."""
        return self._weight.apply(x)

    def _scale_input(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """A copy of x in which the rows of adapters with an input scale are multiplied by it."""
        x = x.clone()
        for group in routing.groups:
            for slot, _ in group.entries:
                if slot in self._input_scales:
                    x[group.rows] = (x[group.rows].float() * self._input_scales[slot]).to(x.dtype)
        return x

    def _replace_rows(self, y: torch.Tensor, inputs: torch.Tensor, routing: Routing) -> None:
        """Compute the columns of `y` whose weights an adapter brings, for that adapter's rows, in place."""
        for group in routing.groups:
            for slot, _ in group.entries:
                for own in self._rows.get(slot, ()):
                    new = F.linear(inputs[group.rows], own.weight, self._own_bias(own))
                    y[_block(group.rows, own)] = new

    def _own_bias(self, own: ReplacedRows) -> torch.Tensor | None:
        """[n]: the bias of replaced rows; where they bring none, the base's, and 0 beyond its last row."""
        base = self._weight.bias
        if own.bias is not None or base is None:
            return own.bias
        if own.ids is None:
            columns = torch.arange(len(own.weight), device=base.device) + own.out_offset
        else:
            columns = own.ids + own.out_offset
        return base[columns.clamp(max=len(base) - 1)] * (columns < len(base))


def _block(
    rows: slice | torch.Tensor, own: ReplacedRows
) -> tuple[slice | torch.Tensor, slice | torch.Tensor]:
    """The index of these rows' replaced columns in a site's output."""
    if own.ids is None:
        return rows, slice(own.out_offset, own.out_offset + len(own.weight))
    columns = own.ids + own.out_offset
    return (rows[:, None] if isinstance(rows, torch.Tensor) else rows), columns


class SiteLinear(nn.Module):
    """Stands where one linear of the base stood: its columns of the site's output."""

    def __init__(self, site: LinearSite, columns: slice | None, weight: torch.Tensor | None) -> None:
        """`columns`: None where it is the site's only linear. `weight` stays visible where it is tied to
        another module's and for code that reads its dtype."""
        super().__init__()
        self.site = site
        self.columns = columns
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.site.output(x)
        return y if self.columns is None else y[..., self.columns]
