"""The contract of a decoder's pieces beside its matrix products: what a backend may bring of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Scores:
    """How attention makes weights of products s = q . k."""

    scale: float
    window: int | None
    """How many newest tokens are seen, the row's own included; None: all."""
    softcap: float | None
    """Scores become softcap * tanh(scale * s / softcap); None: they stay scale * s."""


class DecoderOps(Protocol):
    """Tensors are contiguous, of one dtype and on one device. Outputs come from the caller."""

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """What is served."""
        ...

    def rms_norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """out = weight * x / sqrt(mean(x²) + eps), rounded before the product as LlamaRMSNorm does.

        Args:
            out, x: [rows, width].
            weight: [width].
        """
        ...

    def add_rms_norm(
        self, out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """residual += x, in place; out = its norm. All [rows, width]."""
        ...

    def silu_mul(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """out [rows, width] = silu(gate) * up of gate_up [rows, 2 * width], the gates first."""
        ...

    def rope_kv(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        qkv: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        kv_slots: torch.Tensor,
    ) -> None:
        """Rotate queries and keys; keep keys and values.

        Args:
            q: [rows, heads, dim], written.
            keys, values: one layer of the cache [blocks, block_size, kv_heads, dim], written at kv_slots.
            qkv: [rows, (heads + 2 * kv_heads) * dim], the fused projection.
            rotation: cosines and sines [rows, dim], q's dtype, as transformers' rotary embeddings give them.
            kv_slots: [rows] int64, counted over all blocks.
        """
        ...
