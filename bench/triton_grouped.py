"""A grouped LoRA operator in Triton, written for comparison: one shrink and one expand.

Rows are sorted by adapter; chunks of at most 16 rows of one adapter are the programs' work; ranks are padded
to a multiple of 16 by masks. Where chunks and ranks alone would leave processors idle, the input is split
among programs, whose sums the expand adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, DEPTH, MOST_SPLITS = 16, 256, 16


@triton.jit
def _shrink(
    x,
    a,
    hidden,
    chunks,
    features,
    rank,
    stretch,
    size,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """hidden[split, row, r] = sum over its k of x[row, k] * a[adapter, r, k].

    grid (chunks, stretches of ranks, splits): each split has `stretch` inputs, and `size` hidden values.
    """
    adapter = tl.load(chunks + tl.program_id(0) * 3)
    first = tl.load(chunks + tl.program_id(0) * 3 + 1)
    count = tl.load(chunks + tl.program_id(0) * 3 + 2)
    row = tl.arange(0, ROWS)
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    k = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    begin = tl.program_id(2) * stretch
    for start in range(begin, tl.minimum(begin + stretch, features), DEPTH):
        xs = tl.load(
            x + (first + row)[:, None] * features + (start + k)[None, :],
            mask=(row < count)[:, None],
            other=0.0,
        )
        weights = tl.load(
            a + (adapter * rank + r)[None, :] * features + (start + k)[:, None],
            mask=(r < rank)[None, :],
            other=0.0,
        )
        total += tl.dot(xs, weights)
    tl.store(
        hidden + tl.program_id(2) * size + (first + row)[:, None] * rank + r[None, :],
        total,
        mask=(row < count)[:, None] & (r < rank)[None, :],
    )


@triton.jit
def _expand(
    hidden,
    b,
    y,
    chunks,
    columns,
    rank,
    parts,
    part_width,
    size,
    SPLITS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y[row, c] += sum over r of hidden[row, r] * b[adapter, r, c]. grid (chunks, stretches of columns).

    Of `parts` linears that lie side by side, each `part_width` wide, each has ranks of its own.
    """
    adapter = tl.load(chunks + tl.program_id(0) * 3)
    first = tl.load(chunks + tl.program_id(0) * 3 + 1)
    count = tl.load(chunks + tl.program_id(0) * 3 + 2)
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = (tl.program_id(1) * WIDTH) // part_width
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, rank, RANKS):
        r = start + tl.arange(0, RANKS)
        hs = tl.zeros((ROWS, RANKS), tl.float32)
        for split in tl.static_range(SPLITS):
            hs += tl.load(
                hidden + split * size + (first + row)[:, None] * (rank * parts) + part * rank + r[None, :],
                mask=(row < count)[:, None] & (r < rank)[None, :],
                other=0.0,
            )
        weights = tl.load(
            b + (adapter * rank + r)[:, None] * columns + column[None, :],
            mask=(r < rank)[:, None],
            other=0.0,
        )
        total += tl.dot(hs.to(weights.dtype), weights)
    at = y + (first + row)[:, None] * columns + column[None, :]
    mask = (row < count)[:, None]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total.to(y.dtype.element_ty), mask=mask)


class TritonGrouped:
    """The operator for one batch of rows that are sorted by adapter."""

    def __init__(self, adapters: torch.Tensor, rank: int, parts: int, processors: int) -> None:
        """`adapters`: of each row, ascending."""
        chunks: list[tuple[int, int, int]] = []
        values, counts = torch.unique_consecutive(adapters, return_counts=True)
        first = 0
        for adapter, count in zip(values.tolist(), counts.tolist(), strict=True):
            chunks += [(adapter, first + start, min(ROWS, count - start)) for start in range(0, count, ROWS)]
            first += count
        self._chunks = torch.tensor(chunks, dtype=torch.int32, device=adapters.device)
        self._rank = rank
        self._parts = parts
        blocks = len(chunks) * triton.cdiv(rank * parts, 16)
        self._splits = max(1, min(MOST_SPLITS, 4 * processors // blocks))
        shape = (self._splits, len(adapters), rank * parts)
        self._hidden = torch.empty(shape, dtype=torch.float32, device=adapters.device)

    def add_to(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """y [rows, columns] += x [rows, features] a^T b, with a [adapters, parts * rank, features] and
        b [adapters, rank, columns]. Features are a multiple of DEPTH."""
        count, stacked, size = len(self._chunks), self._rank * self._parts, self._hidden[0].numel()
        features, columns = x.shape[1], y.shape[1]
        stretch = triton.cdiv(triton.cdiv(features, self._splits), DEPTH) * DEPTH
        splits = triton.cdiv(features, stretch)
        _shrink[count, triton.cdiv(stacked, 16), splits](
            *(x, a, self._hidden, self._chunks, features, stacked, stretch, size),
            RANKS=16,
            DEPTH=DEPTH,
            ROWS=ROWS,
        )
        _expand[count, triton.cdiv(columns, 128)](
            *(
                self._hidden,
                b,
                y,
                self._chunks,
                columns,
                self._rank,
                self._parts,
                columns // self._parts,
                size,
            ),
            SPLITS=splits,
            RANKS=max(16, min(64, triton.next_power_of_2(self._rank))),
            WIDTH=128,
            ROWS=ROWS,
        )
