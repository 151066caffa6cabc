"""What a GPU kernel is to its callers: a name, its constants, and one way to launch it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Argument = int | np.int32 | np.float32
"""A Python int is 8 bytes wide: an address, or a 64-bit count. NumPy scalars are 4 bytes wide."""


class KernelUnusable(Exception):
    """A kernel cannot be compiled or loaded. The message names it, with the compiler's first line."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One specialisation of one kernel."""

    source: str
    """File in this folder, such as "lora_shrink.cu"."""
    name: str
    """Of the `extern "C" __global__` function."""
    defines: tuple[tuple[str, str], ...] = ()
    """Compile-time constants, in the order in which they are given to the compiler."""


class Launcher(Protocol):
    """Runs kernels on one device, in the order of the caller's current stream."""

    @property
    def processors(self) -> int:
        """Multiprocessors of the device: what persistent grids are sized by."""
        ...

    def prepare(self, kernel: Kernel) -> None:
        """Compile and load a kernel ahead of its first launch. Needed before a graph is captured."""
        ...

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, arguments: Sequence[Argument]
    ) -> None:
        """Queue one launch of `block` threads in each of the grid's blocks; nothing, where there are none."""
        ...
