"""The packed form of an adapter: one flat file of aligned arrays, and an index of plain data beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

import msgspec

from .floats import Stored
from .parse import SiteArrays

ALIGNMENT = 128
"""Bytes; a cache line of a GPU, and a multiple of every vector load."""


class PackedArray(msgspec.Struct, frozen=True):
    """A row-major matrix inside the file."""

    offset: int
    """First byte; a multiple of ALIGNMENT."""
    shape: tuple[int, int]


class PackedPart(msgspec.Struct, frozen=True):
    rank_offset: int
    out_offset: int
    b: PackedArray
    """[rank, out]."""


class PackedSite(msgspec.Struct, frozen=True):
    site: int
    a: PackedArray
    """[sum of the parts' ranks, in]."""
    parts: tuple[PackedPart, ...]


class PackedIndex(msgspec.Struct, frozen=True):
    """Where everything lies in the packed file."""

    dtype: str
    """"float32", "bfloat16" or "float16"."""
    nbytes: int
    """Length of the file."""
    sites: tuple[PackedSite, ...]


def write_packed(file: BinaryIO, sites: Iterable[SiteArrays], dtype: str) -> PackedIndex:
    """Write every array of `sites`, aligned, from the start of an empty file. Returns the index."""
    packed = []
    for site in sites:
        a = _append(file, site.a)
        parts = tuple(
            PackedPart(part.rank_offset, part.out_offset, _append(file, part.b)) for part in site.parts
        )
        packed.append(PackedSite(site.site, a, parts))
    return PackedIndex(dtype, file.tell(), tuple(packed))


def _append(file: BinaryIO, array: Stored) -> PackedArray:
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(array.data.cast("B"))
    rows, columns = array.shape
    return PackedArray(offset, (rows, columns))
