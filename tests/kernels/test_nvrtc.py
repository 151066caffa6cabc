"""Every specialisation of every kernel compiles for every GPU, and takes no more than it was made for."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from loraplex.kernels.catalogue import every_kernel, source_files
from loraplex.kernels.source import read_source

from .nvrtc import CompileError, Usage, compile_source

if sys.platform != "linux":
    pytest.skip("NVRTC is installed on Linux only", allow_module_level=True)


@dataclass(frozen=True, slots=True)
class Processor:
    """What a multiprocessor has, beside 65536 registers."""

    threads: int
    shared: int
    """KiB."""

    def holds(self, usage: Usage, threads: int) -> int:
        """Blocks at once. A warp's registers lie in one of four parts; a block has 1 KiB of memory more."""
        warps = threads // 32
        by_registers = 65536 // 4 // (-(-usage.registers // 8) * 8 * 32) * 4 // warps
        by_shared = self.shared * 1024 // (usage.shared + 1024)
        return min(by_registers, by_shared, self.threads // threads)


PROCESSORS = {
    80: Processor(2048, 164),
    86: Processor(1536, 100),
    89: Processor(1536, 100),
    90: Processor(2048, 228),
    100: Processor(2048, 228),
    120: Processor(1536, 100),
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What a kernel may take, the greediest of its specialisations on any GPU."""

    threads: int
    """A block."""
    registers: int
    """A thread."""
    shared: int
    """Bytes a block."""
    blocks: int
    """That a multiprocessor holds at least."""


LIMITS = {
    "lora_shrink 8": Limit(512, 64, 10 * 1024, 2),
    "lora_shrink 64": Limit(512, 128, 40 * 1024, 1),
    "lora_expand 8": Limit(128, 96, 704, 5),
    "lora_expand 64": Limit(128, 168, 704, 3),
    "lora_gate": Limit(128, 168, 704, 3),
    "lora_shrink_plain": Limit(128, 64, 0, 8),
    "lora_expand_plain": Limit(128, 64, 0, 8),
    "lora_embed": Limit(128, 64, 0, 8),
    "paged_attention": Limit(128, 255, 33 * 1024, 2),
    "attention_combine": Limit(128, 64, 0, 8),
    "plain_attention": Limit(128, 64, 5 * 1024, 8),
    "rms_norm": Limit(256, 96, 32, 2),
    "silu_mul": Limit(256, 40, 0, 4),
    "rope_kv": Limit(256, 80, 0, 3),
}

Module = tuple[str, tuple[tuple[str, str], ...]]
"""A file and its constants: what one compilation makes, for all of its kernels."""
MODULES: dict[Module, list[str]] = {}
for _kernel in every_kernel():
    MODULES.setdefault((_kernel.source, _kernel.defines), []).append(_kernel.name)
SOURCES = sorted({source for source, _ in MODULES})

SPILLING = """
extern "C" __global__ void {name}(float *to) {{
    float value[48];
    #pragma unroll
    for (int i = 0; i < 48; ++i) value[i] = to[i * 32 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 48; ++i) to[i * 32 + threadIdx.x] = value[47 - i];
}}
"""


@pytest.fixture(scope="module")
def room(request: pytest.FixtureRequest) -> Path:
    """Where answers are kept from run to run."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("nvrtc")


@pytest.mark.parametrize("arch", PROCESSORS, ids="sm_{}".format)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_within_its_limits(source: str, arch: int, room: Path) -> None:
    text = read_source(source)

    def usages(module: Module) -> dict[str, Usage]:
        return compile_source(text, arch, [f"-D{name}={value}" for name, value in module[1]], room=room)

    modules = [module for module in MODULES if module[0] == source]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(usages, modules))
    excesses = [
        f"{name} {dict(module[1])}: {usage}"
        for module, found in zip(modules, compiled, strict=True)
        for name in MODULES[module]
        for usage in [found[name]]
        if not _is_within(usage, LIMITS[_limit_of(name, module)], arch)
    ]
    assert not excesses, "\n".join(excesses)


def _limit_of(name: str, module: Module) -> str:
    """Where the limit stands of a kernel, or of its form for tasks of so many rows."""
    own = f"{name} {dict(module[1]).get('ROWS')}"
    return own if own in LIMITS else name


def _is_within(usage: Usage, limit: Limit, arch: int) -> bool:
    return (
        usage.stack == usage.spilled == 0
        and usage.registers <= limit.registers
        and usage.shared <= limit.shared
        and PROCESSORS[arch].holds(usage, limit.threads) >= limit.blocks
    )


def test_every_file_is_in_the_catalogue() -> None:
    assert [name for name in source_files() if name.endswith(".cu")] == SOURCES
    assert {_limit_of(name, module) for module, names in MODULES.items() for name in names} == set(LIMITS)


@pytest.mark.parametrize("arch", PROCESSORS, ids="sm_{}".format)
def test_a_kernel_that_spills_is_told_from_one_that_does_not(arch: int) -> None:
    found = compile_source(SPILLING.format(name="roomy"), arch)["roomy"]
    assert (found.stack, found.spilled, found.shared) == (0, 0, 0)
    assert 48 <= found.registers <= 128
    squeezed = compile_source(SPILLING.format(name="squeezed"), arch, ["--maxrregcount=32"])["squeezed"]
    assert squeezed.registers <= 32
    assert squeezed.stack > 0
    assert squeezed.spilled > 0


def test_static_shared_memory_is_told_of_each_kernel() -> None:
    kernels = "".join(
        f'extern "C" __global__ void k{floats}(float *to) {{ __shared__ float s[{floats}]; '
        "s[threadIdx.x] = *to; __syncthreads(); *to = s[threadIdx.x + 1]; }\n"
        for floats in (64, 256)
    )
    found = compile_source(kernels, 90)
    assert {name: usage.shared for name, usage in found.items()} == {"k64": 256, "k256": 1024}


def test_blocks_are_counted_by_the_scarcest() -> None:
    small, large = PROCESSORS[89], PROCESSORS[90]
    assert large.holds(Usage(32, 0, 0, 0), 128) == 16
    assert small.holds(Usage(32, 0, 0, 0), 128) == 12
    assert large.holds(Usage(129, 0, 0, 0), 128) == 3
    assert small.holds(Usage(32, 40 * 1024, 0, 0), 128) == 2


def test_a_mistake_is_told_with_its_file_and_line() -> None:
    with pytest.raises(CompileError, match=r"wrong\.cuh\(7\): error"):
        compile_source('#line 7 "wrong.cuh"\nint x = y;\n', 90)
