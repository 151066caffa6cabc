"""Which part of a model one rank holds.

The rank's model is the whole one made narrower: fewer heads, a smaller MLP, fewer rows of the vocabulary. Its
code runs as it is; only where a module has a part of its inputs, its outputs are partial sums that the ranks
add up. Which modules these are is what the model's own tensor-parallel plan says.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..adapters.share import Axis, Share, side_by_side
from ..errors import ModelRefused
from ..fused_linears import PARTS, widths_of_parts
from .ranks import Alone, Ranks

HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"
INNER = ("intermediate_size", "moe_intermediate_size")
"""A config's fields for the widths of MLPs and of experts."""


@dataclass(frozen=True, slots=True)
class HeldParameter:
    """A parameter that several ranks share."""

    axis: int
    """Of the parameter as the model has it: the one along which it is divided."""
    parts: tuple[Axis, ...]
    """Of the linears that are fused in it, one after the other; usually one."""
    is_input: bool
    """Along this axis lie what a linear takes in."""

    @property
    def whole(self) -> Axis:
        return side_by_side(self.parts)


@dataclass(frozen=True, slots=True)
class Split:
    """How one model lies on its ranks, from one of them."""

    ranks: Ranks
    parameters: Mapping[str, HeldParameter] = field(default_factory=dict)
    """By path; those that every rank holds whole are absent."""
    partial: frozenset[str] = frozenset()
    """Paths of modules whose outputs are partial sums."""
    vocabulary: Axis | None = None
    """Token ids whose embeddings and logits this rank has; None: all."""

    def share(self, parameter: str, *, out_offset: int = 0, part: int | None = None) -> Share | None:
        """What this rank holds of a weight; None where it holds the model alone.

        Args:
            parameter: its path.
            out_offset: of the outputs that this rank has, within its site.
            part: only this one of the linears that are fused in it.
        """
        if self.ranks.size == 1:
            return None
        held = self.parameters.get(parameter)
        if held is None:
            return Share(out_offset=out_offset)
        axis = held.whole if part is None else held.parts[part]
        if held.is_input:
            return Share(inputs=axis, out_offset=out_offset, adds_bias=self.ranks.rank == 0)
        return Share(outputs=axis, out_offset=out_offset)


WHOLE = Split(Alone())
"""Of a process that has no others beside it."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A rank's model before its weights are read."""

    config: Any
    """Of the rank's own, narrower model."""
    whole: Any
    """The whole model, without storage."""
    split: Split


def narrow(config: Any, ranks: Ranks) -> Narrowed:
    """A rank's part of the model that `config` describes. Raises ModelRefused where it cannot be divided."""
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ModelRefused(
            f"--tp {ranks.size}: transformers has no tensor-parallel plan for {config.model_type} models; "
            "serve this one with --tp 1"
        )
    own = _narrow_config(config, ranks)
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        part: Any = AutoModelForCausalLM.from_config(own)  # type: ignore[no-untyped-call]
    parameters = dict(_held_parameters(whole, part, config, own, ranks))
    embedding, head = (_weight_path(whole, each) for each in _vocabulary_modules(whole))
    _check_plan(parameters.keys() - {embedding, head}, parameters, _styles(whole, plan), ranks.size)
    partial = frozenset(_owner(whole, name) for name, held in parameters.items() if held.is_input)
    vocabulary = parameters.get(embedding)
    return Narrowed(own, whole, Split(ranks, parameters, partial, vocabulary.whole if vocabulary else None))


def _narrow_config(config: Any, ranks: Ranks) -> Any:
    own, size = copy.deepcopy(config), ranks.size
    heads = getattr(config, HEADS)
    kv_heads = getattr(config, KV_HEADS, None) or heads
    if heads % size:
        raise ModelRefused(f"--tp {size} does not divide this model's {heads} attention heads")
    if kv_heads % size and size % kv_heads:
        raise ModelRefused(f"--tp {size} does not go with this model's {kv_heads} KV heads")
    own.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    setattr(own, HEADS, heads // size)
    if hasattr(config, KV_HEADS):
        setattr(own, KV_HEADS, max(1, kv_heads // size))
    for name in INNER:
        inner = getattr(config, name, None)
        if inner is not None and inner % size:
            raise ModelRefused(f"--tp {size} does not divide this model's {name} of {inner}")
        if inner is not None:
            setattr(own, name, inner // size)
    rows = -(-config.vocab_size // size)
    own.vocab_size = min(rows, config.vocab_size - ranks.rank * rows)
    if (size - 1) * rows >= config.vocab_size:
        raise ModelRefused(f"--tp {size}: a vocabulary of {config.vocab_size} is too small for so many ranks")
    own.pad_token_id = None  # it may lie in another rank's rows, and is of no use here
    return own


def _held_parameters(
    whole: nn.Module, part: nn.Module, config: Any, own: Any, ranks: Ranks
) -> Iterator[tuple[str, HeldParameter]]:
    """Every parameter that is narrower on a rank. Raises ModelRefused where it is not known how."""
    narrow_shapes = {name: p.shape for name, p in part.named_parameters(remove_duplicate=False)}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        held = narrow_shapes[name]
        axes = [
            axis for axis, sizes in enumerate(zip(parameter.shape, held, strict=True)) if len(set(sizes)) > 1
        ]
        if not axes:
            continue
        owner = whole.get_submodule(_owner(whole, name))
        (axis,) = axes if len(axes) == 1 else (-1,)
        widths = [
            _part_widths(owner, name, shape[axis], of)
            for shape, of in ((parameter.shape, config), (held, own))
        ]
        sums = (sum(widths[0]), sum(widths[1]))
        if axis < 0 or sums != (parameter.shape[axis], held[axis]) or parameter.dim() - axis > 2:
            raise ModelRefused(f"--tp {ranks.size}: {name} cannot be divided among ranks")
        parts = tuple(_piece(size, mine, ranks) for size, mine in zip(*widths, strict=True))
        is_input = parameter.dim() > 1 and axis == _input_axis(owner, parameter.dim())
        yield name, HeldParameter(axis, parts, is_input)


def _part_widths(owner: nn.Module, name: str, size: int, config: Any) -> Sequence[int]:
    """Of the linears that are fused in a parameter along the divided axis."""
    if _is_experts(owner):
        halves = name.endswith("gate_up_proj") and owner.is_concatenated
        return [size // 2] * 2 if halves else [size]
    leaf = name.rpartition(".")[0].rpartition(".")[2]
    widths = widths_of_parts(leaf, size, config)
    return [0] if widths is None and leaf in PARTS else widths or [size]


def _piece(size: int, held: int, ranks: Ranks) -> Axis:
    """Equal pieces in the order of ranks, the last one perhaps shorter. Where there are fewer of them than
    ranks, neighbours hold the same one."""
    equal = -(-size // ranks.size)
    first = ranks.rank * equal if held <= equal else ranks.rank * (size // held) // ranks.size * held
    return Axis(size, ((first, first + held),))


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")


def _input_axis(owner: nn.Module, dims: int) -> int:
    """The axis along which inputs lie; -1 where the parameter is no linear's weight."""
    if _is_experts(owner):
        return 1 if owner.is_transposed else 2
    return -1 if isinstance(owner, nn.Embedding) else dims - 1


def _owner(model: nn.Module, parameter: str) -> str:
    """The path of the module that a parameter belongs to."""
    return parameter.rpartition(".")[0]


def _vocabulary_modules(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _weight_path(model: nn.Module, module: nn.Module) -> str:
    return next(f"{path}.weight" for path, each in model.named_modules() if each is module)


def _styles(model: Any, plan: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """The plan's patterns for paths of modules, and how it treats each."""
    prefix = re.escape(f"{model.base_model_prefix}.")
    return [
        (re.compile(prefix + re.escape(pattern).replace(r"\*", r"\d+")), style)
        for pattern, style in plan.items()
    ]


def _check_plan(
    names: Sequence[str] | set[str],
    parameters: Mapping[str, HeldParameter],
    styles: Sequence[tuple[re.Pattern[str], str]],
    size: int,
) -> None:
    """Raise ModelRefused unless the model's plan divides the same parameters in the same direction."""
    for name in sorted(names):
        path = name.removesuffix(".weight").removesuffix(".bias")
        style = next((style for pattern, style in styles if pattern.fullmatch(path)), "")
        wanted = "rowwise" if parameters[name].is_input else "colwise"
        if wanted not in style:
            says = f"divides it {style}" if style else "does not divide it"
            raise ModelRefused(f"--tp {size}: {path} would be divided {wanted}, but the model's plan {says}")
