"""A decoder's pieces on a CPU by the C++ extension."""

from __future__ import annotations

import torch

from . import _native
from .decoder_ops import Scores
from .native_lora import ELEMENTS

UNSEEN = 2**62
"""A window that hides nothing."""


class NativeDecoderOps:
    """`DecoderOps`, and attention, on the threads that torch uses."""

    dtypes = frozenset(ELEMENTS)

    def rms_norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        _norm(out, x, 0, weight, eps)

    def add_rms_norm(
        self, out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        _norm(out, residual, x.data_ptr(), weight, eps)

    def silu_mul(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        rows, width = out.shape
        _native.gate(ELEMENTS[out.dtype], out.data_ptr(), gate_up.data_ptr(), rows, width)

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
        _native.rope(
            ELEMENTS[q.dtype],
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            qkv.data_ptr(),
            qkv.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            kv_slots.data_ptr(),
            rows,
            heads,
            keys.shape[2],
            dim,
        )

    def paged_attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        tables: torch.Tensor,
        lengths: torch.Tensor,
        scores: Scores,
    ) -> None:
        """Attention of tokens over the paged keys and values of their rows.

        Args:
            out, q: [tokens, heads, dim].
            cache: one layer's keys and values [blocks, block_size, kv_heads, dim].
            tables: [tokens, width] int32: the blocks of each token's row; lines may lie apart.
            lengths: [tokens] int64: how many tokens of its row each one sees, itself included; at least 1.
            scores: how products become weights.
        """
        keys, values = cache
        tokens, heads, dim = q.shape
        _native.attention(
            ELEMENTS[q.dtype],
            out.data_ptr(),
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            tables.data_ptr(),
            tables.stride(0),
            lengths.data_ptr(),
            tokens,
            heads,
            keys.shape[2],
            dim,
            keys.shape[1],
            scores.scale,
            scores.softcap or 0.0,
            UNSEEN if scores.window is None else scores.window,
        )


def _norm(out: torch.Tensor, x: torch.Tensor, added: int, weight: torch.Tensor, eps: float) -> None:
    rows, width = x.shape
    _native.norm(ELEMENTS[x.dtype], out.data_ptr(), x.data_ptr(), added, weight.data_ptr(), rows, width, eps)
