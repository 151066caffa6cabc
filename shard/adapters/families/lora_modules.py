"""The tensors of a LORA adapter by the base module they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...errors import AdapterRejected
from ..changes import AnyTarget
from ..layout import EmbeddingTarget, ExpertsTarget, ModuleTarget, Target
from ..safetensors_header import TensorInfo
from .experts import Sides, locate_experts, targets_parameter
from .files import AdapterFiles
from .lora_config import LoraSpec
from .lora_keys import (
    B_BIAS,
    BIAS,
    DIAGONAL,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_PARTS,
    MAGNITUDE,
    TOKENS,
    WEIGHT,
    A,
    B,
    LoraKey,
    is_unused,
    parse_key,
    why_refused,
)
from .modules import describe_unusable
from .names import BaseNames

_ON_LINEARS = frozenset({A, B, B_BIAS, MAGNITUDE, DIAGONAL, TOKENS, WEIGHT, BIAS})
_ON_EMBEDDINGS = frozenset({EMBEDDING_A, EMBEDDING_B, MAGNITUDE, TOKENS, WEIGHT})
_EXPERT_SIDES = {A: "A", B: "B"}

_NOT_SELECTED = "its config does not select this module (target_modules, layers, exclusions)"


class Misfit(Exception):
    """A tensor that cannot be applied, and why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What an adapter has for one module of the base."""

    target: Target | EmbeddingTarget | ModuleTarget
    path: str
    """As the file names the module: what the config's patterns are matched with."""
    parts: dict[str, TensorInfo] = field(default_factory=dict)
    """By part, as `lora_keys` names them."""

    @property
    def has_lora(self) -> bool:
        return not LORA_PARTS.isdisjoint(self.parts)


@dataclass(frozen=True, slots=True)
class SortedTensors:
    """Every tensor of an adapter that takes part in the forward pass."""

    modules: Mapping[str, LoraModule]
    """By the target's name."""
    experts: Mapping[str, Sides]
    """LoRA on experts, by path."""
    warnings: tuple[str, ...]


def sort_tensors(files: AdapterFiles, names: BaseNames, spec: LoraSpec) -> SortedTensors:
    """Find the module of every tensor.

    Raises AdapterRejected naming the keys that are for no module of the base or that the config does not
    select, two keys that mean one place, a file with several adapters, and what the config names but the file
    has nothing of.
    """
    sorter = _Sorter(files, names, spec)
    unusable: dict[str, str] = {}
    for tensor in files.tensors.values():
        try:
            sorter.add(tensor)
        except Misfit as misfit:
            unusable[misfit.key] = misfit.reason
    if unusable:
        raise AdapterRejected(describe_unusable(unusable, len(files.tensors)))
    _check_saved(sorter.modules, files, spec)
    _check_named(sorter, spec)
    return SortedTensors(sorter.modules, sorter.experts, sorter.warnings())


class _Sorter:
    def __init__(self, files: AdapterFiles, names: BaseNames, spec: LoraSpec) -> None:
        self._tensors = files.tensors
        self._config = files.config
        self._names = names
        self._spec = spec
        self._adapter: tuple[str, str] | None = None
        self._left_out = 0
        self.modules: dict[str, LoraModule] = {}
        self.experts: dict[str, dict[str, TensorInfo]] = {}

    def add(self, tensor: TensorInfo) -> None:
        """Put a tensor into its module. Raises Misfit where it has none."""
        if is_unused(tensor.key):
            return
        key = parse_key(tensor.key)
        if key is None:
            raise Misfit(tensor.key, why_refused(tensor.key, self._names))
        if self._names.in_other_tower(key.modules[0]):
            self._left_out += 1
            return
        if key.part in LORA_PARTS:
            self._check_adapter(key, tensor)
        path = key.modules[0]
        if key.part in _EXPERT_SIDES and locate_experts(path, self._names.find) is not None:
            self._put(self.experts.setdefault(path, {}), _EXPERT_SIDES[key.part], tensor)
            return
        path, target = self._find(key, tensor)
        if key.part in LORA_PARTS:
            path = self._selected_path(path, target, tensor)
        module = self.modules.setdefault(target.name, LoraModule(target, path))
        self._put(module.parts, key.part, tensor)

    def warnings(self) -> tuple[str, ...]:
        if not self._left_out:
            return ()
        return (f"{self._left_out} tensors of a vision or audio model were left out: text alone is served",)

    def _check_adapter(self, key: LoraKey, tensor: TensorInfo) -> None:
        """A file that was put together by hand may name its adapter in some keys only."""
        if not key.adapter:
            return
        name, first = self._adapter = self._adapter or (key.adapter, tensor.key)
        if key.adapter != name:
            raise AdapterRejected(
                f"its weights file holds more than one adapter ({name!r} in {first} and {key.adapter!r} in "
                f"{tensor.key}); save each to a directory of its own"
            )

    def _find(self, key: LoraKey, tensor: TensorInfo) -> tuple[str, Target | EmbeddingTarget | ModuleTarget]:
        for path in key.modules:
            target = self._names.find(path)
            if target is not None and not isinstance(target, ExpertsTarget) and _takes(target, key.part):
                return path, target
        raise Misfit(tensor.key, why_refused(tensor.key, self._names))

    def _selected_path(self, path: str, target: AnyTarget, tensor: TensorInfo) -> str:
        """The path that the config selects a module by: its own, or its weight's. Raises Misfit."""
        is_tied = isinstance(target, EmbeddingTarget) or (isinstance(target, Target) and target.tied_to)
        if self._spec.tied and is_tied:
            return path
        if any(self._spec.selection.selects(name) for name in (path, target.name)):
            return path
        if targets_parameter(self._config, f"{path}.weight"):
            return f"{path}.weight"
        raise Misfit(tensor.key, _NOT_SELECTED)

    def _put(self, parts: dict[str, TensorInfo], part: str, tensor: TensorInfo) -> None:
        other = parts.setdefault(part, tensor)
        if other is tensor:
            return
        # PEFT writes a saved module under two names when the vocabulary was resized.
        if part not in (WEIGHT, BIAS) or not self._are_equal(tensor, other):
            raise AdapterRejected(f"{tensor.key} and {other.key} mean the same tensor; keep one")

    def _are_equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        return one.shape == other.shape and np.array_equal(
            self._tensors.read(one.key), self._tensors.read(other.key)
        )


def _takes(target: Target | EmbeddingTarget | ModuleTarget, part: str) -> bool:
    """Whether a target has such a part."""
    if isinstance(target, Target):
        return part in _ON_LINEARS
    if isinstance(target, EmbeddingTarget):
        return part in _ON_EMBEDDINGS
    return part in dict(target.parameters)


def _check_saved(modules: Mapping[str, LoraModule], files: AdapterFiles, spec: LoraSpec) -> None:
    """Every module that the config has saved, and that the base has, is in the file."""
    layout = files.layout
    targets: tuple[AnyTarget, ...] = (*layout.linears, *layout.embeddings, *layout.modules)
    base = [target.name for target in targets]
    own = [module.path for module in modules.values() if not LORA_PARTS.issuperset(module.parts)]
    for name in spec.saved:
        if any(module.endswith(name) for module in base) and not any(name in path for path in own):
            raise AdapterRejected(
                f"modules_to_save names {name[:100]!r}, of which its weights file has nothing; "
                "save the adapter again"
            )


def _check_named(sorter: _Sorter, spec: LoraSpec) -> None:
    """Trained tokens and adapted parameters are in the file where the config names some."""
    modules = sorter.modules.values()
    has_tokens = any(TOKENS in module.parts for module in modules)
    has_parameters = bool(sorter.experts) or any(module.path.endswith(f".{WEIGHT}") for module in modules)
    for name, is_named, is_there in (
        ("trainable_token_indices", bool(spec.tokens), has_tokens),
        ("target_parameters", bool(spec.parameters), has_parameters),
    ):
        if is_named and not is_there:
            raise AdapterRejected(
                f"{name} is set, but its weights file has nothing of it; save the adapter again"
            )
