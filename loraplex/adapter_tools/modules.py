"""Which module each tensor of an adapter belongs to, as far as its name says so without the base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..shard.adapters.safetensors_header import TensorInfo

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.*?)\.?(?P<part>lora_\w+|hada_\w+|lokr_\w+|vera_\w+|ia3_\w+|oft_\w+|boft_\w+|miss_\w+|bone_\w+"
    r"|randlora_\w+|hra_\w+|c3a_\w+|fourierft_\w+|waveft_\w+|delora_\w+|gralora_\w+|vblora_\w+|ln_tuning_\w+|road_\w+"
    r"|ranknum|token_adapter|modules_to_save|original_module)(\..*)?"
)
_WHOLE = re.compile(r"(?P<module>.+?)(\.base_layer)?\.(?P<part>weight|bias|m)")
_LAYER = re.compile(r"(?P<before>.*?\.)(?P<layer>\d+)(?P<after>\..*)")

_NAMES = {
    "lora_A": "A", "lora_B": "B", "lora_a": "A", "lora_b": "B",
    "lora_embedding_A": "embedding A", "lora_embedding_B": "embedding B",
    "lora_magnitude_vector": "magnitude", "m": "magnitude", "lora_E": "E", "token_adapter": "token rows",
    "modules_to_save": "weight",
}  # fmt: skip
_RANK_AXIS = {
    "lora_A": 0, "lora_embedding_A": 0, "lora_a": -1, "hada_w1_a": -1, "hada_w1_b": 0, "lokr_w1_a": -1,
    "lokr_w2_a": -1, "vera_lambda_d": 0, "miss_block": 0,
}  # fmt: skip
"""Which axis of which tensor is as long as the rank."""


@dataclass(frozen=True, slots=True)
class Module:
    """What an adapter holds for one module."""

    name: str
    """Path without `base_model.model.`."""
    parts: tuple[str, ...]
    rank: int
    """0: its tensors do not say."""
    nbytes: int
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that differ in their layer only."""

    name: str
    """The path with `*` for the layer's number."""
    layers: tuple[int, ...]
    """Empty where the path has none."""
    parts: tuple[str, ...]
    rank: int
    scale: float | None
    nbytes: int
    count: int

    @property
    def layer_ranges(self) -> str:
        """`0-11` or `0-3, 8`."""
        ranges: list[list[int]] = []
        for layer in self.layers:
            if ranges and layer == ranges[-1][1] + 1:
                ranges[-1][1] = layer
            else:
                ranges.append([layer, layer])
        return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def modules_of(tensors: Mapping[str, TensorInfo]) -> tuple[Module, ...]:
    """The tensors by module, in the file's order."""
    found: dict[str, list[tuple[str, TensorInfo]]] = {}
    for tensor in tensors.values():
        module, part = _place(tensor.key)
        found.setdefault(module, []).append((part, tensor))
    return tuple(_module(name, members) for name, members in found.items())


def _place(key: str) -> tuple[str, str]:
    """(module, part) of a tensor's name."""
    name = key.removeprefix(_PREFIX)
    match = _PART.fullmatch(name) or _WHOLE.fullmatch(name)
    if match is None:
        return name, "unknown"
    if match["part"] == "lora_B" and name.endswith(".bias"):
        return match["module"], "B bias"
    return match["module"], match["part"]


def _module(name: str, members: Iterable[tuple[str, TensorInfo]]) -> Module:
    members = sorted(members, key=lambda member: member[0])
    ranks = (
        tensor.shape[_RANK_AXIS[part]] for part, tensor in members if part in _RANK_AXIS and tensor.shape
    )
    return Module(
        name=name,
        parts=tuple(dict.fromkeys(_NAMES.get(part, part) for part, _ in members)),
        rank=next(ranks, 0),
        nbytes=sum(tensor.end - tensor.begin for _, tensor in members),
        tensors=tuple(tensor for _, tensor in members),
    )


def grouped(modules: Iterable[tuple[Module, float | None]]) -> list[Group]:
    """Modules with their scales, those together that have all but the layer in common."""
    found: dict[tuple[str, tuple[str, ...], int, float | None], list[tuple[int | None, Module]]] = {}
    for module, scale in modules:
        match = _LAYER.fullmatch(module.name)
        name = f"{match['before']}*{match['after']}" if match else module.name
        layer = int(match["layer"]) if match else None
        rounded = None if scale is None or not math.isfinite(scale) else round(scale, 6)
        found.setdefault((name, module.parts, module.rank, rounded), []).append((layer, module))
    return [
        Group(
            name=name,
            layers=tuple(sorted({layer for layer, _ in members if layer is not None})),
            parts=parts,
            rank=rank,
            scale=scale,
            nbytes=sum(module.nbytes for _, module in members),
            count=len(members),
        )
        for (name, parts, rank, scale), members in found.items()
    ]
