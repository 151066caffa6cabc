"""Linears that some models of a family have fused, others apart: an adapter may have been made for either.

Either way they lie side by side in one site's output, so the other form is just another range of its columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .adapters.layout import Target
from .adapters.share import Axis, Share, side_by_side

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused linears, and what they hold one after the other."""

_FUSED_IN: Mapping[str, frozenset[str]] = {
    "phi3": frozenset(PARTS),
    "glm": frozenset({"gate_up_proj"}),
    "glm4": frozenset({"gate_up_proj"}),
}
"""Model types whose fused linears hold these parts in this order, unlike CodeGen's `qkv_proj`."""


def widths_of_parts(leaf: str, size: int, config: Any) -> list[int] | None:
    """Outputs of the linears that lie one after the other in a linear of this name; None where it is one
    alone, or their order is not known.

    Args:
        leaf: the last part of its path.
        size: its outputs.
        config: the model's, for its type and its heads.
    """
    if leaf not in _FUSED_IN.get(config.model_type, ()):
        return None
    parts = len(PARTS[leaf])
    return _head_widths(config) if parts == 3 else [size // parts] * parts


def aliases(targets: Sequence[Target], config: Any, held: Mapping[str, Sequence[Axis]]) -> list[Target]:
    """The other form of one site's linears: the fused one of those apart, or the parts of a fused one.

    Args:
        targets: the linears of one site, in the order of their columns.
        config: the model's, for its type and its heads.
        held: of fused linears that several ranks share, by path, what this rank has of each part.
    """
    found = []
    for fused, parts in PARTS.items():
        for index, target in enumerate(targets):
            parent, _, leaf = target.name.rpartition(".")
            if leaf == fused and (widths := widths_of_parts(leaf, target.out_features, config)):
                axes = held.get(target.name) or [Axis(width, ((0, width),)) for width in widths]
                found += _apart(target, [f"{parent}.{part}" for part in parts], axes)
            members = targets[index : index + len(parts)]
            if [member.name for member in members] == [f"{parent}.{part}" for part in parts]:
                found.append(_together(f"{parent}.{fused}", members))
    return found


def _together(name: str, members: Sequence[Target]) -> Target:
    first = members[0]
    share = first.share
    if share is not None:
        outputs = side_by_side(tuple(_outputs(member) for member in members))
        share = replace(share, outputs=outputs)
    return replace(
        first,
        name=name,
        out_features=sum(member.out_features for member in members),
        has_bias=any(member.has_bias for member in members),
        share=share,
    )


def _outputs(target: Target) -> Axis:
    held = target.share.outputs if target.share else None
    return held or Axis(target.out_features, ((0, target.out_features),))


def _apart(fused: Target, names: Sequence[str], axes: Sequence[Axis]) -> list[Target]:
    """The parts of a fused linear; none where they do not add up to it."""
    if sum(axis.size for axis in axes) != fused.out_features:
        return []
    found, offset, held_offset = [], fused.out_offset, fused.held_offset
    for name, axis in zip(names, axes, strict=True):
        share = fused.share and Share(outputs=axis, out_offset=held_offset)
        found.append(replace(fused, name=name, out_offset=offset, out_features=axis.size, share=share))
        offset += axis.size
        held_offset += axis.held
    return found


def _head_widths(config: Any) -> list[int]:
    """Outputs of queries, keys and values."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = size * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return [size * config.num_attention_heads, keys, keys]
