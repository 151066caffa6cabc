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
    """Weights of one adapter at a site whose linears have the outputs `widths`; rank 0 leaves one out."""

    def make(
        ranks: Sequence[int], in_features: int, widths: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> LoraWeights:
        parts = []
        rank_offset = out_offset = 0
        for rank, width in zip(ranks, widths, strict=True):
            if rank:
                b = torch.randn(rank, width) / rank**0.5
                parts.append(LoraPart(rank_offset, out_offset, b.to(dtype)))
            rank_offset += rank
            out_offset += width
        a = torch.randn(rank_offset, in_features) / in_features**0.5
        return LoraWeights(a.to(dtype), tuple(parts))

    return make
