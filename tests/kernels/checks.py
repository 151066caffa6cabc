"""One sharp check of each kernel file: small, and every operator in the file matters to it."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from loraplex.kernels.cuda_decoder import SPLIT, CudaDecoderOps
from loraplex.kernels.decoder_ops import Scores
from loraplex.kernels.device_tables import PARTS, RECORD_BYTES, DeviceTable
from loraplex.kernels.ops import Entries, LoraPart, LoraWeights, route
from loraplex.kernels.reference import reference_embedding, reference_lora

from .cases import embeddings
from .target import Target
from .test_cuda import TOLERANCE, Site, error
from .test_cuda_decoder import Cached, assert_alike

Check = Callable[[Target], None]


def _adapter(
    ranks: Sequence[int], features: int, widths: Sequence[int], dtype: torch.dtype, *, vectors: bool = False
) -> LoraWeights:
    """`vectors`: a scale for every part, a shift for the first."""
    parts, rank_offset, out_offset = [], 0, 0
    for rank, width in zip(ranks, widths, strict=True):
        b = (torch.randn(rank, width) / max(rank, 1) ** 0.5).to(dtype)
        scale = 1 + torch.randn(width) / 4 if vectors else None
        shift = torch.randn(width) if vectors and not parts else None
        parts.append(LoraPart(rank_offset, out_offset, b, scale, shift))
        rank_offset += rank
        out_offset += width
    a = torch.randn(rank_offset, features) / features**0.5
    return LoraWeights(a.to(dtype), tuple(parts))


def _batches(rows: int) -> Iterator[tuple[list[Entries], int]]:
    """Entry lists, and how many of the rows decode."""
    mixed: list[Entries] = [((row % 4, 1.0),) if row % 5 else () for row in range(rows)]
    mixed[1], mixed[7] = ((0, 0.5), (3, -1.5)), ((2, 2.0), (0, 1.0))
    whole: list[Entries] = [((0, 1.0),)] * rows
    for entries in (mixed, whole):
        yield from ((entries, decode) for decode in (rows, 0))


def _lora(target: Target, features: int, widths: Sequence[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = {
        0: _adapter([16, 5], features, widths, dtype),
        1: _adapter([1, 40], features, widths, dtype),
        2: _adapter([3, 0], features, widths, dtype, vectors=True),
        3: _adapter([0, 17], features, widths, dtype),
    }
    rows = 70
    y, x = torch.randn(rows, sum(widths)).to(dtype), torch.randn(rows, features).to(dtype)
    wide = torch.randn(rows, features + 8).to(dtype)[:, :features].copy_(x)
    for index, (entries, decode_rows) in enumerate(_batches(rows)):
        with Guarded(front=index < 2):
            got = Site(target, table, widths).run(y, wide, entries, decode_rows)
        assert error(got, reference_lora(y, x, entries, table)) < TOLERANCE[dtype]
        bare = [row for row in range(rows) if not entries[row]]
        assert torch.equal(got[bare], y[bare])
    _shares(target, features, widths, dtype)


def _splits(target: Target) -> None:
    """An input in several splits, the last of them shorter; memory ends with the last one's values."""
    torch.manual_seed(10)
    features, widths, dtype = 6152, (64,), torch.bfloat16
    y, x = torch.randn(40, 64).to(dtype), torch.randn(40, features).to(dtype)
    entries: list[Entries] = [((0, 1.0),)] * 40
    for rank in (20, 8):
        table = {0: _adapter([rank], features, widths, dtype)}
        for decode_rows in (9, 0):
            with Guarded():
                got = Site(target, table, widths).run(y, x, entries, decode_rows)
            assert error(got, reference_lora(y, x, entries, table)) < TOLERANCE[dtype]


def _shares(target: Target, features: int, widths: Sequence[int], dtype: torch.dtype) -> None:
    ops = target.ops()
    table = {key: _adapter([2] * len(widths), features, widths, dtype) for key in (0, 2, 4)}
    resident = ops.site_table(widths, shares=3)
    resident.update(target.adapters(table))
    entries: list[Entries] = [((4, 1.0),), ((0, 1.0), (4, 0.5)), ((2, 1.0),), ((1, 1.0),)]
    y, x = torch.randn(4, sum(widths)).to(dtype), torch.randn(4, features).to(dtype)
    want = reference_lora(y, x, entries, table)
    ops.start_lora(x, ops.place(route(entries), shares=3), resident).add_to(y)
    assert error(y, want) < TOLERANCE[dtype]


def guarded(tensor: torch.Tensor, *, front: bool = False) -> torch.Tensor:
    """A copy behind whose end, or before whose beginning, the processor finds no memory."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    gap = ctypes.addressof(ctypes.c_char.from_buffer(memory, 0 if front else whole))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(gap), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if front else whole - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


class Guarded(TorchFunctionMode):
    """Within it, what is allocated for tables, tasks and results ends where memory does, or begins there."""

    def __init__(self, *, front: bool = False) -> None:
        super().__init__()
        self._front = front

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.zeros, torch.empty, torch.full) and result.numel():
            return guarded(result, front=self._front)
        return result


def _stays_inside(target: Target, dtype: torch.dtype = torch.bfloat16) -> None:
    """Shapes that end in the middle of every tile, at the end of memory."""
    torch.manual_seed(8)
    widths = (136, 72)
    y, x = torch.randn(9, 208).to(dtype), guarded(torch.randn(9, 40).to(dtype))
    for ranks in ((5, 3), (5, 2), (9, 6), (13, 7), (20, 17)):
        ops = target.ops()
        weights = _adapter(ranks, 40, widths, dtype)
        parts = tuple(replace(part, b=guarded(part.b)) for part in weights.parts)
        table = ops.site_table(widths)
        table[0] = LoraWeights(guarded(weights.a), parts)
        for decode_rows in (9, 0):
            got, placed = guarded(y), ops.place(route([((0, 1.0),)] * 9, decode_rows=decode_rows))
            ops.start_lora(x, placed, table).add_to(got)
            want = reference_lora(y, x, [((0, 1.0),)] * 9, {0: weights})
            assert error(got, want) < TOLERANCE[dtype]


def _reads_its_parts(target: Target, dtype: torch.dtype) -> None:
    """An adapter with as many parts as there can be; what stands behind would triple columns of y."""
    torch.manual_seed(9)
    ops, widths = target.ops(), (8, 8, 8, 8)
    weights, scale = _adapter([2] * PARTS, 16, widths, dtype), torch.full((8,), 3.0)
    table = ops.site_table(widths)
    table.update(target.adapters({0: weights, 1: weights}))
    one_too_many = struct.pack("=QQQiiii", 0, scale.data_ptr(), 0, 0, 0, 0, 8)
    assert isinstance(table, DeviceTable)
    table.arena.write(1, 0, one_too_many.ljust(RECORD_BYTES, b"\0"), 0)
    y, x, entries = torch.randn(3, 32).to(dtype), torch.randn(3, 16).to(dtype), [((0, 1.0),)] * 3
    want = reference_lora(y, x, entries, {0: weights})
    ops.start_lora(x, ops.place(route(entries, decode_rows=3)), table).add_to(y)
    assert error(y, want) < TOLERANCE[dtype]


def _leaves_the_rest(target: Target) -> None:
    """What no part covers keeps its bits: here NaN, which would be written back as another one."""
    torch.manual_seed(7)
    dtype, widths = torch.bfloat16, (136, 64, 128, 72)
    for linear, width in enumerate(widths):
        weights, first = _adapter([3] * 4, 16, widths, dtype), sum(widths[:linear])
        site = Site(target, {0: replace(weights, parts=(weights.parts[linear],))}, widths)
        y, x = torch.full((12, 400), torch.nan, dtype=dtype), torch.randn(12, 16).to(dtype)
        y[:, first : first + width] = 1.0
        entries: list[Entries] = [((0, 1.0),)] * 10 + [()] * 2
        for decode_rows in (12, 0):
            got = site.run(y, x, entries, decode_rows)
            written = got.view(torch.int16) != y.view(torch.int16)
            assert written[:10, first : first + width].any(dim=0).all()
            written[:10, first : first + width] = False
            assert not written.any()


def check_products(target: Target) -> None:
    _stays_inside(target)
    _lora(target, 1160, (136, 264), torch.bfloat16)
    _splits(target)


def check_expand(target: Target) -> None:
    _leaves_the_rest(target)
    _reads_its_parts(target, torch.bfloat16)
    _stays_inside(target)
    _splits(target)
    _lora(target, 40, (136, 264), torch.float16)
    torch.manual_seed(1)
    dtype, widths, rows = torch.bfloat16, (136, 136), 70
    table = {
        0: _adapter([16, 3], 64, widths, dtype),
        1: _adapter([0, 8], 64, widths, dtype, vectors=True),
    }
    entries: list[Entries] = [((row % 3, 1.0),) if row % 3 < 2 else () for row in range(rows)]
    entries[5], entries[17], entries[40] = ((0, 0.5), (0, -2.0)), ((0, 2.0),) * 3, ((0, 1.0), (0, -0.5))
    y, x = torch.randn(rows, 272).to(dtype), torch.randn(rows, 64).to(dtype)
    site = Site(target, table, widths)
    added = site.run(y, x, entries, 20).double()
    want = F.silu(added[:, :136]) * added[:, 136:]
    got = torch.full((rows, 136), torch.nan, dtype=dtype)
    with Guarded():
        placed = site.ops.place(route(entries, decode_rows=20))
    site.ops.start_lora(x, placed, site.table).gate_into(got, y)
    assert_alike(got, want)


def check_plain(target: Target) -> None:
    _reads_its_parts(target, torch.float32)
    _stays_inside(target, torch.float32)
    _lora(target, 37, (7, 13), torch.float32)
    torch.manual_seed(2)
    table = {slot: replace(lora, a=guarded(lora.a)) for slot, lora in embeddings(torch.float32).items()}
    entries: list[Entries] = [((row % 6, 1.0),) if row % 7 else () for row in range(40)]
    entries[3] = ((0, 0.5), (4, -1.0))
    e, tokens = torch.randn(40, 80), torch.arange(40) * 7 % 30
    tokens[10] = len(table[4].a)
    want = reference_embedding(e, tokens, entries, table)
    ops = target.ops()
    resident = ops.embedding_table()
    resident.update(target.embeddings(table))
    ops.add_embedding(e, tokens, ops.place(route(entries, decode_rows=9)), resident)
    assert error(e, want) < 1e-5


def check_norms(target: Target) -> None:
    torch.manual_seed(3)
    ops = CudaDecoderOps(target.launcher)
    for dtype, width in ((torch.bfloat16, 2056), (torch.float32, 300), (torch.float16, 24)):
        x, weight = torch.randn(3, width).to(dtype), torch.randn(width).to(dtype)
        out, residual = torch.full((3, width), torch.nan, dtype=dtype), torch.randn(3, width).to(dtype)
        total = residual + x
        ops.rms_norm(out, x, weight, 0.3)
        assert_alike(out, F.rms_norm(x.double(), (width,), weight.double(), 0.3))
        ops.add_rms_norm(out, residual, x, weight, 0.3)
        assert torch.equal(residual, total)
        assert_alike(out, F.rms_norm(total.double(), (width,), weight.double(), 0.3))


def check_gate(target: Target) -> None:
    torch.manual_seed(4)
    for dtype, width in ((torch.bfloat16, 264), (torch.float32, 7)):
        gate_up = (3 * torch.randn(40, 2 * width)).to(dtype)
        out = torch.full((40, width), torch.nan, dtype=dtype)
        CudaDecoderOps(target.launcher).silu_mul(out, gate_up)
        assert_alike(out, F.silu(gate_up[:, :width].double()) * gate_up[:, width:].double())


def check_rope(target: Target) -> None:
    torch.manual_seed(5)
    for dtype, (heads, kv_heads, dim) in ((torch.bfloat16, (12, 3, 64)), (torch.float32, (40, 2, 14))):
        rows = 3
        wide = torch.randn(rows, (heads + 2 * kv_heads) * dim + 8).to(dtype)
        qkv = wide[:, : (heads + 2 * kv_heads) * dim]
        angles = torch.rand(rows, dim) * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        keys, values = (torch.zeros(4, 2, kv_heads, dim, dtype=dtype) for _ in range(2))
        slots, q = torch.tensor([7, 1, 4]), torch.full((rows, heads, dim), torch.nan, dtype=dtype)
        CudaDecoderOps(target.launcher).rope_kv(q, keys, values, qkv, (cos, sin), slots)
        parts = qkv.double().split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        turned = []
        for part in parts[:2]:
            x = part.reshape(rows, -1, dim)
            half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
            turned.append(x * cos.double()[:, None] + half * sin.double()[:, None])
        assert_alike(q, turned[0])
        assert_alike(keys.view(-1, kv_heads, dim)[slots], turned[1])
        assert torch.equal(
            values.view(-1, kv_heads, dim)[slots].double(), parts[2].reshape(rows, kv_heads, dim)
        )
        assert not keys.view(-1, kv_heads, dim)[[0, 2, 3, 5, 6]].any()


def _attention(target: Target, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    for heads, kv_heads, dim in shapes:
        cached = Cached([600, 0, 17, 1030, 1, SPLIT], heads, kv_heads, dim, dtype, block_size=48)
        cached.q, cached.keys, cached.values = map(guarded, (cached.q, cached.keys, cached.values))
        for scores in (Scores(0.2, None, None), Scores(0.3, 40, 0.9), Scores(0.2, 530, None)):
            assert_alike(cached.run(target, scores), cached.expected(scores))
    for token in (1, SPLIT + 7, 2 * SPLIT + 1):
        _stands_out(target, shapes[0], dtype, token)


def _stands_out(target: Target, shape: tuple[int, int, int], dtype: torch.dtype, token: int) -> None:
    """One token's score is so high that weights overflow that are not taken from it."""
    heads, kv_heads, dim = shape
    cached = Cached([2 * SPLIT + 6], heads, kv_heads, dim, dtype)
    cached.q = cached.q[:, :1].expand(-1, heads, -1).contiguous()
    key = 40 * cached.q[0, 0]
    block, place = int(cached.tables[0, token // cached.block_size]), token % cached.block_size
    cached.keys[block, place] = cached.rows[0][0][token] = key
    scores = Scores(0.2, None, None)
    assert_alike(cached.run(target, scores), cached.expected(scores))


def check_attention(target: Target) -> None:
    scores = Scores(0.2, None, None)
    for lengths in ([0, 5], [0, 32], [0, 64], [64, 0]):
        few = Cached(lengths, 2, 2, 80, torch.bfloat16, spare=0)
        few.tables, few.q, few.keys, few.values = map(guarded, (few.tables, few.q, few.keys, few.values))
        with Guarded():
            got = few.run(target, scores)
        assert_alike(got, few.expected(scores))
    _attention(target, [(6, 2, 80), (13, 1, 80)], torch.bfloat16)
    _attention(target, [(2, 2, 256)], torch.float16)


def check_plain_attention(target: Target) -> None:
    _attention(target, [(6, 2, 40)], torch.float32)


CHECKS: Mapping[str, Check] = {
    "lora_shrink.cu": check_products,
    "lora_expand.cu": check_expand,
    "lora_strip.cuh": check_expand,
    "lora_tables.cuh": check_expand,
    "gate.cuh": check_expand,
    "pairs.cuh": check_attention,
    "lora_plain.cu": check_plain,
    "rms_norm.cu": check_norms,
    "silu_mul.cu": check_gate,
    "rope_kv.cu": check_rope,
    "paged_attention.cu": check_attention,
    "plain_attention.cu": check_plain_attention,
}
"""By file."""
