"""Where the CUDA backend's tests run: its kernels on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from loraplex.kernels.cuda import CudaLoraOps, SideStream
from loraplex.kernels.launch import Launcher
from loraplex.kernels.ops import EmbeddingLora, LoraWeights


@dataclass(frozen=True)
class Target:
    launcher: Launcher
    device: torch.device
    side: SideStream

    def ops(self) -> CudaLoraOps:
        return CudaLoraOps(self.launcher, self.device, self.side)

    def adapters(self, table: Mapping[int, LoraWeights]) -> dict[int, LoraWeights]:
        """These adapters on the device."""
        return {slot: self._weights(weights) for slot, weights in table.items()}

    def embeddings(self, table: Mapping[int, EmbeddingLora]) -> dict[int, EmbeddingLora]:
        return {
            slot: EmbeddingLora(each.a.to(self.device), each.b.to(self.device), self._vector(each.scale))
            for slot, each in table.items()
        }

    def _weights(self, weights: LoraWeights) -> LoraWeights:
        parts = (
            replace(
                part,
                b=part.b.to(self.device),
                scale=self._vector(part.scale),
                shift=self._vector(part.shift),
            )
            for part in weights.parts
        )
        return LoraWeights(weights.a.to(self.device), tuple(parts))

    def _vector(self, values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.to(self.device)
