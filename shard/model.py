"""A transformers causal LM, loaded once and specialised for flat batches, paged KV and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..kernels.ops import LoraOps, LoraWeights, Routing
from .adapters.digest import weight_digest
from .adapters.layout import AdapterLayout, BaseWeight, Target
from .attention import NAME, PagedAttention, register
from .batch import Batch
from .kv import KvCache
from .linear import DenseWeight, Site, SiteLinear
from .trace import LinearCall, Trace


class StepModel(Protocol):
    """What the engine runs a step on."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [L, vocab] of the batch's logit rows; writes the batch's keys and values to the cache."""
        ...


@dataclass(slots=True)
class RoutingCell:
    """The routing of the rows that a set of sites sees in this step; set before each forward pass."""

    routing: Routing


class CausalModel:
    """The base with its linears replaced by sites and its attention by the paged one.

    Owns the model; reads the adapter tables, which the pool writes between steps.
    """

    def __init__(
        self, model: nn.Module, attention: PagedAttention, cells: tuple[RoutingCell, RoutingCell]
    ) -> None:
        self._model = model
        self._attention = attention
        self._token_cell, self._logit_cell = cells

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        self._token_cell.routing = batch.token_routing
        self._logit_cell.routing = batch.logit_routing
        self._attention.begin(batch)
        output = self._model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.logit_rows,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def group_sites(calls: Sequence[LinearCall]) -> list[list[LinearCall]]:
    """Linears of one parent module that were called with the very same input, in calling order."""
    sites: dict[tuple[str, int], list[LinearCall]] = {}
    for call in calls:
        parent = call.name.rpartition(".")[0]
        sites.setdefault((parent, call.input_id), []).append(call)
    return list(sites.values())


@dataclass(frozen=True, slots=True)
class Specialised:
    """The result of `specialise`: a model that runs steps, and what adapters may change in it."""

    model: CausalModel
    layout: AdapterLayout


def specialise(
    model: nn.Module,
    trace: Trace,
    *,
    kv: KvCache,
    ops: LoraOps,
    tables: list[dict[int, LoraWeights]],
    max_rank: int,
) -> Specialised:
    """Replace every traced linear of `model` by its columns of a site, and its attention by the paged one.

    Changes `model` in place and fills `tables` with one empty slot table for each site, in site order.
    """
    heads = _saved_copies(model, trace)
    attention = PagedAttention(kv)
    nothing = Routing((), ())
    tokens, logits = RoutingCell(nothing), RoutingCell(nothing)
    targets: list[Target] = []
    for index, members in enumerate(group_sites(trace.linears)):
        tables.append({})
        modules = [model.get_submodule(call.name) for call in members]
        weights = [_dense(module) for module in modules]
        source = logits if members[0].on_logits else tokens
        site = Site(DenseWeight.stack(weights), len(members), ops, tables[-1], source)
        targets += _replace(model, index, [call.name for call in members], modules, site)
    register(attention.forward)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    layout = AdapterLayout(tuple(targets), _other_modules(model, targets), dtype, max_rank, heads)
    return Specialised(CausalModel(model, attention, (tokens, logits)), layout)


def _replace(
    model: nn.Module, index: int, names: Sequence[str], modules: Sequence[nn.Module], site: Site
) -> list[Target]:
    """Put a site's columns in the places of its linears; answers what adapters may change there."""
    targets, offset = [], 0
    for name, module in zip(names, modules, strict=True):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        transposed = isinstance(module, Conv1D)
        out_features, in_features = weight.shape[::-1] if transposed else weight.shape
        kept = weight if len(names) == 1 and not transposed else None
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, SiteLinear(site, offset, out_features, kept))
        targets.append(Target(name, index, in_features, out_features, offset, transposed))
        offset += out_features
    return targets


def _saved_copies(model: nn.Module, trace: Trace) -> tuple[BaseWeight, ...]:
    """The output head, of which PEFT saves a copy beside an adapter for it."""
    copies = []
    for call in trace.linears:
        if call.on_logits:
            weight = model.get_submodule(call.name).weight
            assert isinstance(weight, torch.Tensor)
            data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
            copies.append(BaseWeight(call.name, weight_digest(data.data)))
    return tuple(copies)


def _dense(module: nn.Module) -> DenseWeight:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    data = weight.data.t().contiguous() if isinstance(module, Conv1D) else weight.data
    return DenseWeight(data, bias.data if isinstance(bias, torch.Tensor) else None)


def _other_modules(model: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
    """Modules that hold weights of their own and are no target: embeddings, norms, experts."""
    served = {target.name for target in targets}
    return tuple(
        name
        for name, module in model.named_modules()
        if name not in served and next(module.parameters(recurse=False), None) is not None
    )
