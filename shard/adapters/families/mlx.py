"""Adapters of mlx-lm: LoRA and DoRA with A and B transposed, and one scale for all modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from ...errors import AdapterRejected
from ..changes import EmbeddingChange, ExpertLora, ExpertsChange, LinearChange, ParsedAdapter, Placed, Traits
from ..floats import Float32
from ..layout import AdapterLayout, EmbeddingTarget, ExpertsTarget, Target
from ..safetensors_header import TensorInfo
from ..tensors import Tensors
from .files import AdapterFiles
from .lora_dora import are_inputs_divided, divided_change, linear_scale
from .modules import describe_unusable, expect_rank, expect_shape
from .names import BaseNames

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_SWITCH = re.compile(r"(?P<layer>.+)\.(?:mlp|block_sparse_moe)\.switch_mlp\.(?P<linear>[^.]+)")
"""MLX keeps the same linear of all experts of a layer in one module."""

_FULL = "it replaces whole weights; fuse it into its base with mlx_lm.fuse and serve the fused model"


class _Parameters(msgspec.Struct, forbid_unknown_fields=True):
    rank: int
    scale: float
    dropout: float | None = None
    keys: list[str] | None = None
    alpha: float | None = None


class _Config(msgspec.Struct):
    lora_parameters: _Parameters
    fine_tune_type: str | None = None


def read_mlx(files: AdapterFiles) -> ParsedAdapter:
    """Read an adapter of mlx-lm. Raises AdapterRejected unless every tensor has its place."""
    config = _read_config(files.config)
    modules, unusable = _modules(files)
    names = BaseNames(files.layout)
    reader = _Reader(files, config)
    placed: list[Placed] = []
    for name, parts in modules.items():
        changes = reader.place(name, parts, names)
        if isinstance(changes, str):
            unusable |= {tensor.key: changes for tensor in parts.values()}
        else:
            placed += changes
    if unusable:
        raise AdapterRejected(describe_unusable(unusable, len(files.tensors)))
    kind = "DoRA" if config.fine_tune_type == "dora" else "LoRA"
    return ParsedAdapter(tuple(placed), Traits(kind=f"{kind} of MLX", alone="DoRA" if kind == "DoRA" else ""))


def _read_config(raw: Mapping[str, Any]) -> _Config:
    kind = raw.get("fine_tune_type") or "lora"
    if kind == "full":
        raise AdapterRejected(f"fine_tune_type is full: {_FULL}")
    if kind not in ("lora", "dora"):
        raise AdapterRejected(f"fine_tune_type is {str(kind)[:40]!r}; of MLX's, lora and dora are served")
    try:
        config = msgspec.convert(raw, _Config)
    except msgspec.ValidationError as error:
        raise AdapterRejected(f"adapter_config.json: {error}") from error
    parameters = config.lora_parameters
    if parameters.rank < 1:
        raise AdapterRejected(f"lora_parameters.rank is {parameters.rank}; a rank is at least 1")
    if parameters.alpha not in (None, parameters.rank):
        raise AdapterRejected(
            f"lora_parameters has alpha {parameters.alpha} beside scale {parameters.scale}: early versions "
            "of mlx-lm multiply the scale by alpha / rank, later ones ignore alpha; write what it was "
            "trained with as scale, and remove alpha"
        )
    return config


def _modules(files: AdapterFiles) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, str]]:
    """Tensors by module and part, and why others cannot be applied, by key."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    unusable = {}
    for key, tensor in files.tensors.items():
        if match := _KEY.fullmatch(key):
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            unusable[key] = "not a LoRA tensor of MLX"
    return modules, unusable


class _Reader:
    """Turns one module's tensors into changes."""

    def __init__(self, files: AdapterFiles, config: _Config) -> None:
        self._tensors: Tensors = files.tensors
        self._layout: AdapterLayout = files.layout
        self._base = files.base
        self._rank = config.lora_parameters.rank
        self._scale = np.float32(config.lora_parameters.scale)
        self._is_dora = config.fine_tune_type == "dora"

    def place(self, name: str, parts: Mapping[str, TensorInfo], names: BaseNames) -> list[Placed] | str:
        """The changes that a module's tensors make, or why they cannot be applied."""
        missing = [part for part in self._parts() if part not in parts]
        if missing:
            return f"there is no {missing[0]} beside it; save the adapter again"
        if len(parts) > len(self._parts()):
            return "its config does not say that it is DoRA (fine_tune_type)"
        expect_rank(parts["lora_a"].key, self._rank, self._layout.max_rank)
        if switch := _SWITCH.fullmatch(name):
            experts = names.find(f"{switch['layer']}.mlp.experts")
            if isinstance(experts, ExpertsTarget) and not self._is_dora:
                return self._on_experts(experts, switch["linear"], parts)
            return "the base has no such experts, or not in this form; train without it"
        match names.find(name):
            case Target() as target:
                return [self._on_linear(target, parts)]
            case EmbeddingTarget() as target if not self._is_dora:
                return self._on_embedding(target, parts)
            case None:
                return names.why_unknown(name)
            case _:
                return "adapters of MLX on this kind of module are not served"

    def _parts(self) -> tuple[str, ...]:
        return ("lora_a", "lora_b", "m") if self._is_dora else ("lora_a", "lora_b")

    def _on_linear(self, target: Target, parts: Mapping[str, TensorInfo]) -> Placed:
        a, b = parts["lora_a"], parts["lora_b"]
        expect_shape(a, target.in_features, self._rank)
        expect_shape(b, self._rank, target.out_features)
        if self._is_dora:
            expect_shape(parts["m"], target.out_features)

        def build() -> LinearChange:
            own_a, own_b = self._tensors.read(a.key).T, self._scaled(b).T
            if not self._is_dora:
                return LinearChange(a=own_a, b=own_b)
            return self._dora(target, own_a, own_b, parts["m"].key)

        return Placed(target, self._rank, build)

    def _dora(self, target: Target, a: Float32, b: Float32, magnitude: str) -> LinearChange:
        """With trained norms, under the key `magnitude`; the base's bias stays as it is."""
        if are_inputs_divided(target):
            shift = self._base.read(f"{target.name}.bias") if target.has_bias else None
            return divided_change(target, self._base, a, b, self._tensors.read(magnitude), shift)
        scale = linear_scale(target, self._base, magnitude, self._tensors, a, b)
        shift = self._base.read(f"{target.name}.bias") * (1 - scale) if target.has_bias else None
        with np.errstate(over="ignore"):
            return LinearChange(a=a, b=b * scale[:, None], scale=scale, shift=shift)

    def _on_embedding(self, target: EmbeddingTarget, parts: Mapping[str, TensorInfo]) -> list[Placed]:
        """To the embedding and, where MLX runs it as the output head too, to the head."""
        a, b = parts["lora_a"], parts["lora_b"]
        expect_shape(a, target.vocab_size, self._rank)
        expect_shape(b, self._rank, target.hidden_size)
        heads = [linear for linear in self._layout.linears if linear.tied_to == target.name]

        def build() -> EmbeddingChange:
            return EmbeddingChange(a=self._tensors.read(a.key), b=self._scaled(b).T)

        def build_head() -> LinearChange:
            return LinearChange(a=self._scaled(b), b=self._tensors.read(a.key))

        return [
            Placed(target, self._rank, build),
            *(Placed(head, self._rank, build_head) for head in heads),
        ]

    def _on_experts(
        self, target: ExpertsTarget, linear: str, parts: Mapping[str, TensorInfo]
    ) -> list[Placed] | str:
        """The same linear of every expert: a parameter of the base's, or a half of one."""
        a, b = parts["lora_a"], parts["lora_b"]
        for parameter in target.parameters:
            if linear == parameter.name or linear in parameter.halves:
                width = 1 if linear == parameter.name else len(parameter.halves)
                expect_shape(a, target.experts, self._rank, parameter.in_features)
                expect_shape(b, target.experts, parameter.out_features // width, self._rank)
                return [
                    Placed(
                        target,
                        self._rank,
                        lambda: ExpertsChange(
                            {linear: ExpertLora(self._tensors.read(a.key), self._scaled(b))}
                        ),
                    )
                ]
        return "the base's experts have no such linear"

    def _scaled(self, tensor: TensorInfo) -> Float32:
        with np.errstate(over="ignore"):
            return self._tensors.read(tensor.key) * self._scale
