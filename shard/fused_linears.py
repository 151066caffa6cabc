"""Linears that some models of a family have fused, others apart: an adapter may have been made for either.

Either way they lie side by side in one site's output, so the other form is just another range of its columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from .adapters.layout import Target

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


def aliases(targets: Sequence[Target], config: Any) -> list[Target]:
    """The other form of one site's linears: the fused one of those apart, or the parts of a fused one.

    Args:
        targets: the linears of one site, in the order of their columns.
        config: the model's, for its type and its heads.
    """
    found = []
    for fused, parts in PARTS.items():
        for index, target in enumerate(targets):
            parent, _, leaf = target.name.rpartition(".")
            if leaf == fused and fused in _FUSED_IN.get(config.model_type, ()):
                found += _apart(target, [f"{parent}.{part}" for part in parts], config)
            members = targets[index : index + len(parts)]
            if [member.name for member in members] == [f"{parent}.{part}" for part in parts]:
                found.append(_together(f"{parent}.{fused}", members))
    return found


def _together(name: str, members: Sequence[Target]) -> Target:
    return replace(
        members[0],
        name=name,
        out_features=sum(member.out_features for member in members),
        has_bias=any(member.has_bias for member in members),
    )


def _apart(fused: Target, names: Sequence[str], config: Any) -> list[Target]:
    """The parts of a fused linear; none where the model's heads do not add up to it."""
    widths = [fused.out_features // 2] * 2 if len(names) == 2 else _head_widths(config)
    if sum(widths) != fused.out_features:
        return []
    edges = accumulate(widths, initial=fused.out_offset)
    return [
        replace(fused, name=name, out_offset=start, out_features=end - start)
        for name, (start, end) in zip(names, pairwise(edges), strict=True)
    ]


def _head_widths(config: Any) -> list[int]:
    """Outputs of queries, keys and values."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = size * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return [size * config.num_attention_heads, keys, keys]
