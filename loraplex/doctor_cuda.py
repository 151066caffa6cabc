"""What `loraplex doctor` finds of GPUs and of the kernels for them."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .finding import Finding
from .kernels.catalogue import every_kernel, source_files
from .kernels.cuda_decoder import BLOCK_TOKENS, FAST_DIMS
from .kernels.load import MINIMUM_CAPABILITY
from .kernels.source import read_source

_GIB = 1024**3


def sources() -> Finding:
    """Whether the kernels' files are all there. They are compiled where there is a GPU."""
    try:
        for name in {kernel.source for kernel in every_kernel()}:
            read_source(name)
    except FileNotFoundError as error:
        return Finding("kernels", f"{error}; install loraplex again", bars_cuda=True)
    return Finding("kernels", f"all {len(source_files())} source files for GPUs are here")


def gpus() -> Iterator[Finding]:
    """Everything worth telling of a machine whose torch sees a CUDA device, in the order of the report."""
    is_barred = False
    for finding in chain(_devices(), driver(Path("/proc/driver/nvidia/version")), _torch(), _cupy()):
        is_barred |= finding.bars_cuda
        yield finding
    if is_barred:
        yield sources()
    else:
        yield from _kernels()
    sizes = ", ".join(map(str, FAST_DIMS))
    yield Finding(
        "slow",
        f"attention of new tokens in float32, or with heads of other sizes than {sizes}, "
        f"or KV blocks that hold no multiple of {BLOCK_TOKENS} tokens",
    )


def driver(version: Path) -> Iterator[Finding]:
    """The driver's version; silent where the system does not tell."""
    if not version.exists():
        return
    found = re.search(r"\d+\.\d+(\.\d+)?", version.read_text())
    if found:
        yield Finding("driver", found[0])


def _devices() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        name = f"cuda:{index}, {properties.name} (compute capability {properties.major}.{properties.minor}"
        if capability < MINIMUM_CAPABILITY:
            needed = ".".join(map(str, MINIMUM_CAPABILITY))
            yield Finding("device", f"{name}); {needed} or later is needed", bars_cuda=index == 0)
            continue
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB"
        yield Finding("device", f"{name}, {properties.multi_processor_count} multiprocessors), {memory}")


def _torch() -> Iterator[Finding]:
    yield Finding("cuda", f"torch is built for {torch.version.cuda}")
    if not torch.backends.cuda.is_flash_attention_available():
        yield Finding("cuda", "this torch has no FlashAttention; install its default build", bars_cuda=True)


def _cupy() -> Iterator[Finding]:
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError as error:
        reason = f"not usable ({_first_line(error)}); install it: pip install 'loraplex[cuda]'"
        yield Finding("cupy", reason, bars_cuda=True)
        return
    packages = sorted(set(importlib.metadata.packages_distributions().get("cupy", ())))
    runtime = _cuda_version(cupy.cuda.runtime.runtimeGetVersion())
    newest = _cuda_version(cupy.cuda.runtime.driverGetVersion())
    try:
        compiler = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    except (ImportError, RuntimeError) as error:
        yield Finding("cupy", f"{cupy.__version__} finds no NVRTC: {_first_line(error)}", bars_cuda=True)
        return
    yield Finding(
        "cupy",
        f"{cupy.__version__} ({', '.join(packages) or 'package unknown'}), CUDA {runtime}, NVRTC {compiler}, "
        f"driver for CUDA {newest}",
    )
    if len(packages) > 1:
        yield Finding(
            "cupy", f"{' and '.join(packages)} overwrite each other: keep the one that fits the driver"
        )


def _kernels() -> Iterator[Finding]:
    """Compile all there are, which CuPy keeps on disk: later starts find them there."""
    from .kernels.cupy_launcher import CupyLauncher, KernelUnusable

    launcher = CupyLauncher(torch.device("cuda"))
    unusable = defaultdict[str, list[str]](list)
    for kernel in every_kernel():
        try:
            launcher.prepare(kernel)
        except KernelUnusable as error:
            unusable[kernel.source].append(str(error))
    seconds = defaultdict[str, list[float]](list)
    for kernel, took in launcher.compiled:
        seconds[kernel.source].append(took)
    for source, each in seconds.items():
        yield Finding("kernels", f"{source}: {len(each)} compiled in {sum(each):.1f} s")
    for source, errors in unusable.items():
        yield Finding("kernels", f"{source}: {len(errors)} unusable, the first: {errors[0]}", bars_cuda=True)


def _cuda_version(number: int) -> str:
    """As in 13000 for 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _first_line(error: Exception) -> str:
    """The first line that says something: CuPy frames its messages with rules."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line.strip("=-")), type(error).__name__)
