"""Random sites and batches for every backend's tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from loraplex.kernels.ops import LoraPart, LoraWeights
from loraplex.kernels.side_stream import InOrder

from . import forms
from .emulation.launcher import PLAIN, SANITIZED, EmulatedLauncher, missing
from .target import Target

MakeAdapter = Callable[..., LoraWeights]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are faster without a second thread, most of all beside other tests."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def target() -> Target:
    """Where the tests of CUDA kernels run: on the CPU."""
    if (why := missing()) is not None:
        pytest.skip(why)
    flags = SANITIZED if os.environ.get("SANITIZE") else PLAIN
    return Target(EmulatedLauncher(flags=flags), torch.device("cpu"), InOrder())


@pytest.fixture(params=["torch", *forms.LEVELS])
def form(request: pytest.FixtureRequest) -> Iterator[forms.Form]:
    """Each form of the CPU's operators."""
    with forms.form_named(request.param) as result:
        yield result


@pytest.fixture(params=forms.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions that the extension has here."""
    with forms.using(request.param):
        yield request.param
