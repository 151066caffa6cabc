"""`loraplex doctor`: what this machine can serve on, and what would be slow."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from .finding import Finding

MINIMUM = {"torch": (2, 11), "transformers": (5, 17)}
_GIB = 1024**3


def run() -> int:
    """Print the report; answers 1 if something makes serving impossible, else 0."""
    findings = []
    for finding in examine():
        is_bad = finding.fatal or finding.bars_cuda
        print(f"{'FAIL ' if is_bad else ''}{finding.topic}: {finding.text}", flush=True)
        findings.append(finding)
    if any(finding.fatal for finding in findings):
        print("this machine cannot serve yet")
        return 1
    barred = any(finding.bars_cuda for finding in findings)
    print("this machine can serve with --device cpu only" if barred else "this machine can serve")
    return 0


def examine() -> Iterator[Finding]:
    """Everything worth telling, in the order of the report."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from (version_of(package, least) for package, least in MINIMUM.items())
    yield from _compute()
    yield from cpu(Path("/proc/cpuinfo"))
    yield from memory(Path("/proc/meminfo"))


def version_of(package: str, least: tuple[int, int]) -> Finding:
    """Which version of a package is here, and whether it is recent enough."""
    needed = ".".join(map(str, least))
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, f"missing; install {package} {needed} or later", fatal=True)
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if release < least:
        return Finding(package, f"{version}; {needed} or later is needed", fatal=True)
    return Finding(package, version)


def cpu(cpuinfo: Path) -> Iterator[Finding]:
    """Instruction sets that decide how fast a CPU is; silent where the system does not tell."""
    if not cpuinfo.exists():
        return
    flags = _flags(cpuinfo.read_text())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    yield Finding("cpu flags", ", ".join(flag for flag in known if flag in flags) or "none that help")
    if not flags & {"avx512f", "asimd"}:
        yield Finding("slow", "no AVX-512: matrix products take about twice as long")
    if not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        yield Finding("slow", "no bfloat16 instructions: --dtype float32 may be faster here")


def memory(meminfo: Path) -> Iterator[Finding]:
    """How much memory there is; silent where the system does not tell."""
    if not meminfo.exists():
        return
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    total, free = (int(fields[name].split()[0]) * 1024 / _GIB for name in ("MemTotal", "MemAvailable"))
    yield Finding("memory", f"{free:.1f} GiB free of {total:.1f} GiB")


def _flags(text: str) -> set[str]:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def extension() -> Iterator[Finding]:
    """By what operators a CPU serves. torch has been imported before: the extension shares its threads."""
    try:
        from .kernels import _native
    except ImportError as error:
        yield Finding("cpu operators", f"torch's alone; the C++ extension is not here ({error})")
        yield Finding(
            "slow", "adapters on a CPU, without the extension: install a C++ compiler, then loraplex again"
        )
        return
    yield Finding("cpu operators", f"the C++ extension's, with {_native.levels()[0]}")


def _compute() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"cannot be imported: {error}", fatal=True)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("threads", f"{torch.get_num_threads()} for operators, {cores} cores usable")
    yield from extension()
    from . import doctor_cuda

    if torch.cuda.is_available():
        yield from doctor_cuda.gpus()
        return
    yield Finding("device", "cpu (torch sees no CUDA device); --device auto takes it")
    yield Finding("slow", "a CPU suits small models; a model of 7 billion parameters takes seconds per token")
    yield doctor_cuda.sources()
