"""The decoder's kernels, run on the CPU, against plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from loraplex.kernels import cuda_decoder
from loraplex.kernels.cuda_decoder import CudaDecoderOps, attention_room, splits_of
from loraplex.kernels.decoder_ops import DecoderOps, Scores

from .target import Target

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Relative, and of the largest value."""


def assert_alike(got: torch.Tensor, want: torch.Tensor) -> None:
    limit = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=limit, atol=limit * want.abs().max().item())


@pytest.fixture(autouse=True)
def on_the_device(target: Target) -> Iterator[None]:
    """Tensors are made where the kernels run."""
    with target.device:
        yield


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def check_norms(ops: DecoderOps, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, width).to(dtype), torch.randn(width).to(dtype)
    out = poisoned(3, width, dtype=dtype)
    ops.rms_norm(out, x, weight, 1e-5)
    assert_alike(out, F.rms_norm(x.double(), (width,), weight.double(), 1e-5))
    residual = torch.randn(3, width).to(dtype)
    total = residual + x
    out = poisoned(3, width, dtype=dtype)
    ops.add_rms_norm(out, residual, x, weight, 1e-2)
    assert torch.equal(residual, total)
    assert_alike(out, F.rms_norm(total.double(), (width,), weight.double(), 1e-2))


def check_no_rows(ops: DecoderOps, dtype: torch.dtype) -> None:
    """As in a step of prompts that all go on."""
    none, weight = torch.empty(0, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    ops.add_rms_norm(torch.empty_like(none), none, none, weight, 1e-5)
    ops.silu_mul(torch.empty(0, 32, dtype=dtype), none)
    ops.rms_norm(torch.empty_like(none), none, weight, 1e-5)
    assert weight.eq(1).all()


def check_gate(ops: DecoderOps, rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype)
    gate_up[0, 0], gate_up[-1, width - 1] = -300.0, 300.0
    out = poisoned(rows, width, dtype=dtype)
    ops.silu_mul(out, gate_up)
    assert_alike(out, F.silu(gate_up[:, :width].double()) * gate_up[:, width:].double())


def check_rope(ops: DecoderOps, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    rows, blocks, block_size = 5, 4, 4
    wide = torch.randn(rows, (heads + 2 * kv_heads) * dim + 8).to(dtype)
    qkv = wide[:, : (heads + 2 * kv_heads) * dim]
    angles = torch.rand(rows, dim) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.zeros(blocks, block_size, kv_heads, dim, dtype=dtype) for _ in range(2))
    slots = torch.tensor([7, 0, 15, 3, 8])
    q = poisoned(rows, heads, dim, dtype=dtype)
    ops.rope_kv(q, keys, values, qkv, (cos, sin), slots)
    parts = qkv.double().split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)

    def rotated(part: torch.Tensor) -> torch.Tensor:
        x = part.reshape(rows, -1, dim)
        turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
        return x * cos.double()[:, None] + turned * sin.double()[:, None]

    assert_alike(q, rotated(parts[0]))
    assert_alike(keys.view(-1, kv_heads, dim)[slots], rotated(parts[1]))
    assert torch.equal(values.view(-1, kv_heads, dim)[slots].double(), parts[2].reshape(rows, kv_heads, dim))
    others = [slot for slot in range(blocks * block_size) if slot not in slots.tolist()]
    for store in (keys, values):
        assert not store.view(-1, kv_heads, dim)[others].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 64, 2056, 12, 5])
def test_norms(width: int, dtype: torch.dtype, target: Target) -> None:
    check_norms(CudaDecoderOps(target.launcher), width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_are_no_work(dtype: torch.dtype, target: Target) -> None:
    check_no_rows(CudaDecoderOps(target.launcher), dtype)


def test_rows_too_wide_for_registers(target: Target) -> None:
    width = 8 * 256 * 8 + 8
    x, weight = torch.randn(1, width).bfloat16(), torch.randn(width).bfloat16()
    out = poisoned(1, width, dtype=torch.bfloat16)
    assert cuda_decoder.norm_vectors(torch.bfloat16, width) == 0
    CudaDecoderOps(target.launcher).rms_norm(out, x, weight, 1e-5)
    assert_alike(out, F.rms_norm(x.double(), (width,), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 40), (3, 7), (40, 256)])
def test_the_gate(rows: int, width: int, dtype: torch.dtype, target: Target) -> None:
    check_gate(CudaDecoderOps(target.launcher), rows, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (2, 2, 64), (3, 1, 6)])
def test_rotary_positions_and_the_cache(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, target: Target
) -> None:
    check_rope(CudaDecoderOps(target.launcher), heads, kv_heads, dim, dtype)


@dataclass
class Cached:
    """Rows of these lengths in a paged cache; what no row owns is NaN."""

    lengths: list[int]
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    block_size: int = 16
    spare: int = 1

    def __post_init__(self) -> None:
        counts = [-(-length // self.block_size) for length in self.lengths]
        width = max(counts) + self.spare
        order = (1 + torch.randperm(sum(counts))).tolist()
        self.tables = torch.zeros(len(counts), width, dtype=torch.int32)
        for table, count in zip(self.tables, counts, strict=True):
            table[:count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        shape = (1 + sum(counts), self.block_size, self.kv_heads, self.dim)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2))
        self.q = torch.randn(len(counts), self.heads, self.dim).to(self.dtype)
        self.rows = []
        for length, table in zip(self.lengths, self.tables, strict=True):
            k, v = (torch.randn(length, self.kv_heads, self.dim).to(self.dtype) for _ in range(2))
            self.rows.append((k, v))
            for token in range(length):
                block, place = int(table[token // self.block_size]), token % self.block_size
                self.keys[block, place], self.values[block, place] = k[token], v[token]

    def run(self, target: Target, scores: Scores, rows: slice = slice(None)) -> torch.Tensor:
        splits = splits_of(self.tables.shape[1], self.block_size)
        count = len(self.q[rows])
        out = poisoned(count, self.heads, self.dim, dtype=self.dtype)
        room = torch.full((attention_room(count, self.heads, self.dim, splits),), torch.nan)
        CudaDecoderOps(target.launcher).decode_attention(
            out,
            self.q[rows],
            (self.keys, self.values),
            self.tables[rows],
            torch.tensor(self.lengths)[rows],
            room,
            scores,
        )
        return out

    def expected(self, scores: Scores) -> torch.Tensor:
        result = torch.zeros(len(self.q), self.heads, self.dim, dtype=torch.float64)
        for row, (k, v) in enumerate(self.rows):
            first = 0 if scores.window is None else max(0, len(k) - scores.window)
            if not len(k):
                continue
            group = self.heads // self.kv_heads
            seen_k, seen_v = (each[first:].double().repeat_interleave(group, dim=1) for each in (k, v))
            product = torch.einsum("hd,thd->ht", self.q[row].double(), seen_k) * scores.scale
            if scores.softcap is not None:
                product = torch.tanh(product / scores.softcap) * scores.softcap
            result[row] = torch.einsum("ht,thd->hd", product.softmax(-1), seen_v)
        return result


PLAIN = Scores(0.3, None, None)
SHAPES = [
    (4, 4, 64),
    (4, 2, 128),
    (7, 1, 80),
    (8, 1, 96),
    (16, 1, 64),
    (32, 2, 128),
    (4, 2, 256),
    (16, 1, 256),
    (6, 2, 24),
    (17, 1, 64),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention(shape: tuple[int, int, int], dtype: torch.dtype, target: Target) -> None:
    cached = Cached([1, 0, 16, 17, 40], *shape, dtype)
    assert_alike(cached.run(target, PLAIN), cached.expected(PLAIN))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 48, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 19, 600])
def test_rows_of_several_parts(
    window: int | None, softcap: float | None, block_size: int, dtype: torch.dtype, target: Target
) -> None:
    lengths = [cuda_decoder.SPLIT + 1, 0, 530, 5, 2 * cuda_decoder.SPLIT]
    cached = Cached(lengths, 2, 1, 64, dtype, block_size, spare=3)
    scores = Scores(0.3, window, softcap)
    assert_alike(cached.run(target, scores), cached.expected(scores))


def test_large_scores_do_not_overflow(target: Target) -> None:
    cached = Cached([40, 600], 2, 1, 64, torch.bfloat16)
    cached.q *= 30
    scores = Scores(1.0, None, None)
    assert_alike(cached.run(target, scores), cached.expected(scores))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype, target: Target) -> None:
    cached = Cached([600, 3, 33], 4, 2, 64, dtype)
    together = cached.run(target, PLAIN)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(cached.run(target, PLAIN, one), together[one])


def test_what_is_fast_is_told_by_shapes() -> None:
    assert cuda_decoder.is_fast(torch.bfloat16, 128, 4, 16)
    for changed in ((torch.float32, 128, 4, 16), (torch.float16, 72, 4, 16), (torch.float16, 64, 17, 16)):
        assert not cuda_decoder.is_fast(*changed)
    assert not cuda_decoder.is_fast(torch.float16, 64, 4, 8)


def test_parts_are_shared_by_blocks_that_fill_the_device() -> None:
    assert cuda_decoder.splits_of(32, 16) == 1
    assert cuda_decoder.splits_of(33, 16) == 2
    assert cuda_decoder.attention_grid(16, 4, 132) == (64, 1, 1)
    assert cuda_decoder.attention_grid(16, 100, 132) == (256, 1, 1)
    assert cuda_decoder.attention_grid(256, 100, 132) == (256, 1, 1)
    assert cuda_decoder.attention_grid(1024, 100, 132) == (1024, 1, 1)
    assert cuda_decoder.attention_grid(0, 1, 132) == (0, 1, 1)
    assert cuda_decoder.attention_room(8, 4, 64, 1) == 1
    assert cuda_decoder.attention_room(8, 4, 64, 3) == 8 * 4 * 3 * 66
