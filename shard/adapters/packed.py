"""The packed form of an adapter: one flat file of aligned arrays, and an index of plain data beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from .floats import Stored

ALIGNMENT = 128
"""Bytes; a cache line of a GPU, and a multiple of every vector load."""


@dataclass(frozen=True, slots=True)
class PackedArray:
    """A row-major array inside the file."""

    offset: int
    """First byte; a multiple of ALIGNMENT."""
    shape: tuple[int, ...]
    dtype: str
    """"float32", "bfloat16", "float16" or "int64"."""


@dataclass(frozen=True, slots=True)
class PackedNorm:
    """What a part's scale is made of; see `changes.Norm`."""

    magnitude: PackedArray
    """Where the scale goes, too."""
    squares: PackedArray
    bias: PackedArray | None = None


@dataclass(frozen=True, slots=True)
class PackedPart:
    """One linear's share of a site; see `kernels.ops.LoraPart`."""

    rank_offset: int
    out_offset: int
    b: PackedArray
    scale: PackedArray | None = None
    shift: PackedArray | None = None
    norm: PackedNorm | None = None
    """Where ranks have its norms between them. Without a scale beside it, the part cannot be served yet."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Replaced rows of a weight; see `weights.ReplacedRows`."""

    out_offset: int
    ids: PackedArray | None
    weight: PackedArray
    bias: PackedArray | None = None
    height: int = 0


@dataclass(frozen=True, slots=True)
class PackedLinears:
    """One adapter at linears that share an input; see `weights.LinearWeights`."""

    site: int
    modules: int
    a: PackedArray | None
    parts: tuple[PackedPart, ...]
    input_scale: PackedArray | None = None
    rows: tuple[PackedRows, ...] = ()


@dataclass(frozen=True, slots=True)
class PackedEmbedding:
    """One adapter at the embedding; see `weights.EmbeddingWeights`."""

    site: int
    a: PackedArray | None
    b: PackedArray | None
    scale: PackedArray | None = None
    rows: PackedRows | None = None
    norm: PackedNorm | None = None
    """As of a part."""


@dataclass(frozen=True, slots=True)
class PackedModule:
    """A module's own parameters, by name."""

    site: int
    parameters: dict[str, PackedArray]


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """A and B of the experts' parameters, by parameter."""

    site: int
    parameters: dict[str, tuple[PackedArray, PackedArray]]


@dataclass(frozen=True, slots=True)
class PackedIndex:
    """Where everything lies in the packed file."""

    nbytes: int
    """Length of the file."""
    modules: int
    """Base modules that the adapter changes."""
    linears: tuple[PackedLinears, ...] = ()
    embeddings: tuple[PackedEmbedding, ...] = ()
    saved: tuple[PackedModule, ...] = ()
    experts: tuple[PackedExperts, ...] = ()


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
