"""A packed adapter in memory: one buffer, and the tensors that the kernels read as views into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...kernels.ops import LoraPart, LoraWeights
from ..errors import AdapterFetchFailed
from .packed import PackedArray, PackedIndex


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter's weights, in host or device memory."""

    index: PackedIndex
    buffer: torch.Tensor
    """uint8 [index.nbytes]."""

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    @property
    def modules(self) -> int:
        """Base linears that the adapter changes."""
        return sum(len(site.parts) for site in self.index.sites)

    def to(self, device: torch.device) -> PackedAdapter:
        """This adapter on `device`: itself where it already is there, else a copy."""
        return replace(self, buffer=self.buffer.to(device))

    def site_weights(self) -> dict[int, LoraWeights]:
        """Site to weights, as views into the buffer."""
        return {
            site.site: LoraWeights(
                a=self._view(site.a),
                parts=tuple(
                    LoraPart(part.rank_offset, part.out_offset, self._view(part.b)) for part in site.parts
                ),
            )
            for site in self.index.sites
        }

    def _view(self, array: PackedArray) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, self.index.dtype)
        rows, columns = array.shape
        end = array.offset + rows * columns * dtype.itemsize
        return self.buffer[array.offset : end].view(dtype).view(rows, columns)


def read_packed(path: Path, index: PackedIndex, *, pin: bool) -> PackedAdapter:
    """Read a packed file into one new buffer, pinned for copies to a GPU if `pin`."""
    buffer = torch.empty(index.nbytes, dtype=torch.uint8, pin_memory=pin)
    with path.open("rb", buffering=0) as file:
        target = buffer.numpy().data
        done = 0
        while done < index.nbytes:
            count = file.readinto(target[done:])
            if not count:
                raise AdapterFetchFailed(
                    f"a packed adapter ended after {done} of {index.nbytes} bytes; try again"
                )
            done += count
    return PackedAdapter(index, buffer)
