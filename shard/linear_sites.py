"""Which of a model's linears form a site, and how the sites take their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapters.layout import Target
from .fused_linears import aliases
from .head import HeadSite
from .linear import DenseWeight, LinearSite, SiteLinear
from .sites import ModelSites, SiteContext, replace_module
from .trace import LOGITS, TOKENS, ModuleCall, Trace


def linear_calls(model: nn.Module, trace: Trace) -> list[ModuleCall]:
    """The calls of linears that see all tokens, or those whose logits are wanted."""
    return [
        call
        for call in trace.calls
        if type(model.get_submodule(call.name)) in (nn.Linear, Conv1D)
        and call.is_plain
        and call.input_rows in (TOKENS, LOGITS)
    ]


def group_sites(calls: Sequence[ModuleCall]) -> list[list[ModuleCall]]:
    """Linears of one parent module that were called with the very same input, in calling order.

    Those that see only the tokens whose logits are wanted stay alone.
    """
    sites: dict[tuple[str, int], list[ModuleCall]] = {}
    for call in calls:
        owner = call.name if call.input_rows == LOGITS else call.name.rpartition(".")[0]
        sites.setdefault((owner, call.input_id), []).append(call)
    return list(sites.values())


def add_linear_sites(model: nn.Module, trace: Trace, context: SiteContext, sites: ModelSites) -> None:
    """The SiteBuilder of linears."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied_to = _tied_embedding(model, head)
    for members in group_sites(linear_calls(model, trace)):
        names = [call.name for call in members]
        modules = [model.get_submodule(name) for name in names]
        weight = DenseWeight.stack([_dense(module) for module in modules])
        cell = context.logits if members[0].input_rows == LOGITS else context.tokens
        is_head = modules[0] is head and cell is context.logits
        if is_head:
            site: LinearSite = HeadSite(weight, context.ops, cell)
        else:
            site = LinearSite(weight, len(members), context.ops, cell)
        targets = _targets(names, modules, sites.add(site), is_head, tied_to if is_head else "")
        other_form = aliases(targets, model.config)
        for target in (*targets, *other_form):
            _add_parameters(sites.parameters, target, weight)
        for target, module in zip(targets, modules, strict=True):
            _stand_in(model, site, target, module, is_alone=len(members) == 1)
        sites.linears += targets
        sites.aliases += other_form


def _targets(
    names: Sequence[str], modules: Sequence[nn.Module], site: int, is_head: bool, tied_to: str
) -> list[Target]:
    """What adapters may change at one site."""
    targets, offset = [], 0
    for name, module in zip(names, modules, strict=True):
        transposed = isinstance(module, Conv1D)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        out_features, in_features = weight.shape[::-1] if transposed else weight.shape
        targets.append(
            Target(
                name,
                site,
                in_features,
                out_features,
                offset,
                fan_in_fan_out=transposed,
                has_bias=module.bias is not None,
                is_head=is_head,
                tied_to=tied_to,
            )
        )
        offset += out_features
    return targets


def _add_parameters(parameters: dict[str, torch.Tensor], target: Target, weight: DenseWeight) -> None:
    """A linear's weight [out, in] and bias, as views of its site's."""
    columns = slice(target.out_offset, target.out_offset + target.out_features)
    parameters[f"{target.name}.weight"] = weight.weight[columns]
    if target.has_bias and weight.bias is not None:
        parameters[f"{target.name}.bias"] = weight.bias[columns]


def _stand_in(model: nn.Module, site: LinearSite, target: Target, module: nn.Module, is_alone: bool) -> None:
    """Put a site's columns in the place of one of its linears."""
    columns = None if is_alone else slice(target.out_offset, target.out_offset + target.out_features)
    weight = module.weight if is_alone and not target.fan_in_fan_out else None
    assert weight is None or isinstance(weight, torch.Tensor)
    replace_module(model, target.name, SiteLinear(site, columns, weight))


def _tied_embedding(model: nn.Module, head: nn.Module | None) -> str:
    """The path of the embedding that shares its weight with the output head; empty where none does."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding.weight:
        return ""
    return next(str(path) for path, module in model.named_modules() if module is embedding)


def _dense(module: nn.Module) -> DenseWeight:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    data = weight.data.t().contiguous() if isinstance(module, Conv1D) else weight.data
    return DenseWeight(data, bias.data if isinstance(bias, torch.Tensor) else None)
