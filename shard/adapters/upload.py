"""An adapter's way to the device, beside the steps that run meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import AdapterMemoryFull
from .weights import PackedAdapter, SiteWeights


@dataclass(frozen=True, slots=True)
class PlacedAdapter:
    """An adapter on the device, and what the sites take of it."""

    packed: PackedAdapter
    weights: Mapping[int, SiteWeights]
    """By site: views into `packed`."""

    @classmethod
    def of(cls, packed: PackedAdapter) -> PlacedAdapter:
        return cls(packed, packed.site_weights())


class Uploader(Protocol):
    """Brings adapters to one device. Called from any thread, one at a time or several at once."""

    def upload(self, adapter: PackedAdapter) -> PlacedAdapter:
        """The adapter on the device, whole when this returns. Raises AdapterMemoryFull where that is full."""
        ...

    def hand_over(self, adapter: PlacedAdapter) -> None:
        """From now on the device thread's work reads it. Called on that thread."""
        ...


class SharedUploader:
    """`Uploader` of a CPU: the device's memory is the host's."""

    def upload(self, adapter: PackedAdapter) -> PlacedAdapter:
        return PlacedAdapter.of(adapter)

    def hand_over(self, adapter: PlacedAdapter) -> None:
        pass


class CudaUploader:
    """`Uploader` of a GPU, on a stream of its own: from pinned memory it holds up no step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, adapter: PackedAdapter) -> PlacedAdapter:
        with torch.cuda.stream(self._stream):
            try:
                packed = adapter.to(self._device)
            except torch.OutOfMemoryError as error:
                raise AdapterMemoryFull(
                    f"the device has no {adapter.nbytes} bytes left for an adapter; "
                    "lower --kv-memory or --adapter-memory"
                ) from error
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        placed = PlacedAdapter.of(packed)  # while the bytes are on their way
        done.synchronize()
        return placed

    def hand_over(self, adapter: PlacedAdapter) -> None:
        """Its memory, taken on our stream, is not given to others before that thread's work has ended."""
        adapter.packed.buffer.record_stream(torch.cuda.current_stream(self._device))


def uploader_for(device: torch.device) -> Uploader:
    """The way to a device."""
    return CudaUploader(device) if device.type == "cuda" else SharedUploader()
