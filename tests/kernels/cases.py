"""Awkward sites and batches that every backend of the operators is tested on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loraplex.kernels.ops import EmbeddingLora, Entries, LoraWeights

from .conftest import MakeAdapter

IN = 48
WIDTHS = (40, 16, 24)
OUT = sum(WIDTHS)
RANKS = (1, 3, 8, 64, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Table = Mapping[int, LoraWeights]

BATCHES: dict[str, list[Entries]] = {
    "one token": [((2, 1.0),)],
    "one base token": [()],
    "all base": [()] * 9,
    "all distinct": [((slot, 1.0),) for slot in range(7)],
    "identical": [((3, 1.0),)] * 33,
    "skewed": [((0, 1.0),)] * 60 + [((slot, 1.0),) for slot in (1, 2, 3, 4)],
    "non-adjacent": [((slot, 1.0),) if slot is not None else () for slot in (1, None, 4, 1, 4, None, 1, 2)],
    "several a row": [((0, 0.5), (3, -1.5)), ((3, -1.5), (0, 0.5)), (), ((4, -0.25), (5, 2.0), (6, 1.0))],
    "same slot twice": [((2, 1.0), (2, -0.5)), ((2, 0.5),)],
    "parts missing": [((5, 1.0),), ((6, 1.0),), ((5, -1.0), (6, 1.0)), ((0, 1.0),)],
    "vectors": [((7, 1.0),), ((8, 1.0),), ((9, -0.5),), ((10, 2.0),), (), ((8, 1.0),)],
    "a scale between others": [((9, 2.0), (8, 0.5), (0, 1.0)), ((0, 1.0), (8, 0.5), (9, 2.0))],
    "slot leaves the site alone": [((99, 1.0),), ((99, 1.0), (1, 1.0)), ()],
    "prefill": [((1, 1.0),)] * 150 + [()] * 31 + [((4, 1.0),)] * 97,
}


def table_of(make_adapter: MakeAdapter, dtype: torch.dtype) -> dict[int, LoraWeights]:
    """Slots 0..4 of every rank, 5 and 6 that leave linears of the site out, 7..10 with vectors."""
    table = {slot: make_adapter([rank] * 3, IN, WIDTHS, dtype) for slot, rank in enumerate(RANKS)}
    table[5] = make_adapter([0, 4, 0], IN, WIDTHS, dtype)
    table[6] = make_adapter([2, 0, 7], IN, WIDTHS, dtype)
    table[7] = make_adapter([0, 0, 0], IN, WIDTHS, dtype, scale=True)
    table[8] = make_adapter([8, 0, 3], IN, WIDTHS, dtype, scale=True)
    table[9] = make_adapter([0, 0, 0], IN, WIDTHS, dtype, shift=True)
    table[10] = make_adapter([1, 16, 0], IN, WIDTHS, dtype, scale=True, shift=True)
    return table


def batch(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A base output y [rows, OUT] and an input x [rows, IN]."""
    return torch.randn(rows, OUT).to(dtype), torch.randn(rows, IN).to(dtype)


def embeddings(dtype: torch.dtype) -> dict[int, EmbeddingLora]:
    """Slots 0..2 at ranks 1, 3 and 64, and slots 3 and 4 with a vocabulary of their own, 3 with a scale."""

    def make(vocabulary: int, rank: int, scale: torch.Tensor | None = None) -> EmbeddingLora:
        a, b = torch.randn(vocabulary, rank), torch.randn(rank, OUT) / rank**0.5
        return EmbeddingLora(a.to(dtype), b.to(dtype), scale)

    table = {slot: make(30, rank) for slot, rank in enumerate((1, 3, 64))}
    return table | {3: make(34, 8, 1 + torch.randn(OUT) / 4), 4: make(20, 2)}
