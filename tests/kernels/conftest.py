"""Random sites and batches for every backend's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from loraplex.kernels.ops import LoraPart, LoraWeights

MakeAdapter = Callable[..., LoraWeights]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_adapter() -> MakeAdapter:
    """Weights of one adapter at a site whose linears have the outputs `widths`.

    Rank 0 leaves a linear out, or without A and B where it has a scale or a shift.
    """

    def make(
        ranks: Sequence[int],
        in_features: int,
        widths: Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        scale: bool = False,
        shift: bool = False,
    ) -> LoraWeights:
        parts = []
        rank_offset = out_offset = 0
        for rank, width in zip(ranks, widths, strict=True):
            if rank or scale or shift:
                b = torch.randn(rank, width) / max(rank, 1) ** 0.5
                part = LoraPart(
                    rank_offset,
                    out_offset,
                    b.to(dtype),
                    1 + torch.randn(width) / 4 if scale else None,
                    torch.randn(width) if shift else None,
                )
                parts.append(part)
            rank_offset += rank
            out_offset += width
        a = torch.randn(rank_offset, in_features) / in_features**0.5
        return LoraWeights(a.to(dtype), tuple(parts))

    return make
