"""The experts of mixture-of-experts layers with adapter deltas.

A layer's experts, as transformers' ExpertsInterface has them, are one module with two 3-D parameters. It is
called with rows [T, hidden], the experts chosen for each row [T, k] and their weights [T, k]. A row together
with one of its experts is a *pair*: everything here is computed on pairs, sorted by expert and, within one,
by list of adapters. To the operator, an adapter's share of one expert is a slot of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..kernels.ops import Entries, LoraOps, LoraPart, LoraWeights, Placed, Routing, RowGroup
from .adapters.layout import ExpertsParameter, ExpertsTarget
from .adapters.weights import ExpertWeights, SiteWeights
from .parallel.ranks import Ranks
from .parallel.split import Split
from .sites import ModelSites, RoutingCell, SiteContext, replace_module
from .trace import TOKENS, Trace

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""What transformers' `use_experts_implementation` gives a module."""


@dataclass(frozen=True, slots=True)
class ExpertsLinear:
    """The same linear of every expert of the base."""

    name: str
    weight: torch.Tensor
    """[experts, out, in], however it is stored."""
    bias: torch.Tensor | None
    """[experts, out]."""
    halves: tuple[str, ...]
    """As in ExpertsParameter."""

    def apply(self, x: torch.Tensor, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """x [pairs, in] -> [pairs, out]. `spans` as in _Pairs; 0 where there is no expert."""
        y = x.new_empty(len(x), self.weight.shape[1])
        stop = 0
        for expert, start, stop in spans:
            torch.mm(x[start:stop], self.weight[expert].t(), out=y[start:stop])
            if self.bias is not None:
                y[start:stop] += self.bias[expert]
        y[stop:] = 0
        return y


@dataclass(frozen=True, slots=True)
class BaseExperts:
    """One layer's experts as the base has them."""

    up: ExpertsLinear
    activate: Callable[[torch.Tensor], torch.Tensor]
    """[pairs, out of `up`] -> [pairs, in of `down`]."""
    down: ExpertsLinear


def read_experts(module: nn.Module) -> BaseExperts | None:
    """The experts in `module`; None unless it follows transformers' interface in a form that is served."""
    if not all(hasattr(module, flag) for flag in _FLAGS) or getattr(module, "has_post_expert_norm", False):
        return None
    if module.has_gate:
        halves = ("gate_proj", "up_proj") if module.is_concatenated else ()
        up, activate = _linear(module, "gate_up_proj", halves), module._apply_gate
    else:
        up, activate = _linear(module, "up_proj", ()), module.act_fn
    return BaseExperts(up, activate, _linear(module, "down_proj", ()))  # type: ignore[arg-type]


def _linear(module: nn.Module, name: str, halves: tuple[str, ...]) -> ExpertsLinear:
    weight = getattr(module, name).data
    bias = getattr(module, f"{name}_bias").data if module.has_bias else None
    return ExpertsLinear(name, weight.transpose(1, 2) if module.is_transposed else weight, bias, halves)


def add_expert_sites(model: nn.Module, trace: Trace, context: SiteContext, sites: ModelSites) -> None:
    """The SiteBuilder of experts: of every layer that gives them all tokens of a step."""
    numbers = GroupNumbers(context.tokens)
    for call in trace.calls:
        module = model.get_submodule(call.name)
        base = read_experts(module)
        if base is None or len(call.input_shape) != 2 or call.input_rows != TOKENS:
            continue
        split = context.split
        site = ExpertsSite(base, context.ops, numbers, split.ranks if call.name in split.partial else None)
        parameters = []
        for linear in (base.up, base.down):
            experts = len(linear.weight)
            transposed = bool(module.is_transposed)
            parameters.append(_parameter(f"{call.name}.{linear.name}", linear, transposed, split))
            sites.keep(f"{call.name}.{linear.name}", getattr(module, linear.name).data, context)
        sites.experts.append(ExpertsTarget(call.name, sites.add(site), experts, tuple(parameters)))
        replace_module(model, call.name, SiteExperts(site, module))


def _parameter(path: str, linear: ExpertsLinear, transposed: bool, split: Split) -> ExpertsParameter:
    """What adapters may change in one parameter of the experts."""
    _, held_outputs, held_inputs = linear.weight.shape
    share = split.share(path)
    outputs, inputs = (share.outputs, share.inputs) if share else (None, None)
    return ExpertsParameter(
        linear.name,
        inputs.size if inputs else held_inputs,
        outputs.size if outputs else held_outputs,
        transposed,
        linear.halves,
        share,
        split.share(path, part=0) if linear.halves else None,
    )


class GroupNumbers:
    """The group of every row of a step, as numbers, worked out once for all layers."""

    def __init__(self, cell: RoutingCell) -> None:
        self._cell = cell
        self._routing: Routing | None = None
        self._numbers = torch.empty(0, dtype=torch.int64)

    @property
    def routing(self) -> Routing:
        """Of the rows."""
        return self._cell.routing

    def of_rows(self, rows: int, device: torch.device) -> torch.Tensor:
        """[rows] int64: 1 + the index of the row's group, 0 for the base alone."""
        routing = self._cell.routing
        if routing is not self._routing:
            self._numbers = torch.zeros(rows, dtype=torch.int64, device=device)
            for number, group in enumerate(routing.groups, start=1):
                self._numbers[group.rows] = number
            self._routing = routing
        return self._numbers


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The pairs of one step in the order in which they are computed."""

    order: torch.Tensor
    """[pairs] int64: row * k + choice, of the pair at each position."""
    spans: Sequence[tuple[int, int, int]]
    """(expert, first position, last position + 1), ascending. No expert: the positions behind the last."""
    placed: Placed | None
    """The routing of the positions; an adapter's share of one expert has the key slot * experts + expert."""


class _Deltas:
    """What the slots add to one linear of every expert."""

    def __init__(self, experts: int, name: str, out_offset: int, width: int, ops: LoraOps) -> None:
        self._experts = experts
        self._name = name
        self._out_offset = out_offset
        self._ops = ops
        self._table = ops.site_table([width], shares=experts)

    def put(self, slot: int, weights: ExpertWeights) -> None:
        if (lora := weights.parameters.get(self._name)) is not None:
            shares = zip(lora[0].unbind(), lora[1].unbind(), strict=True)
            for expert, (a, b) in enumerate(shares):
                part = LoraPart(0, self._out_offset, b)
                self._table[slot * self._experts + expert] = LoraWeights(a, (part,))

    def drop(self, slot: int) -> None:
        for share in range(slot * self._experts, (slot + 1) * self._experts):
            self._table.pop(share, None)

    def add(self, y: torch.Tensor, x: torch.Tensor, placed: Placed) -> None:
        if self._table:
            self._ops.start_lora(x, placed, self._table).add_to(y)


class ExpertsSite:
    """The experts of one layer."""

    def __init__(
        self, base: BaseExperts, ops: LoraOps, numbers: GroupNumbers, adders: Ranks | None = None
    ) -> None:
        """`adders`: who adds up the outputs, where each rank has a part of the experts' inner width."""
        self._base = base
        self._adders = adders
        self._ops = ops
        self._numbers = numbers
        self._slots: set[int] = set()
        self._experts = len(base.up.weight)
        self._up = self._deltas(base.up)
        self._down = self._deltas(base.down)

    def _deltas(self, linear: ExpertsLinear) -> list[_Deltas]:
        """One for the whole linear, and one for each half of it."""
        width = linear.weight.shape[1]
        whole = _Deltas(self._experts, linear.name, 0, width, self._ops)
        share = width // max(1, len(linear.halves))
        halves = [
            _Deltas(self._experts, half, index * share, share, self._ops)
            for index, half in enumerate(linear.halves)
        ]
        return [whole, *halves]

    def put(self, slot: int, weights: SiteWeights) -> None:
        """Keep one adapter's ExpertWeights."""
        assert isinstance(weights, ExpertWeights)
        self._slots.add(slot)
        for deltas in (*self._up, *self._down):
            deltas.put(slot, weights)

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known."""
        if slot in self._slots:
            self._slots.remove(slot)
            for deltas in (*self._up, *self._down):
                deltas.drop(slot)

    def output(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, hidden], chosen [T, k] int64, weights [T, k] -> [T, hidden]."""
        pairs = self._pairs(chosen)
        inputs = x[pairs.order // chosen.shape[1]]
        hidden = self._base.activate(self._project(self._base.up, self._up, inputs, pairs))
        outputs = self._project(self._base.down, self._down, hidden, pairs)
        # The router's weights may be fp32: the sum over a row's experts is cast once, behind it.
        weighted = outputs * weights.reshape(-1)[pairs.order, None]
        by_row = torch.empty_like(weighted)
        by_row[pairs.order] = weighted
        y = by_row.view(*chosen.shape, -1).sum(1).to(x.dtype)
        return y if self._adders is None else self._adders.sum(y)

    def _project(
        self, linear: ExpertsLinear, changes: Sequence[_Deltas], x: torch.Tensor, pairs: _Pairs
    ) -> torch.Tensor:
        """x [pairs, in] -> [pairs, out], with every pair's adapters."""
        y = linear.apply(x, pairs.spans)
        if pairs.placed is not None:
            for deltas in changes:
                deltas.add(y, x, pairs.placed)
        return y

    def _pairs(self, chosen: torch.Tensor) -> _Pairs:
        """Sort the step's pairs by expert and, where any adapter changes these experts, by group of rows."""
        entries = self._entries()
        width = 1 + len(entries)
        keys = chosen
        if entries:
            keys = chosen * width + self._numbers.of_rows(len(chosen), chosen.device)[:, None]
        ordered, order = keys.reshape(-1).sort(stable=True)
        found, counts = ordered.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        spans: list[tuple[int, int, int]] = []
        groups: list[RowGroup] = []
        start = 0
        for key, count in zip(found.tolist(), counts.tolist(), strict=True):
            expert, number = divmod(key, width)
            if expert >= self._experts:
                break
            stop = start + count
            first = spans.pop()[1] if spans and spans[-1][0] == expert else start
            spans.append((expert, first, stop))
            if number and entries[number - 1]:
                shares = tuple((slot * self._experts + expert, w) for slot, w in entries[number - 1])
                groups.append(RowGroup(shares, slice(start, stop), count))
            start = stop
        slots = {slot for group in groups for slot, _ in group.entries}
        routing = Routing(tuple(groups), tuple(sorted(slots)), rows=ordered.numel())
        return _Pairs(order, spans, self._ops.place(routing, shares=self._experts) if groups else None)

    def _entries(self) -> list[Entries]:
        """Of each group of rows, the adapters that change these experts; empty where no group has any."""
        routing = self._numbers.routing
        if self._slots.isdisjoint(routing.slots):
            return []
        return [
            tuple(entry for entry in group.entries if entry[0] in self._slots) for group in routing.groups
        ]


class SiteExperts(nn.Module):
    """Stands where the experts of one layer stood, with the same parameters under the same names."""

    def __init__(self, site: ExpertsSite, module: nn.Module) -> None:
        super().__init__()
        self._site = site
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self._site.output(hidden_states, top_k_index, top_k_weights)
