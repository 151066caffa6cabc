"""Which of a model's linears form a site, and how the sites take their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapters.base_tensors import ReadTensor
from .adapters.layout import Target
from .fused_linears import aliases
from .head import HeadSite
from .linear import BaseWeight, DenseWeight, LinearSite, SiteLinear
from .packed_weight import packed
from .parallel.split import Split
from .parallel.vocabulary import VocabularyShare
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
        parts = [_dense(module) for module in modules]
        is_tied = modules[0] is head and bool(tied_to)
        dense = DenseWeight.stack(parts)
        weight = dense if is_tied else packed(dense)
        cell = context.logits if members[0].input_rows == LOGITS else context.tokens
        is_head = modules[0] is head and cell is context.logits
        split = context.split
        if is_head:
            vocabulary = VocabularyShare.of(split, weight.out_features)
            site: LinearSite = HeadSite(weight, context.ops, cell, vocabulary)
        else:
            adders = split.ranks if split.partial.issuperset(names) else None
            site = LinearSite(weight, [part.out_features for part in parts], context.ops, cell, adders)
        targets = _targets(names, modules, sites.add(site), is_head, tied_to if is_head else "", split)
        parts_held = {
            name: held.parts
            for name in names
            if (held := split.parameters.get(f"{name}.weight")) is not None and len(held.parts) > 1
        }
        other_form = aliases(targets, model.config, parts_held)
        whole = _whole_site(names, targets, weight, context.read_whole)
        for target in (*targets, *other_form):
            _add_parameters(sites.parameters, target, *whole)
            sites.held[f"{target.name}.weight"] = partial(_held_rows, weight, target)
        for target, module in zip(targets, modules, strict=True):
            _stand_in(model, site, target, module, is_kept=weight is parts[0])
        sites.linears += targets
        sites.aliases += other_form


def _targets(
    names: Sequence[str],
    modules: Sequence[nn.Module],
    site: int,
    is_head: bool,
    tied_to: str,
    split: Split,
) -> list[Target]:
    """What adapters may change at one site."""
    targets, offset, held_offset = [], 0, 0
    for name, module in zip(names, modules, strict=True):
        transposed = isinstance(module, Conv1D)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        held_outputs, held_inputs = weight.shape[::-1] if transposed else weight.shape
        share = split.share(f"{name}.weight", out_offset=held_offset)
        outputs, inputs = (share.outputs, share.inputs) if share else (None, None)
        target = Target(
            name,
            site,
            inputs.size if inputs else held_inputs,
            outputs.size if outputs else held_outputs,
            offset,
            fan_in_fan_out=transposed,
            has_bias=module.bias is not None,
            is_head=is_head,
            tied_to=tied_to,
            share=share,
        )
        targets.append(target)
        offset += target.out_features
        held_offset += held_outputs
    return targets


def _whole_site(
    names: Sequence[str],
    targets: Sequence[Target],
    weight: BaseWeight,
    read: Callable[[str], torch.Tensor] | None,
) -> tuple[ReadTensor, ReadTensor]:
    """What reads a site's weight [out, in] and bias [out] as every rank together has them.

    `read`: as of a SiteContext.
    """
    if read is None:
        return weight.dense, lambda: _given(weight.bias)

    def weights() -> torch.Tensor:
        return torch.cat([read(f"{name}.weight") for name in names])

    def biases() -> torch.Tensor:
        # Where linears of a site differ, the ones without a bias have zeros for one.
        parts = zip(names, targets, strict=True)
        dtype = _given(weight.bias).dtype
        return torch.cat(
            [
                read(f"{name}.bias") if target.has_bias else torch.zeros(target.out_features, dtype=dtype)
                for name, target in parts
            ]
        )

    return weights, biases


def _given(bias: torch.Tensor | None) -> torch.Tensor:
    assert bias is not None
    return bias


def _held_rows(weight: BaseWeight, target: Target) -> torch.Tensor:
    """What this rank has of a linear, [held outputs, held inputs], out of its site's."""
    return weight.dense()[target.held_offset : target.held_offset + target.held_outputs]


def _add_parameters(
    parameters: dict[str, ReadTensor], target: Target, weight: ReadTensor, bias: ReadTensor
) -> None:
    """A linear's weight [out, in] and bias, out of its site's."""
    columns = slice(target.out_offset, target.out_offset + target.out_features)
    parameters[f"{target.name}.weight"] = lambda: weight()[columns]
    if target.has_bias:
        parameters[f"{target.name}.bias"] = lambda: bias()[columns]


def _stand_in(
    model: nn.Module, site: LinearSite, target: Target, module: nn.Module, *, is_kept: bool
) -> None:
    """Put a site's columns in the place of one of its linears.

    `is_kept`: the site has the linear's own weight, which stays visible where it is not stored transposed.
    """
    is_alone = site.width == target.held_outputs
    columns = None if is_alone else slice(target.held_offset, target.held_offset + target.held_outputs)
    weight = module.weight if is_kept and not target.fan_in_fan_out else None
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
