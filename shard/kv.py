"""The paged keys and values of every attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores for each token."""

    kv_heads: int
    key_dim: int
    value_dim: int


class KvCache:
    """Per layer two tensors [blocks, block_size, kv_heads, dim]. Block 0 is the sink that nobody owns."""

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        *,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        for index, shape in layers.items():
            size = (blocks, block_size, shape.kv_heads)
            self._keys[index] = torch.zeros(*size, shape.key_dim, dtype=dtype, device=device)
            self._values[index] = torch.zeros(*size, shape.value_dim, dtype=dtype, device=device)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that store keys and values."""
        return tuple(sorted(self._keys))

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [blocks, block_size, kv_heads, dim] of one layer."""
        return self._keys[index], self._values[index]

    def write(self, layer: int, kv_slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [tokens, kv_heads, dim] at kv_slots [tokens], counted over all blocks."""
        self._keys[layer].flatten(0, 1).index_copy_(0, kv_slots, keys)
        self._values[layer].flatten(0, 1).index_copy_(0, kv_slots, values)

    def read(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of block tables [..., n], as [..., n * block_size, kv_heads, dim] copies."""
        flat = blocks.reshape(-1)
        shape = (*blocks.shape[:-1], blocks.shape[-1] * self.block_size)
        keys = self._keys[layer].index_select(0, flat)
        values = self._values[layer].index_select(0, flat)
        return keys.view(*shape, *keys.shape[2:]), values.view(*shape, *values.shape[2:])

    def copy_block(self, source: int, target: int) -> None:
        """Overwrite block `target` with block `source` in every layer."""
        for store in (self._keys, self._values):
            for tensor in store.values():
                tensor[target].copy_(tensor[source])


def block_bytes(layers: Mapping[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    per_token = sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in layers.values())
    return per_token * block_size * dtype.itemsize
