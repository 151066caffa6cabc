"""What a LORA adapter does to one linear."""

from __future__ import annotations

import numpy as np

from ..changes import LinearChange, Placed
from ..floats import Float32
from ..layout import Target
from ..safetensors_header import TensorInfo
from .files import AdapterFiles
from .lora_config import LoraSpec
from .lora_dora import are_inputs_divided, divided_change, linear_scale, read_scale
from .lora_keys import B_BIAS, BIAS, DIAGONAL, LORA_PARTS, MAGNITUDE, WEIGHT, A, B
from .lora_modules import LoraModule, Misfit
from .lora_rows import Replacement
from .residual import residual_pair

_ELSEWHERE = ": it was made for another base"


def place_linear(
    target: Target, module: LoraModule, replacement: Replacement | None, spec: LoraSpec, files: AdapterFiles
) -> Placed | None:
    """The change to one linear, None where there is none. Raises Misfit."""
    linear = _Linear(target, module, replacement, spec, files)
    linear.check()
    has_bias = BIAS in module.parts and WEIGHT not in module.parts
    if not (module.has_lora or has_bias) and replacement is None:
        return None
    return Placed(target, linear.rank if module.has_lora else 0, linear.build)


def check_pair(module: LoraModule, a_part: str, b_part: str) -> tuple[TensorInfo, TensorInfo]:
    """A and B of a module. Raises Misfit where one is missing or either is no matrix."""
    parts = module.parts
    for part, other in ((a_part, b_part), (b_part, a_part)):
        if part not in parts:
            present = parts.get(other) or next(tensor for name, tensor in parts.items() if name in LORA_PARTS)
            raise Misfit(present.key, f"has no {part} beside it; save the adapter again")
    for tensor in (parts[a_part], parts[b_part]):
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise Misfit(
                tensor.key,
                f"has shape {list(tensor.shape)}; a matrix is needed (an adapter trained with ZeRO-3 must be "
                "gathered before it is saved)",
            )
    return parts[a_part], parts[b_part]


def check_rank(tensor: TensorInfo, rank: int, served: int, path: str, spec: LoraSpec, max_rank: int) -> None:
    """Raises Misfit unless the rank of `tensor` is the config's and the one that is served is allowed."""
    expected = spec.rank_of(path)
    if rank != expected:
        raise Misfit(
            tensor.key, f"has rank {rank}, its config (r, rank_pattern) says {expected}; correct either"
        )
    if served > max_rank:
        doubled = f", served as {served}" if served != rank else ""
        raise Misfit(
            tensor.key,
            f"has rank {rank}{doubled}; the server was started with --max-rank {max_rank}: raise it",
        )


def check_variant(module: LoraModule, part: str, is_set: bool, field: str, length: int) -> None:
    """A variant's vector is there, with its length, where the config has the variant set, and only there."""
    tensor = module.parts.get(part)
    if tensor is None:
        if is_set:
            present = next(tensor for name, tensor in module.parts.items() if name in LORA_PARTS)
            raise Misfit(present.key, f"has no {part} beside it, but {field} is set; save the adapter again")
        return
    if not is_set:
        raise Misfit(tensor.key, f"is there, but {field} is not set in adapter_config.json; correct it")
    if tensor.shape != (length,):
        raise Misfit(
            tensor.key, f"has shape {list(tensor.shape)}, {[length]} is needed; save the adapter again"
        )


class _Linear:
    """One linear and what an adapter has for it."""

    def __init__(
        self,
        target: Target,
        module: LoraModule,
        replacement: Replacement | None,
        spec: LoraSpec,
        files: AdapterFiles,
    ) -> None:
        self._target = target
        self._module = module
        self._replacement = replacement
        self._spec = spec
        self._tensors = files.tensors
        self._base = files.base
        self._max_rank = files.layout.max_rank
        self._out = target.out_features if replacement is None else replacement.height
        self._scale = np.float32(0)
        self.rank = 0
        """Of what is served."""

    def check(self) -> None:
        """Compare every shape with the base and the config, and find the rank. Raises Misfit."""
        if self._module.has_lora:
            self._check_lora()
        bias = self._module.parts.get(BIAS)
        if bias is not None and WEIGHT not in self._module.parts:
            if not self._target.has_bias:
                raise Misfit(bias.key, f"the base has no bias there{_ELSEWHERE}")
            if bias.shape != (self._target.out_features,):
                base = [self._target.out_features]
                raise Misfit(bias.key, f"has shape {list(bias.shape)}, base has {base}{_ELSEWHERE}")

    def _check_lora(self) -> None:
        module, spec = self._module, self._spec
        a, b = check_pair(module, A, B)
        rank = a.shape[0]
        served = 2 * rank if spec.residual else rank
        check_rank(a, rank, served, module.path, spec, self._max_rank)
        in_features = self._target.in_features
        # Block-diagonal and group-wise factors have fewer columns; which have them, only their shapes tell.
        a_widths = {
            in_features,
            _divided(in_features, spec.qalora_group),
            _block_width(rank, in_features, spec.blocks),
        }
        if a.shape[1] not in a_widths:
            raise Misfit(a.key, f"built for in={a.shape[1]}, base has {in_features}{_ELSEWHERE}")
        if b.shape[0] != self._out:
            raise Misfit(b.key, f"built for out={b.shape[0]}, base has {self._out}{_ELSEWHERE}")
        if b.shape[1] not in {rank, _block_width(self._out, rank, spec.blocks)}:
            raise Misfit(b.key, f"has rank {b.shape[1]}, {a.key} has {rank}; save the adapter again")
        check_variant(module, MAGNITUDE, spec.dora, "use_dora", self._out)
        check_variant(module, B_BIAS, spec.lora_bias, "lora_bias", self._out)
        check_variant(module, DIAGONAL, spec.residual == "kasa", "kasa_config", rank)
        self.rank = served
        self._scale = np.float32(spec.scale_of(module.path))

    def build(self) -> LinearChange:
        rows = None if self._replacement is None else self._replacement.rows()
        if not self._module.has_lora:
            return LinearChange(shift=self._bias_shift(None), rows=rows)
        with np.errstate(over="ignore"):
            a, b = self._low_rank()
            scale = None
            if self._spec.dora:
                if rows is None and are_inputs_divided(self._target):
                    return self._divided(a, b)
                scale = self._norm_scale(a, b)
                b = scale[:, None] * b
            shift = _sum(self._bias_shift(scale), self._lora_bias())
        return LinearChange(a, b, scale, shift, rows=rows)

    def _norm_scale(self, a: Float32, b: Float32) -> Float32:
        key = self._module.parts[MAGNITUDE].key
        if self._replacement is None:
            return linear_scale(self._target, self._base, key, self._tensors, a, b)
        return read_scale(self._tensors.read(key), key, self._weight(), a, b)

    def _divided(self, a: Float32, b: Float32) -> LinearChange:
        """With magnitudes, where each rank has a part of the inputs."""
        magnitude = self._tensors.read(self._module.parts[MAGNITUDE].key)
        own = self._bias_shift(np.zeros(self._out, np.float32))
        shift = _sum(own, self._lora_bias())
        return divided_change(self._target, self._base, a, b, magnitude, shift)

    def _lora_bias(self) -> Float32 | None:
        if not self._spec.lora_bias:
            return None
        return self._tensors.read(self._module.parts[B_BIAS].key) * self._scale

    def _low_rank(self) -> tuple[Float32, Float32]:
        """A [rank, in] and B [out, rank] with the scale folded in."""
        a = self._tensors.read(self._module.parts[A].key)
        b = self._tensors.read(self._module.parts[B].key)
        in_features = self._target.in_features
        if a.shape[1] < in_features and self._spec.qalora_group > 1:
            # Every column stands for the mean of a group of inputs, times the number of groups.
            group = self._spec.qalora_group
            a = np.repeat(a, group, axis=1) * np.float32(a.shape[1] / group)
        elif a.shape[1] < in_features:
            a = _block_diagonal(a, self._spec.blocks)
        if b.shape[1] < len(a):
            b = _block_diagonal(b, self._spec.blocks)
        if not self._spec.residual:
            return a, b * self._scale
        diagonal = self._module.parts.get(DIAGONAL)
        diag = None if diagonal is None else self._tensors.read(diagonal.key)
        return residual_pair(
            self._spec.residual,
            self._weight(),
            a,
            b,
            float(self._scale),
            diag,
            stored_transposed=self._target.fan_in_fan_out,
        )

    def _weight(self) -> Float32:
        """[out, in], with the adapter's own rows in place."""
        weight = self._base.read(f"{self._target.name}.weight")
        return weight if self._replacement is None else self._replacement.put_into(weight)

    def _bias_shift(self, scale: Float32 | None) -> Float32 | None:
        """What makes the adapter's bias, whole, of the base's bias times `scale`."""
        tensor = self._module.parts.get(BIAS)
        if not self._target.has_bias or (tensor is None and scale is None):
            return None
        base = np.zeros(self._out, np.float32)
        base[: self._target.out_features] = self._base.read(f"{self._target.name}.bias")
        own = base if tensor is None else self._tensors.read(tensor.key)
        if WEIGHT in self._module.parts and tensor is not None:
            base = own  # it goes with the rows
        scaled = base if scale is None else base * scale
        return None if scaled is own else own - scaled


def _sum(one: Float32 | None, other: Float32 | None) -> Float32 | None:
    return other if one is None else one if other is None else one + other


def _divided(features: int, by: int) -> int:
    """`features` over `by`, or as they are where that leaves a remainder."""
    return features // by if features % by == 0 else features


def _block_width(rows: int, columns: int, blocks: int) -> int:
    """Columns that a matrix is stored with as diagonal blocks: all of them where it has no such blocks."""
    return columns if rows % blocks else _divided(columns, blocks)


def _block_diagonal(stacked: Float32, blocks: int) -> Float32:
    """Blocks [n, m] one below the other, as a matrix [blocks * n, blocks * m] with them on its diagonal."""
    rows, columns = stacked.shape[0] // blocks, stacked.shape[1]
    full = np.zeros((stacked.shape[0], blocks * columns), np.float32)
    for block in range(blocks):
        own = slice(block * rows, (block + 1) * rows)
        full[own, block * columns : (block + 1) * columns] = stacked[own]
    return full
