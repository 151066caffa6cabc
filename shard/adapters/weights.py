"""A packed adapter in memory: one buffer, and the tensors that the model's sites read as views into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...kernels.ops import EmbeddingLora, LoraPart, LoraWeights
from ..errors import AdapterFetchFailed
from .packed import (
    PackedArray,
    PackedEmbedding,
    PackedExperts,
    PackedIndex,
    PackedLinears,
    PackedModule,
    PackedPart,
    PackedRows,
)


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """Rows of a base weight in place of the base's own."""

    out_offset: int
    """First column, in the site's output, of the linear whose rows these are; 0 at an embedding."""
    ids: torch.Tensor | None
    """[n] int64 ascending; None: rows 0 .. n - 1. They may lie beyond the base's last row."""
    weight: torch.Tensor
    """[n, in]."""
    bias: torch.Tensor | None
    """[n]; None: the base's, and none beyond its last row."""
    height: int
    """Rows of the whole weight with these in it, on all ranks together."""


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """One adapter at linears that share an input."""

    lora: LoraWeights | None
    input_scale: torch.Tensor | None
    """[in] fp32: multiplies the site's input."""
    rows: tuple[ReplacedRows, ...]


@dataclass(frozen=True, slots=True)
class EmbeddingWeights:
    """One adapter at the embedding."""

    lora: EmbeddingLora | None
    rows: ReplacedRows | None


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """The parameters that a module has on one adapter's rows."""

    parameters: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One adapter at the experts of a layer: by parameter or half of one, A [experts, rank, in] and
    B [experts, rank, out]."""

    parameters: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


SiteWeights = LinearWeights | EmbeddingWeights | ModuleWeights | ExpertWeights


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter's weights, in host or device memory."""

    index: PackedIndex
    buffer: torch.Tensor
    """uint8 [index.nbytes]."""

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    @property
    def modules(self) -> int:
        """Base modules that the adapter changes."""
        return self.index.modules

    def to(self, device: torch.device) -> PackedAdapter:
        """This adapter on `device`: itself where it already is there, else a copy, which may still be on its
        way in the current stream."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=True))

    @property
    def is_plain(self) -> bool:
        """Whether the operators alone apply it: low-rank parts, scales, shifts at linears and embedding."""
        index = self.index
        return (
            not index.saved
            and not index.experts
            and all(site.input_scale is None and not site.rows for site in index.linears)
            and all(site.rows is None for site in index.embeddings)
        )

    def site_weights(self) -> dict[int, SiteWeights]:
        """Site to weights, as views into the buffer."""
        index, views = self.index, Views(self.buffer)
        with torch.inference_mode():  # a third less time for each of hundreds of views
            return {
                **{site.site: views.linears(site) for site in index.linears},
                **{site.site: views.embedding(site) for site in index.embeddings},
                **{site.site: views.module(site) for site in index.saved},
                **{site.site: views.experts(site) for site in index.experts},
            }


class Views:
    """The tensors in one buffer."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self._typed: dict[str, tuple[torch.Tensor, int]] = {}
        """The whole buffer as values of one dtype, and a value's bytes."""

    def module(self, site: PackedModule) -> ModuleWeights:
        return ModuleWeights({name: self.view(array) for name, array in site.parameters.items()})

    def experts(self, site: PackedExperts) -> ExpertWeights:
        pairs = site.parameters.items()
        return ExpertWeights({name: (self.view(a), self.view(b)) for name, (a, b) in pairs})

    def linears(self, site: PackedLinears) -> LinearWeights:
        lora = None
        if site.a is not None:
            lora = LoraWeights(self.view(site.a), tuple([self._part(part) for part in site.parts]))
        return LinearWeights(
            lora, self._optional(site.input_scale), tuple([self._rows(rows) for rows in site.rows])
        )

    def _part(self, part: PackedPart) -> LoraPart:
        assert part.norm is None or part.scale is not None, "its norms are not complete"
        scale = None if part.scale is None else self.view(part.scale)
        shift = None if part.shift is None else self.view(part.shift)
        return LoraPart(part.rank_offset, part.out_offset, self.view(part.b), scale, shift)

    def embedding(self, site: PackedEmbedding) -> EmbeddingWeights:
        assert site.norm is None or site.scale is not None, "its norms are not complete"
        lora = None
        if site.a is not None and site.b is not None:
            lora = EmbeddingLora(self.view(site.a), self.view(site.b), self._optional(site.scale))
        return EmbeddingWeights(lora, self._rows(site.rows) if site.rows is not None else None)

    def _rows(self, rows: PackedRows) -> ReplacedRows:
        ids, bias = self._optional(rows.ids), self._optional(rows.bias)
        return ReplacedRows(rows.out_offset, ids, self.view(rows.weight), bias, rows.height)

    def _optional(self, array: PackedArray | None) -> torch.Tensor | None:
        return None if array is None else self.view(array)

    def view(self, array: PackedArray) -> torch.Tensor:
        """One array."""
        typed, itemsize = self._typed.get(array.dtype) or self._typed_as(array.dtype)
        shape = array.shape
        strides = (shape[1], 1) if len(shape) == 2 else _strides(shape)
        return typed.as_strided(shape, strides, array.offset // itemsize)

    def _typed_as(self, name: str) -> tuple[torch.Tensor, int]:
        dtype: torch.dtype = getattr(torch, name)
        whole = len(self._buffer) // dtype.itemsize * dtype.itemsize
        self._typed[name] = found = self._buffer[:whole].view(dtype), dtype.itemsize
        return found


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a row-major array."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


def read_packed(path: Path, index: PackedIndex, *, pin: bool) -> PackedAdapter:
    """Read a packed file into one new buffer, pinned for copies to a GPU if `pin`."""
    buffer = torch.empty(index.nbytes, dtype=torch.uint8, pin_memory=pin)
    with path.open("rb", buffering=0) as file:
        target = buffer.numpy().data
        done = 0
        while done < index.nbytes:
            count = file.readinto(target[done:])
            if not count:
                raise AdapterFetchFailed(
                    f"a packed adapter ended after {done} of {index.nbytes} bytes; try again"
                )
            done += count
    return PackedAdapter(index, buffer)
