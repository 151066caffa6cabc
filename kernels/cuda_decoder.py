"""The pieces of a decoder beside its matrix products, as kernels: norms, gates, positions, decode attention.

Tensors are contiguous and on one device. Outputs and room to work in come from the caller.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from .decoder_ops import Scores
from .launch import Kernel, Launcher

ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "float"}
HALVES = (torch.bfloat16, torch.float16)

THREADS = 256
ATTENTION_THREADS = 128
SPLIT = 512
"""Tokens of one part of a row's attention: fixed, so that a row's sums do not depend on its company."""
FAST_DIMS = (64, 80, 96, 128, 256)
"""Head sizes that tensor cores are used for."""
ATTENTION_BLOCKS = 2
"""That a processor holds at once."""
BLOCK_TOKENS = 16
"""Of which a KV block holds a multiple, where they are."""
HEAD_ROWS = (8, 16)
"""Query heads of one KV head, at most."""
PLAIN_DIM = 256
"""The largest head size that is served at all."""
_NORM_VECTORS = (1, 2, 4, 8)
"""Vectors of a norm's row that a thread keeps in registers."""
_UNSEEN = 2**31 - 1


def head_rows(dim: int, group: int) -> int:
    """Query heads that an attention kernel is made for; the larger form also where the smaller has too few
    registers."""
    return HEAD_ROWS[0] if group <= HEAD_ROWS[0] and dim <= 128 else HEAD_ROWS[1]


@cache
def _norm(dtype: torch.dtype, vectors: int) -> Kernel:
    return Kernel("rms_norm.cu", "rms_norm", (("ELEMENT", ELEMENTS[dtype]), ("VECTORS", str(vectors))))


@cache
def _vectored(source: str, dtype: torch.dtype, vector: int) -> Kernel:
    name = source.removesuffix(".cu")
    return Kernel(source, name, (("ELEMENT", ELEMENTS[dtype]), ("VECTOR", str(vector))))


@cache
def _attention(name: str, dtype: torch.dtype, dim: int, heads: int) -> Kernel:
    sizes = {"DIM": dim, "HEADS": heads, "SPLIT": SPLIT}
    defines = (("ELEMENT", ELEMENTS[dtype]), *((key, str(value)) for key, value in sizes.items()))
    return Kernel("paged_attention.cu", name, defines)


@cache
def _plain_attention(dtype: torch.dtype, dim: int) -> Kernel:
    return Kernel("plain_attention.cu", "plain_attention", (("ELEMENT", ELEMENTS[dtype]), ("DIM", str(dim))))


KERNELS: tuple[Kernel, ...] = (
    *(_norm(dtype, vectors) for dtype in HALVES for vectors in _NORM_VECTORS),
    *(_norm(dtype, 0) for dtype in ELEMENTS),
    *(
        _vectored(source, dtype, vector)
        for source in ("silu_mul.cu", "rope_kv.cu")
        for dtype in ELEMENTS
        for vector in ((8, 1) if dtype in HALVES else (1,))
    ),
    *(
        _attention(name, dtype, dim, heads)
        for name in ("paged_attention", "attention_combine")
        for dtype in HALVES
        for dim in FAST_DIMS
        for heads in sorted({head_rows(dim, group) for group in HEAD_ROWS})
    ),
    *(_plain_attention(dtype, dim) for dtype in ELEMENTS for dim in (24, 64, 128, 256)),
)
"""Every specialisation that can be launched, for plain attention a choice of head sizes."""


class CudaDecoderOps:
    """`DecoderOps` by kernels of our own, and decode attention."""

    dtypes = frozenset(ELEMENTS)

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def rms_norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        self._norm(out, None, x, weight, eps)

    def add_rms_norm(
        self, out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        self._norm(out, residual, x, weight, eps)

    def _norm(
        self,
        out: torch.Tensor,
        residual: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        rows, width = x.shape
        arguments = (
            out.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            np.int32(width),
            np.float32(eps),
        )
        self._launcher.launch(_norm(x.dtype, norm_vectors(x.dtype, width)), (rows, 1, 1), THREADS, arguments)

    def silu_mul(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        rows, width = out.shape
        vector = 8 if out.dtype in HALVES and width % 8 == 0 else 1
        blocks = -(-rows * (width // vector) // THREADS)
        grid = (max(1, min(blocks, 8 * self._launcher.processors)), 1, 1)
        arguments = (out.data_ptr(), gate_up.data_ptr(), np.int32(rows), np.int32(width))
        self._launcher.launch(_vectored("silu_mul.cu", out.dtype, vector), grid, THREADS, arguments)

    def rope_kv(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        qkv: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        kv_slots: torch.Tensor,
    ) -> None:
        rows, heads, dim = q.shape
        cos, sin = rotation
        vector = 8 if q.dtype in HALVES and dim % 16 == 0 else 1
        arguments = (
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            qkv.data_ptr(),
            qkv.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            kv_slots.data_ptr(),
            np.int32(heads),
            np.int32(keys.shape[2]),
            np.int32(dim),
        )
        self._launcher.launch(_vectored("rope_kv.cu", q.dtype, vector), (rows, 1, 1), THREADS, arguments)

    def decode_attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        tables: torch.Tensor,
        lengths: torch.Tensor,
        room: torch.Tensor,
        scores: Scores,
    ) -> None:
        """Attention of one new token a row over its paged keys and values.

        Args:
            out, q: [rows, heads, dim].
            cache: one layer's keys and values [blocks, block_size, kv_heads, dim].
            tables: [rows, width] int32: each row's blocks; rows may lie apart.
            lengths: [rows] int64: tokens in the cache, this one included; 0 for padding: zeros come out.
            room: fp32, at least `attention_room` values.
            scores: how products become weights.
        """
        keys, values = cache
        rows, heads, dim = q.shape
        block_size, kv_heads = keys.shape[1], keys.shape[2]
        group = heads // kv_heads
        window = np.int32(_UNSEEN if scores.window is None else scores.window)
        numbers = (np.float32(scores.scale), np.float32(scores.softcap or 0.0), window)
        places = (tables.data_ptr(), tables.stride(0), lengths.data_ptr())
        heads_of_each = (np.int32(kv_heads), np.int32(group), np.int32(block_size))
        addresses = (q.data_ptr(), keys.data_ptr(), values.data_ptr())
        if not is_fast(q.dtype, dim, group, block_size):
            self._launcher.launch(
                _plain_attention(q.dtype, dim),
                (heads, rows, 1),
                ATTENTION_THREADS,
                (out.data_ptr(), *addresses, *places, *heads_of_each, *numbers),
            )
            return
        splits = splits_of(tables.shape[1], block_size)
        rows_of_heads = head_rows(dim, group)
        self._launcher.launch(
            _attention("paged_attention", q.dtype, dim, rows_of_heads),
            attention_grid(rows * kv_heads * pieces_of(dim), splits, self._launcher.processors),
            ATTENTION_THREADS,
            (
                *(out.data_ptr(), room.data_ptr(), *addresses, *places),
                *(np.int32(rows), *heads_of_each, np.int32(splits), *numbers),
            ),
        )
        if splits > 1:
            parts = (out.data_ptr(), room.data_ptr(), lengths.data_ptr())
            self._launcher.launch(
                _attention("attention_combine", q.dtype, dim, rows_of_heads),
                (rows * heads, 1, 1),
                ATTENTION_THREADS,
                (*parts, np.int32(heads), np.int32(splits), window),
            )


def norm_vectors(dtype: torch.dtype, width: int) -> int:
    """Vectors of a row that each thread of a norm keeps; 0 where rows are not kept in registers."""
    if dtype not in HALVES or width % 8:
        return 0
    needed = -(-width // (8 * THREADS))
    return next((vectors for vectors in _NORM_VECTORS if vectors >= needed), 0)


def is_fast(dtype: torch.dtype, dim: int, group: int, block_size: int) -> bool:
    """Whether decode attention of such heads goes over tensor cores."""
    is_paged = block_size % BLOCK_TOKENS == 0
    return dtype in HALVES and dim in FAST_DIMS and group <= HEAD_ROWS[-1] and is_paged


def pieces_of(dim: int) -> int:
    """Blocks that share the columns of one head's output."""
    return 4 if dim > 128 else 1


def splits_of(table_width: int, block_size: int) -> int:
    """Parts that the attention of a row can have at most."""
    return -(-table_width * block_size // SPLIT)


def attention_grid(pieces: int, splits: int, processors: int) -> tuple[int, int, int]:
    """Of so many pieces, each of rows with at most so many splits: as many blocks for each piece as there is
    room for on the device."""
    return pieces * max(1, min(splits, round(ATTENTION_BLOCKS * processors / max(1, pieces)))), 1, 1


def attention_room(rows: int, heads: int, dim: int, splits: int) -> int:
    """fp32 values in which `decode_attention` keeps what it has of rows with several parts."""
    return rows * heads * splits * (dim + 2) if splits > 1 else 1
