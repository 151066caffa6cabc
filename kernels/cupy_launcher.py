"""Kernels through CuPy: compiled at run time for the device at hand, kept on disk, put on torch's stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import torch

from .launch import Argument, Kernel, KernelUnusable
from .source import read_source

__all__ = ["CupyLauncher", "KernelUnusable"]


@dataclass(frozen=True, slots=True)
class _TorchStream:
    """What CuPy takes for a stream of somebody else's, by the CUDA stream protocol."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class CupyLauncher:
    """`Launcher` of one CUDA device. Compiles each specialisation once.

    Launches come from threads whose current device is this one. They can be captured once their kernel is
    prepared.
    """

    def __init__(self, device: torch.device) -> None:
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        self._processors: int = torch.cuda.get_device_properties(self._index).multi_processor_count
        self._modules: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._functions: dict[Kernel, Any] = {}
        self._streams: dict[int, Any] = {}
        self.compiled: list[tuple[Kernel, float]] = []
        """What is ready, and the seconds that each took; little where CuPy had it on disk."""

    @property
    def processors(self) -> int:
        return self._processors

    def prepare(self, kernel: Kernel) -> None:
        """See `Launcher.prepare`. Raises KernelUnusable."""
        if kernel in self._functions:
            return
        began = time.perf_counter()
        key = (kernel.source, kernel.defines)
        try:
            with cupy.cuda.Device(self._index):
                if key not in self._modules:
                    options = ("--std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines))
                    self._modules[key] = cupy.RawModule(code=read_source(kernel.source), options=options)
                # The function itself: a RawKernel asks for the current device at every launch.
                self._functions[kernel] = self._modules[key].get_function(kernel.name).kernel
        except (cupy.cuda.compiler.CompileException, RuntimeError) as error:  # the driver's are RuntimeErrors
            lines = (line.strip() for line in str(error).splitlines())
            first = next((line for line in lines if line), type(error).__name__)
            raise KernelUnusable(f"{kernel.name} of {kernel.source}: {first}") from error
        self.compiled.append((kernel, time.perf_counter() - began))

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, arguments: Sequence[Argument]
    ) -> None:
        if 0 in grid:  # of which CuPy would make a 1
            return
        function = self._functions.get(kernel)
        if function is None:
            self.prepare(kernel)
            function = self._functions[kernel]
        pointer = torch.cuda.current_stream(self._index).cuda_stream
        stream = self._streams.get(pointer)
        if stream is None:
            stream = self._streams[pointer] = self._wrap(pointer)
        function(grid, (block, 1, 1), arguments, stream=stream)

    def _wrap(self, pointer: int) -> Any:
        """CuPy's object for a stream of torch's: its own way since 14, which deprecates the other."""
        if hasattr(cupy.cuda.Stream, "from_external"):
            return cupy.cuda.Stream.from_external(_TorchStream(pointer))
        return cupy.cuda.ExternalStream(pointer, self._index)
