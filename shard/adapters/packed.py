"""The packed form of an adapter: one flat file of aligned arrays, and an index of plain data beside it."""

from __future__ import annotations

from typing import BinaryIO

import msgspec

from .floats import Stored

ALIGNMENT = 128
"""Bytes; a cache line of a GPU, and a multiple of every vector load."""


class PackedArray(msgspec.Struct, frozen=True):
    """A row-major array inside the file."""

    offset: int
    """First byte; a multiple of ALIGNMENT."""
    shape: tuple[int, ...]
    dtype: str
    """"float32", "bfloat16", "float16" or "int64"."""


class PackedNorm(msgspec.Struct, frozen=True):
    """What a part's scale is made of; see `changes.Norm`."""

    magnitude: PackedArray
    """Where the scale goes, too."""
    squares: PackedArray
    bias: PackedArray | None = None


class PackedPart(msgspec.Struct, frozen=True):
    """One linear's share of a site; see `kernels.ops.LoraPart`."""

    rank_offset: int
    out_offset: int
    b: PackedArray
    scale: PackedArray | None = None
    shift: PackedArray | None = None
    norm: PackedNorm | None = None
    """Where ranks have its norms between them. Without a scale beside it, the part cannot be served yet."""


class PackedRows(msgspec.Struct, frozen=True):
    """Replaced rows of a weight; see `weights.ReplacedRows`."""

    out_offset: int
    ids: PackedArray | None
    weight: PackedArray
    bias: PackedArray | None = None
    height: int = 0


class PackedLinears(msgspec.Struct, frozen=True, tag=True):
    """One adapter at linears that share an input; see `weights.LinearWeights`."""

    site: int
    modules: int
    a: PackedArray | None
    parts: tuple[PackedPart, ...]
    input_scale: PackedArray | None = None
    rows: tuple[PackedRows, ...] = ()


class PackedEmbedding(msgspec.Struct, frozen=True, tag=True):
    """One adapter at the embedding; see `weights.EmbeddingWeights`."""

    site: int
    a: PackedArray | None
    b: PackedArray | None
    scale: PackedArray | None = None
    rows: PackedRows | None = None
    norm: PackedNorm | None = None
    """As of a part."""


class PackedModule(msgspec.Struct, frozen=True, tag=True):
    """A module's own parameters, by name."""

    site: int
    parameters: dict[str, PackedArray]


class PackedExperts(msgspec.Struct, frozen=True, tag=True):
    """A and B of the experts' parameters, by parameter."""

    site: int
    parameters: dict[str, tuple[PackedArray, PackedArray]]


PackedSite = PackedLinears | PackedEmbedding | PackedModule | PackedExperts


class PackedIndex(msgspec.Struct, frozen=True):
    """Where everything lies in the packed file."""

    nbytes: int
    """Length of the file."""
    modules: int
    """Base modules that the adapter changes."""
    sites: tuple[PackedSite, ...]


class PackedWriter:
    """Appends aligned arrays to an empty file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @property
    def nbytes(self) -> int:
        return self._file.tell()

    def append(self, array: Stored, dtype: str) -> PackedArray:
        """Write one contiguous array, as `floats.store` gives it for `dtype`, or of int64."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        if array.size:
            self._file.write(array.data.cast("B"))
        return PackedArray(offset, array.shape, dtype)
