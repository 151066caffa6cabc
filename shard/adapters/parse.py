"""From a weights file to arrays in the base's layout: every tensor placed, or the adapter refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import AdapterRejected
from .config import LoraSpec
from .digest import weight_digest
from .floats import STORED, Float32, Stored, all_finite, read_float32, store
from .keys import LoraKey, full_weight_module, parse_lora_key, why_refused
from .layout import AdapterLayout, Target
from .safetensors_header import TensorInfo, read_header

_KEYS_NAMED = 5
"""How many unusable keys an error lists."""


@dataclass(frozen=True, slots=True)
class PartArrays:
    """One linear's B at a site: [rank, out], the scale folded in."""

    rank_offset: int
    out_offset: int
    b: Stored


@dataclass(frozen=True, slots=True)
class SiteArrays:
    """One site's weights: A [sum of ranks, in] and the B of each linear that the adapter covers."""

    site: int
    a: Stored
    parts: tuple[PartArrays, ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    target: Target
    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class ParsedAdapter:
    """An adapter whose every tensor has its place. Values are read and cast site by site, in `sites()`."""

    def __init__(self, file: memoryview, pairs: list[_Pair], dtype: str) -> None:
        self._file = file
        self._dtype = dtype
        self._sites: dict[int, list[_Pair]] = {}
        for pair in sorted(pairs, key=lambda pair: (pair.target.site, pair.target.out_offset)):
            self._sites.setdefault(pair.target.site, []).append(pair)
        self.modules = len(pairs)
        self.max_rank = max(pair.rank for pair in pairs)

    def sites(self) -> Iterator[SiteArrays]:
        """The arrays of each site, ascending. Raises AdapterRejected naming a tensor that is not finite."""
        for site, pairs in self._sites.items():
            a = np.empty((sum(pair.rank for pair in pairs), pairs[0].target.in_features), STORED[self._dtype])
            parts = []
            rank_offset = 0
            for pair in pairs:
                a[rank_offset : rank_offset + pair.rank] = self._cast(pair.a, self._read(pair.a))
                parts.append(PartArrays(rank_offset, pair.target.out_offset, self._scaled_b(pair)))
                rank_offset += pair.rank
            yield SiteArrays(site, a, tuple(parts))

    def _scaled_b(self, pair: _Pair) -> Stored:
        """B [out, rank] of the file, times the scale in fp32, as [rank, out] in the layout's dtype."""
        with np.errstate(over="ignore"):
            scaled = self._read(pair.b) * np.float32(pair.scale)
        return self._cast(pair.b, np.ascontiguousarray(scaled.T))

    def _read(self, tensor: TensorInfo) -> Float32:
        values = read_float32(self._file[tensor.begin : tensor.end], tensor.dtype)
        if not all_finite(values):
            raise AdapterRejected(
                f"{tensor.key} holds NaN or infinity; the training diverged or the file is damaged"
            )
        return values.reshape(tensor.shape)

    def _cast(self, tensor: TensorInfo, values: Float32) -> Stored:
        stored = store(values, self._dtype)
        if not all_finite(stored):
            raise AdapterRejected(
                f"{tensor.key} does not fit the range of {self._dtype}; serve with another --dtype"
            )
        return stored


def parse_adapter(spec: LoraSpec, file: memoryview, layout: AdapterLayout) -> ParsedAdapter:
    """Place every tensor of a safetensors file in the layout.

    Raises AdapterRejected: a damaged or empty file, a key that is not LoRA on a linear of the base or that
    the config does not select, A without B, a shape that does not fit the base, a rank other than the
    config's or above the layout's maximum.
    """
    header = read_header(file)
    if not header:
        raise AdapterRejected("its weights file holds no tensors; save the adapter again, from all processes")
    sides, others = _split_keys(header)
    targets = {target.name: target for target in layout.targets}
    unusable = {tensor.key: why_refused(tensor.key, layout) for tensor in others}
    unusable = {key: why for key, why in unusable.items() if not _repeats_base(header[key], file, layout)}
    for (module, _), tensor in sides.items():
        if module not in targets:
            unusable[tensor.key] = why_refused(tensor.key, layout)
        elif not spec.selection.selects(module):
            unusable[tensor.key] = (
                "its config does not select this module (target_modules, layers, exclusions)"
            )
    if unusable:
        raise AdapterRejected(_describe(unusable, len(header)))
    if not sides:
        raise AdapterRejected("its weights file holds no LoRA tensors")
    modules = dict.fromkeys(module for module, _ in sides)
    pairs = [_pair(targets[module], sides, spec, layout.max_rank) for module in modules]
    return ParsedAdapter(file, pairs, layout.dtype)


_Sides = Mapping[tuple[str, str], TensorInfo]
"""(module, "A" or "B") to tensor."""


def _split_keys(header: Mapping[str, TensorInfo]) -> tuple[_Sides, list[TensorInfo]]:
    """LoRA tensors by module and side, and the others. Two tensors for one place are refused."""
    sides: dict[tuple[str, str], TensorInfo] = {}
    others: list[TensorInfo] = []
    first: LoraKey | None = None
    for tensor in header.values():
        key = parse_lora_key(tensor.key)
        if key is None:
            others.append(tensor)
            continue
        first = first or key
        if key.adapter != first.adapter:
            raise AdapterRejected(
                f"its weights file holds more than one adapter ({first.adapter or 'unnamed'!r} and "
                f"{key.adapter or 'unnamed'!r}, in {tensor.key}); save each to a directory of its own"
            )
        if other := sides.get((key.module, key.side)):
            raise AdapterRejected(f"{tensor.key} and {other.key} mean the same tensor; keep one")
        sides[key.module, key.side] = tensor
    return sides, others


def _repeats_base(tensor: TensorInfo, file: memoryview, layout: AdapterLayout) -> bool:
    """Whether this is a copy of a whole base weight, as PEFT saves beside LoRA on the output head."""
    module = full_weight_module(tensor.key)
    digest = next((weight.digest for weight in layout.base_weights if weight.name == module), None)
    if digest is None:
        return False
    values = store(read_float32(file[tensor.begin : tensor.end], tensor.dtype), layout.dtype)
    return weight_digest(values.data.cast("B")) == digest


def _pair(target: Target, sides: _Sides, spec: LoraSpec, max_rank: int) -> _Pair:
    """A and B of one module, with ranks and shapes checked against the base and the config."""
    a, b = sides.get((target.name, "A")), sides.get((target.name, "B"))
    if a is None or b is None:
        present, missing = (a, "B") if a is not None else (b, "A")
        key = present.key if present is not None else target.name
        raise AdapterRejected(f"{key} has no lora_{missing} beside it; save the adapter again")
    for tensor in (a, b):
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise AdapterRejected(
                f"{tensor.key} has shape {list(tensor.shape)}; a matrix is needed "
                "(an adapter trained with ZeRO-3 must be gathered before it is saved)"
            )
    (rank, a_in), (b_out, b_rank) = a.shape, b.shape
    _check(a_in == target.in_features, f"{a.key}: built for in={a_in}, base has {target.in_features}")
    _check(b_out == target.out_features, f"{b.key}: built for out={b_out}, base has {target.out_features}")
    _check(rank == b_rank, f"{a.key} has rank {rank}, {b.key} has {b_rank}")
    expected = spec.rank_of(target.name)
    _check(rank == expected, f"{a.key} has rank {rank}, its config (r, rank_pattern) says {expected}")
    _check(rank <= max_rank, f"{a.key} has rank {rank}; the server was started with --max-rank {max_rank}")
    return _Pair(target, a, b, spec.scale_of(target.name))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AdapterRejected(message)


def _describe(unusable: Mapping[str, str], total: int) -> str:
    listed = [f"{key[:200]} ({why})" for key, why in list(unusable.items())[:_KEYS_NAMED]]
    more = f"; and {len(unusable) - len(listed)} more" if len(unusable) > len(listed) else ""
    return f"{len(unusable)} of its {total} tensors cannot be applied: {'; '.join(listed)}{more}"
