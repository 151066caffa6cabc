"""DoRA's norms where ranks divide what they go over, a linear's inputs or the vocabulary: each has a part of
their squares, which are added up once, when an adapter is loaded."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np
import torch

from ..errors import AdapterFetchFailed, AdapterRejected
from .floats import Float32
from .packed import PackedArray, PackedEmbedding, PackedNorm, PackedPart
from .weights import PackedAdapter, Views

KEPT = 16
"""Adapters whose squares a rank leaves for the others at most."""

Scaled = TypeVar("Scaled", PackedPart, PackedEmbedding)


class Board(Protocol):
    """Where the ranks of a group leave bytes for each other. Called from any thread."""

    def post(self, key: str, value: bytes) -> None: ...

    def read(self, key: str) -> bytes:
        """Waits until it is there. Raises RanksLost where it does not come."""
        ...

    def remove(self, key: str) -> None: ...


class GroupNorms:
    """One rank's view of them. Called from one event loop."""

    def __init__(self, rank: int, size: int, board: Board) -> None:
        self._rank = rank
        self._size = size
        self._board = board
        self._posted: OrderedDict[str, None] = OrderedDict()

    async def complete(self, digest: str, adapter: PackedAdapter) -> PackedAdapter:
        """An adapter in host memory with its scales: itself, or its buffer, changed, under another index.

        To be called on every rank for every load, also of what is complete: another rank may lack it, and
        wait for this one's squares. Raises AdapterFetchFailed where one brings other norms, RanksLost where
        it brings none, AdapterRejected where a row has no length.
        """
        parts = list(_normed(adapter))
        if not parts:
            return adapter
        views = Views(adapter.buffer)
        own = np.concatenate([views.view(part.norm.squares).numpy() for part in parts])
        await asyncio.to_thread(self._post, digest, own)
        if all(part.is_complete for part in parts):
            return adapter
        squares = await asyncio.to_thread(self._sum, digest, own)
        return await asyncio.to_thread(_with_scales, adapter, parts, squares)

    def _post(self, digest: str, own: Float32) -> None:
        self._board.post(_key(digest, self._rank), own.tobytes())
        self._posted[digest] = None
        self._posted.move_to_end(digest)
        while len(self._posted) > KEPT:
            self._board.remove(_key(self._posted.popitem(last=False)[0], self._rank))

    def _sum(self, digest: str, own: Float32) -> Float32:
        """Of all ranks, in their order: the same bits on each of them."""
        total = np.zeros(len(own), np.float64)
        for rank in range(self._size):
            part = own
            if rank != self._rank:
                part = np.frombuffer(self._board.read(_key(digest, rank)), np.float32)
            if len(part) != len(own):
                raise AdapterFetchFailed(
                    f"rank {rank} has norms of {len(part)} rows of adapter {digest}, rank {self._rank} of "
                    f"{len(own)}; start every rank with the same model"
                )
            total += part
        return total.astype(np.float32)


def _key(digest: str, rank: int) -> str:
    return f"norms of {digest} on rank {rank}"


@dataclass(frozen=True, slots=True)
class _Part:
    """What is scaled by one norm."""

    norm: PackedNorm
    b: PackedArray
    shift: PackedArray | None
    is_complete: bool


def _normed(adapter: PackedAdapter) -> Iterator[_Part]:
    """What the ranks have the norms of between them, in the order of the index."""
    for part in chain.from_iterable(site.parts for site in adapter.index.linears):
        if part.norm is not None:
            yield _Part(part.norm, part.b, part.shift, part.scale is not None)
    for site in adapter.index.embeddings:
        if site.norm is not None and site.b is not None:
            yield _Part(site.norm, site.b, None, site.scale is not None)


def _with_scales(adapter: PackedAdapter, parts: list[_Part], squares: Float32) -> PackedAdapter:
    """Changes the adapter's buffer."""
    views = Views(adapter.buffer)
    scales, begin = [], 0
    for part in parts:
        magnitude = views.view(part.norm.magnitude)
        rows = torch.from_numpy(squares[begin : begin + len(magnitude)])
        scales.append(magnitude / rows.clamp_min(0).sqrt())
        begin += len(magnitude)
    if not all(bool(scale.isfinite().all()) for scale in scales):
        raise AdapterRejected("a row of W + BA has no length that could be scaled; the adapter is damaged")
    for part, scale in zip(parts, scales, strict=True):
        b = views.view(part.b)
        b.copy_(b.float() * scale)
        if part.norm.bias is not None and part.shift is not None:
            views.view(part.shift).sub_(views.view(part.norm.bias) * scale)
        views.view(part.norm.magnitude).copy_(scale)
    linears = tuple(replace(site, parts=tuple(map(_scaled, site.parts))) for site in adapter.index.linears)
    embeddings = tuple(map(_scaled, adapter.index.embeddings))
    return replace(adapter, index=replace(adapter.index, linears=linears, embeddings=embeddings))


def _scaled(part: Scaled) -> Scaled:
    """Whose scale lies where its magnitude lay."""
    return part if part.norm is None else replace(part, scale=part.norm.magnitude)
