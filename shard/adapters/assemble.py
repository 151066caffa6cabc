"""From an adapter's changes to its packed form: those of one site side by side, cast to what is served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np

from ..errors import AdapterRejected
from .changes import (
    Change,
    EmbeddingChange,
    ExpertLora,
    ExpertsChange,
    LinearChange,
    ModuleChange,
    Norm,
    ParsedAdapter,
    Placed,
    Rows,
)
from .cut import cut, height_with
from .floats import STORED, Float32, Stored, all_finite, store
from .layout import EmbeddingTarget, Target
from .packed import (
    PackedArray,
    PackedEmbedding,
    PackedExperts,
    PackedIndex,
    PackedLinears,
    PackedModule,
    PackedNorm,
    PackedPart,
    PackedRows,
    PackedWriter,
)

Combined = TypeVar("Combined", LinearChange, EmbeddingChange)
Value = TypeVar("Value")

_VECTORS = "float32"
"""What scales and shifts are packed as: a scale near 1 loses its meaning in half precision."""


def assemble(adapter: ParsedAdapter, file: BinaryIO, dtype: str) -> PackedIndex:
    """Build every change and write it to `file`, site by site, so that one site at a time is in memory.

    Raises AdapterRejected where a value is not finite or does not fit `dtype`.
    """
    sites: dict[int, list[Placed]] = {}
    for placed in adapter.placed:
        sites.setdefault(placed.target.site, []).append(placed)
    assembler = _Assembler(PackedWriter(file), dtype)
    for site in sorted(sites):
        assembler.add(site, sites[site])
    return assembler.index(adapter.modules)


class _Assembler:
    """Writes sites to one file, and keeps where they lie."""

    def __init__(self, writer: PackedWriter, dtype: str) -> None:
        self._writer = writer
        self._dtype = dtype
        self._linear_sites: list[PackedLinears] = []
        self._embeddings: list[PackedEmbedding] = []
        self._saved: list[PackedModule] = []
        self._expert_sites: list[PackedExperts] = []

    def index(self, modules: int) -> PackedIndex:
        """Of all that was written, which changes so many modules of the base."""
        return PackedIndex(
            self._writer.nbytes,
            modules,
            tuple(self._linear_sites),
            tuple(self._embeddings),
            tuple(self._saved),
            tuple(self._expert_sites),
        )

    def add(self, site: int, placed: Sequence[Placed]) -> None:
        """Write what changes one site."""
        changes: dict[str, list[Change]] = {}
        targets = {}
        for one in placed:
            targets[one.target.name] = one.target
            changes.setdefault(one.target.name, []).append(one.build())
        name, first = next(iter(changes.items()))
        target = targets[name]
        match first[0]:
            case LinearChange():
                linears = [
                    (cast(Target, targets[name]), _combine(name, cast(list[LinearChange], parts)))
                    for name, parts in changes.items()
                ]
                linears.sort(key=lambda pair: pair[0].out_offset)
                self._linear_sites.append(self._linears(site, linears))
            case EmbeddingChange():
                embedding = _combine(name, cast(list[EmbeddingChange], first))
                self._embeddings.append(self._embedding(cast(EmbeddingTarget, target), embedding))
            case ModuleChange():
                module = _union(name, [change.parameters for change in cast(list[ModuleChange], first)])
                written = {key: self._write(name, value) for key, value in module.items()}
                self._saved.append(PackedModule(site, written))
            case ExpertsChange():
                experts = _union(name, [change.parameters for change in cast(list[ExpertsChange], first)])
                held = cast(ExpertsChange, cut(ExpertsChange(experts), target))
                self._expert_sites.append(self._experts(site, name, held.parameters))

    def _linears(self, site: int, linears: Sequence[tuple[Target, LinearChange]]) -> PackedLinears:
        """`linears`: as a whole, in the order of their columns."""
        held = [(target, cast(LinearChange, cut(change, target))) for target, change in linears]
        a = self._stacked_a(held)
        parts, rows, rank_offset = [], [], 0
        for (target, change), (_, whole) in zip(held, linears, strict=True):
            assert (change.a is None) == (change.b is None)
            rank = 0 if change.a is None else len(change.a)
            if change.rows is not None and whole.rows is not None:
                height = height_with(whole.rows, target.out_features)
                rows.append(self._rows(target.name, change.rows, target.held_offset, height))
            if rank or change.scale is not None or change.shift is not None:
                parts.append(self._part(target, change, rank_offset))
            rank_offset += rank
        return PackedLinears(
            site,
            len(linears),
            a if parts else None,
            tuple(parts),
            self._input_scale(held),
            tuple(rows),
        )

    def _stacked_a(self, linears: Sequence[tuple[Target, LinearChange]]) -> PackedArray:
        rank = sum(len(change.a) for _, change in linears if change.a is not None)
        a = np.empty((rank, linears[0][0].held_inputs), STORED[self._dtype])
        offset = 0
        for target, change in linears:
            if change.a is not None:
                a[offset : offset + len(change.a)] = self._cast(target.name, change.a)
                offset += len(change.a)
        return self._writer.append(a, self._dtype)

    def _part(self, target: Target, change: LinearChange, rank_offset: int) -> PackedPart:
        b = np.zeros((target.held_outputs, 0), np.float32) if change.b is None else change.b
        return PackedPart(
            rank_offset,
            target.held_offset,
            self._write(target.name, b.T),
            self._vector(target.name, change.scale),
            self._vector(target.name, change.shift),
            None if change.norm is None else self._norm(target.name, change.norm),
        )

    def _norm(self, name: str, norm: Norm) -> PackedNorm:
        magnitude, squares = self._vector(name, norm.magnitude), self._vector(name, norm.squares)
        assert magnitude is not None
        assert squares is not None
        return PackedNorm(magnitude, squares, self._vector(name, norm.bias))

    def _input_scale(self, linears: Sequence[tuple[Target, LinearChange]]) -> PackedArray | None:
        (first, change), *others = linears
        for target, other in others:
            if not np.array_equal(cast(Any, other.input_scale), cast(Any, change.input_scale)):
                raise AdapterRejected(
                    f"{first.name} and {target.name} read one input, which the adapter scales differently"
                )
        return self._vector(first.name, change.input_scale)

    def _embedding(self, target: EmbeddingTarget, whole: EmbeddingChange) -> PackedEmbedding:
        change = cast(EmbeddingChange, cut(whole, target))
        a = b = None
        assert (change.a is None) == (change.b is None)
        if change.a is not None and change.b is not None:
            a, b = self._write(target.name, change.a), self._write(target.name, change.b.T)
        elif change.scale is not None:
            a = self._write(target.name, np.empty((target.held_tokens, 0), np.float32))
            b = self._write(target.name, np.empty((0, target.hidden_size), np.float32))
        rows = None
        if change.rows is not None and whole.rows is not None:
            rows = self._rows(target.name, change.rows, 0, height_with(whole.rows, target.vocab_size))
        scale = self._vector(target.name, change.scale)
        norm = None if change.norm is None else self._norm(target.name, change.norm)
        return PackedEmbedding(target.site, a, b, scale, rows, norm)

    def _experts(self, site: int, name: str, loras: Mapping[str, ExpertLora]) -> PackedExperts:
        parameters = {
            parameter: (self._write(name, lora.a), self._write(name, lora.b.transpose(0, 2, 1)))
            for parameter, lora in loras.items()
        }
        return PackedExperts(site, parameters)

    def _rows(self, name: str, rows: Rows, out_offset: int, height: int) -> PackedRows:
        ids = None if rows.ids is None else self._writer.append(rows.ids, "int64")
        bias = None if rows.bias is None else self._write(name, rows.bias)
        return PackedRows(out_offset, ids, self._write(name, rows.weight), bias, height)

    def _vector(self, name: str, values: Float32 | None) -> PackedArray | None:
        if values is None:
            return None
        if not all_finite(values):
            raise AdapterRejected(f"{name}: its scale or shift is not finite; the adapter is damaged")
        return self._writer.append(np.ascontiguousarray(values), _VECTORS)

    def _write(self, name: str, values: Float32) -> PackedArray:
        return self._writer.append(np.ascontiguousarray(self._cast(name, values)), self._dtype)

    def _cast(self, name: str, values: Float32) -> Stored:
        stored = store(values, self._dtype)
        if not all_finite(stored):
            raise AdapterRejected(
                f"{name}: its weights do not fit the range of {self._dtype}; serve with another --dtype"
            )
        return stored


def _combine(name: str, changes: Sequence[Combined]) -> Combined:
    """Several changes to one target as one. Raises AdapterRejected where two give the same field."""
    if len(changes) == 1:
        return changes[0]
    merged: dict[str, object] = {}
    for change in changes:
        for field in fields(change):
            value = getattr(change, field.name)
            if value is not None:
                if field.name in merged:
                    raise AdapterRejected(f"{name}: two parts of the adapter change its {field.name}")
                merged[field.name] = value
    return type(changes[0])(**merged)  # type: ignore[arg-type]


def _union(name: str, parts: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    """Parameters that several changes bring to one target. Raises AdapterRejected where two bring one."""
    merged: dict[str, Value] = {}
    for part in parts:
        if twice := merged.keys() & part.keys():
            raise AdapterRejected(f"{name}: two parts of the adapter change its {sorted(twice)[0]}")
        merged |= part
    return merged
