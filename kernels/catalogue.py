"""All kernels there are: what is compiled ahead, and what is proved."""

from __future__ import annotations

from importlib import resources

from . import cuda, cuda_decoder
from .launch import Kernel


def every_kernel() -> tuple[Kernel, ...]:
    """Every specialisation that can be launched, each once."""
    return tuple(dict.fromkeys((*cuda.KERNELS, *cuda_decoder.KERNELS)))


def source_files() -> list[str]:
    """Names of the files that kernels are made of, in order."""
    names = (path.name for path in resources.files(__package__).iterdir())
    return sorted(name for name in names if name.endswith((".cu", ".cuh")))
