"""`loraplex doctor`: what this machine can serve on, and what would be slow."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM = {"torch": (2, 11), "transformers": (5, 17)}
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `fatal`: serving is impossible until it is mended."""

    topic: str
    text: str
    fatal: bool = False


def run() -> int:
    """Print the report; answers 1 if something makes serving impossible, else 0."""
    findings = list(examine())
    for finding in findings:
        print(f"{'FAIL ' if finding.fatal else ''}{finding.topic}: {finding.text}")
    fatal = any(finding.fatal for finding in findings)
    print("this machine cannot serve yet" if fatal else "this machine can serve")
    return 1 if fatal else 0


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


def _compute() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"cannot be imported: {error}", fatal=True)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("threads", f"{torch.get_num_threads()} for operators, {cores} cores usable")
    if not torch.cuda.is_available():
        yield Finding("device", "cpu (torch sees no CUDA device); --device auto takes it")
        yield Finding(
            "slow", "a CPU suits small models; a model of 7 billion parameters takes seconds per token"
        )
        return
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    yield Finding("device", f"{torch.cuda.get_device_name()} (compute capability {capability})")
    yield _cupy()


def _cupy() -> Finding:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return Finding("cupy", f"not usable ({error}); install the extra: pip install 'loraplex[cuda]'")
    return Finding("cupy", f"{cupy.__version__}")
