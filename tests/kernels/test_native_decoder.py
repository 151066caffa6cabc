"""A decoder's pieces by the extension, with each set of instructions, against plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from loraplex.kernels.decoder_ops import Scores

from .test_cuda_decoder import (
    Cached,
    assert_alike,
    check_gate,
    check_no_rows,
    check_norms,
    check_rope,
    poisoned,
)

native_decoder = pytest.importorskip("loraplex.kernels.native_decoder", exc_type=ImportError)

DTYPES = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("level")


@pytest.fixture
def ops() -> Any:
    return native_decoder.NativeDecoderOps()


@pytest.fixture(autouse=True)
def on_the_device() -> None:
    """Here: where tensors are made anyway."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 64, 2056, 12, 5])
def test_norms(width: int, dtype: torch.dtype, ops: Any) -> None:
    check_norms(ops, width, dtype)


@pytest.mark.usefixtures("two_threads")
def test_many_rows_on_several_threads(ops: Any) -> None:
    x, weight = torch.randn(300, 512), torch.randn(512)
    out = poisoned(300, 512, dtype=torch.float32)
    ops.rms_norm(out, x, weight, 1e-5)
    assert_alike(out, F.rms_norm(x.double(), (512,), weight.double(), 1e-5))
    cached, scores = Cached([40, 3, 90, 17] * 5, 4, 2, 64, torch.float32), Scores(0.3, None, None)
    assert_alike(_attended(ops, cached, scores), cached.expected(scores))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 40), (3, 7), (40, 256), (70, 512)])
def test_the_gate(rows: int, width: int, dtype: torch.dtype, ops: Any) -> None:
    check_gate(ops, rows, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_are_no_work(dtype: torch.dtype, ops: Any) -> None:
    check_no_rows(ops, dtype)


def test_a_gate_that_is_not_finite_stays_so(ops: Any) -> None:
    gate_up = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, 1.0, 1.0, 1.0, torch.nan]])
    out = torch.zeros(1, 4)
    ops.silu_mul(out, gate_up)
    assert out[0, 0].isnan()
    assert out[0, 3].isnan()
    assert out[0, 1] == torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (2, 2, 64), (3, 1, 6), (40, 4, 80)])
def test_rotary_positions_and_the_cache(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, ops: Any
) -> None:
    check_rope(ops, heads, kv_heads, dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((4, 4, 64), 16), ((6, 2, 80), 4), ((7, 1, 24), 16), ((5, 1, 7), 3), ((2, 1, 256), 32)],
)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 19])
@pytest.mark.parametrize("times", [1, 2], ids=["few rows", "many rows"])
def test_paged_attention(
    times: int,
    window: int | None,
    softcap: float | None,
    shape: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    ops: Any,
) -> None:
    cached = Cached([1, 16, 17, 40, 130] * times, *shape, dtype, block_size)
    scores = Scores(0.3, window, softcap)
    assert_alike(_attended(ops, cached, scores), cached.expected(scores))


def test_large_scores_do_not_overflow(ops: Any) -> None:
    cached = Cached([40, 600], 2, 1, 64, torch.bfloat16)
    cached.q *= 30
    scores = Scores(1.0, None, None)
    assert_alike(_attended(ops, cached, scores), cached.expected(scores))


def _attended(ops: Any, cached: Cached, scores: Scores) -> torch.Tensor:
    out = poisoned(*cached.q.shape, dtype=cached.dtype)
    lengths = torch.tensor(cached.lengths)
    ops.paged_attention(out, cached.q, (cached.keys, cached.values), cached.tables, lengths, scores)
    return out
