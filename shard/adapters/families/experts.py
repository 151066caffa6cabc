"""LoRA on mixture-of-experts weights, in PEFT's two forms.

On a whole 3-D parameter (`target_parameters`): `EXPERTS.lora_A.weight` [experts * rank, in], the rows of one
expert adjacent, and `EXPERTS.lora_B.weight` [out, rank * experts], where column j * experts + e is rank j of
expert e. Where several parameters of a module are adapted, the wrappers nest
(`EXPERTS.base_layer.lora_A.weight`), and only its shape tells which parameter a pair is for.

On one linear of one expert, as older transformers had them: `EXPERTS.3.w1.lora_A.weight` [rank, in].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import AdapterRejected
from ..changes import AnyTarget, ExpertLora, ExpertsChange, Placed
from ..floats import Float32
from ..layout import ExpertsParameter, ExpertsTarget
from ..safetensors_header import TensorInfo
from .files import AdapterFiles
from .lora_config import LoraSpec

Find = Callable[[str], AnyTarget | None]
"""The target that a module path of an adapter means."""
Sides = Mapping[str, TensorInfo]
"""A module's tensors: "A" and "B"."""

_WRAPPER = ".base_layer"
_OLD_LINEARS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_MAX_DIGITS = 6
_IN_OUT_KEPT_SINCE = (0, 19)
"""Before this version, PEFT took a weight [experts, out, in] for [experts, in, out]."""


@dataclass(frozen=True, slots=True)
class ExpertsPlace:
    """What a module path means: a parameter of a layer's experts, or one linear of one of them."""

    target: ExpertsTarget
    expert: int | None
    """None: all of them."""
    linear: str
    """Named as the layout does; empty for all experts."""


def locate_experts(path: str, find: Find) -> ExpertsPlace | None:
    """The place on experts of the base that a module path means, if it means one."""
    whole = path
    while whole.endswith(_WRAPPER):
        whole = whole.removesuffix(_WRAPPER)
    if isinstance(target := find(whole), ExpertsTarget):
        return ExpertsPlace(target, None, "")
    rest, _, linear = path.rpartition(".")
    experts, _, number = rest.rpartition(".")
    if not (number.isascii() and number.isdecimal() and len(number) <= _MAX_DIGITS):
        return None
    target = find(experts)
    if not isinstance(target, ExpertsTarget):
        return None
    return ExpertsPlace(target, int(number), _OLD_LINEARS.get(linear, linear))


def read_experts(
    modules: Mapping[str, Sides], find: Find, spec: LoraSpec, files: AdapterFiles
) -> list[Placed]:
    """Place every tensor of these modules, all of which `locate_experts` has a place for.

    Raises AdapterRejected: A without B, a shape or an expert that the base does not have, a rank other than
    the config's or above the layout's maximum, a module that the config does not select, two tensors for one
    place.
    """
    if modules and (spec.dora or spec.residual or spec.qalora_group > 1 or spec.blocks > 1):
        raise AdapterRejected(f"{spec.kind} on experts is not served; merge it into plain LoRA first")
    reader = _Reader(spec, files)
    by_linear: dict[tuple[str, str], dict[int, _Pair]] = {}
    for path, sides in modules.items():
        place = locate_experts(path, find)
        if place is None:
            raise ValueError(f"{path} is not on experts")
        pair = _pair(path, place, sides)
        if place.expert is None:
            reader.add_parameter(pair)
            continue
        pairs = by_linear.setdefault((place.target.name, place.linear), {})
        if other := pairs.get(place.expert):
            raise AdapterRejected(f"{pair.a.key} and {other.a.key} mean the same tensor; keep one")
        pairs[place.expert] = pair
    for pairs in by_linear.values():
        reader.add_linear(pairs)
    return list(reader.placed.values())


@dataclass(frozen=True, slots=True)
class _Pair:
    """A and B of one module path."""

    path: str
    place: ExpertsPlace
    a: TensorInfo
    b: TensorInfo


def _pair(path: str, place: ExpertsPlace, sides: Sides) -> _Pair:
    for present, missing in (("A", "B"), ("B", "A")):
        if missing not in sides:
            raise AdapterRejected(
                f"{sides[present].key} has no lora_{missing} beside it; save the adapter again"
            )
    for tensor in sides.values():
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise AdapterRejected(
                f"{tensor.key} has shape {list(tensor.shape)}; a matrix is needed "
                "(an adapter trained with ZeRO-3 must be gathered before it is saved)"
            )
    return _Pair(path, place, sides["A"], sides["B"])


class _Reader:
    """Checks pairs against the base and the config, and collects the places of what they hold."""

    def __init__(self, spec: LoraSpec, files: AdapterFiles) -> None:
        self._spec = spec
        self._config = files.config
        self._tensors = files.tensors
        self._max_rank = files.layout.max_rank
        self.placed: dict[tuple[str, str], Placed] = {}
        """By the experts' path and the name of the parameter, or of the half of one."""

    def add_parameter(self, pair: _Pair) -> None:
        """A pair for a parameter of all experts."""
        parameter, swapped = _identify(pair, self._config)
        name = f"{pair.path.replace(_WRAPPER, '')}.{parameter.name}"
        if not targets_parameter(self._config, name):
            raise AdapterRejected(f"{pair.a.key}: its config does not select {name} (target_parameters)")
        experts, rows, columns = pair.place.target.experts, pair.a.shape[0], pair.b.shape[1]
        if rows != columns or rows % experts:
            raise AdapterRejected(
                f"{pair.a.key} has {rows} rows and {pair.b.key} {columns} columns; "
                f"either must be the rank times the base's {experts} experts"
            )
        rank, scale, tensors = rows // experts, self._scale(name), self._tensors
        self._check_rank(pair, rank, name)

        def build() -> ExpertLora:
            a = tensors.read(pair.a.key).reshape(experts, rank, -1)
            b = tensors.read(pair.b.key).reshape(-1, rank, experts).transpose(2, 0, 1)
            if swapped:
                a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
            return ExpertLora(a, b * scale)

        self._place(pair, parameter.name, rank, build)

    def add_linear(self, pairs: Mapping[int, _Pair]) -> None:
        """Pairs for one linear of several experts, by expert; their ranks may differ."""
        first = next(iter(pairs.values()))
        in_features, out_features = _linear_shape(first)
        experts = first.place.target.experts
        for expert, pair in pairs.items():
            if expert >= experts:
                raise AdapterRejected(
                    f"{pair.a.key}: the base has {experts} experts in {pair.place.target.name}"
                )
            self._check_linear(pair, in_features, out_features)
        rank = max(pair.a.shape[0] for pair in pairs.values())
        scales = {expert: self._scale(pair.path) for expert, pair in pairs.items()}
        tensors = self._tensors

        def build() -> ExpertLora:
            a: Float32 = np.zeros((experts, rank, in_features), np.float32)
            b: Float32 = np.zeros((experts, out_features, rank), np.float32)
            for expert, pair in pairs.items():
                own = pair.a.shape[0]
                a[expert, :own] = tensors.read(pair.a.key)
                b[expert, :, :own] = tensors.read(pair.b.key) * scales[expert]
            return ExpertLora(a, b)

        self._place(first, first.place.linear, rank, build)

    def _check_linear(self, pair: _Pair, in_features: int, out_features: int) -> None:
        if not self._spec.selection.selects(pair.path):
            raise AdapterRejected(
                f"{pair.a.key}: its config does not select this module (target_modules, layers, exclusions)"
            )
        (rank, a_in), (b_out, b_rank) = pair.a.shape, pair.b.shape
        if (a_in, b_out) != (in_features, out_features):
            raise AdapterRejected(
                f"{pair.a.key}: built for in={a_in} out={b_out}, base has in={in_features} out={out_features}"
            )
        if rank != b_rank:
            raise AdapterRejected(f"{pair.a.key} has rank {rank}, {pair.b.key} has {b_rank}")
        self._check_rank(pair, rank, pair.path)

    def _check_rank(self, pair: _Pair, rank: int, name: str) -> None:
        expected = self._spec.rank_of(name)
        if rank != expected:
            raise AdapterRejected(
                f"{pair.a.key} has rank {rank}, its config (r, rank_pattern) says {expected}"
            )
        if rank > self._max_rank:
            raise AdapterRejected(
                f"{pair.a.key} has rank {rank}; the server was started with --max-rank "
                f"{self._max_rank}: raise it"
            )

    def _scale(self, name: str) -> np.float32:
        return np.float32(self._spec.scale_of(name))

    def _place(self, pair: _Pair, name: str, rank: int, build: Callable[[], ExpertLora]) -> None:
        target = pair.place.target
        if (target.name, name) in self.placed:
            raise AdapterRejected(
                f"{pair.a.key}: another of its tensors changes {target.name}.{name}; keep one"
            )

        def build_change() -> ExpertsChange:
            with np.errstate(over="ignore"):
                return ExpertsChange({name: build()})

        self.placed[target.name, name] = Placed(target, rank, build_change)


def targets_parameter(config: Mapping[str, Any], name: str) -> bool:
    """Whether `target_parameters` selects the parameter of this path."""
    targets = config.get("target_parameters") or ()
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _identify(pair: _Pair, config: Mapping[str, Any]) -> tuple[ExpertsParameter, bool]:
    """The parameter that a pair's shape fits, and whether A and B changed places: A over out, B over in."""
    shape = (pair.a.shape[1], pair.b.shape[0])
    parameters = pair.place.target.parameters
    for parameter in parameters:
        if shape == (parameter.in_features, parameter.out_features):
            is_square = shape[0] == shape[1] and not parameter.is_transposed
            if is_square and _peft_version(config) < _IN_OUT_KEPT_SINCE:
                raise AdapterRejected(
                    f"{pair.a.key}: {parameter.name} is as wide as high, and the config does not say whether "
                    "PEFT 0.19 or later wrote it; before, A and B changed places; save it with a later one"
                )
            return parameter, False
    for parameter in parameters:
        if shape == (parameter.out_features, parameter.in_features) and not parameter.is_transposed:
            return parameter, True
    base = ", ".join(f"{p.name} in={p.in_features} out={p.out_features}" for p in parameters)
    raise AdapterRejected(
        f"{pair.a.key}: built for in={shape[0]} out={shape[1]}, the base's experts have {base}"
    )


def _peft_version(config: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor; (0, 0) where the config says none."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("peft_version") or ""))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _linear_shape(pair: _Pair) -> tuple[int, int]:
    """(in, out) of the linear of one expert that a pair is for."""
    linear = pair.place.linear
    parameters = pair.place.target.parameters
    for parameter in parameters:
        if linear == parameter.name:
            return parameter.in_features, parameter.out_features
        if linear in parameter.halves:
            return parameter.in_features, parameter.out_features // len(parameter.halves)
    known = ", ".join(name for parameter in parameters for name in (parameter.name, *parameter.halves))
    raise AdapterRejected(f"{pair.a.key}: the base's experts have no such linear, only {known}")
