"""A second stream, for work that runs beside the base's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CudaSideStream:
    """`SideStream` of one device. Within a captured graph a branch of it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def fork(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)


class InOrder:
    """`SideStream` of a device that does one thing after another."""

    @contextmanager
    def fork(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        pass
