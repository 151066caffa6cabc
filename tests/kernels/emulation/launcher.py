"""`Launcher` on the CPU: kernels built by g++, their threads run as fibres."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from loraplex.kernels.launch import Argument, Kernel
from loraplex.kernels.source import read_source

HERE = Path(__file__).parent
PLAIN = ("-O1",)
SANITIZED = (
    *("-O1", "-g1", "-fsanitize=address,alignment", "-fno-sanitize-recover=all"),
    "-fsanitize-sections=shared_memory",
)

_ALWAYS = ("-std=c++20", "-fPIC", "-w", "-fvisibility=hidden", "-fno-gnu-unique")
"""Hidden symbols: libraries of several specialisations must not share what has one name in all of them."""

_TRAMPOLINE = """
#line 1 "trampoline"
template <typename... Parameters> struct Call;
template <typename... Parameters> struct Call<void (*)(Parameters...)> {
    static const char *check(int count, const int *sizes) {
        const int wanted[] = {(int)sizeof(Parameters)...};
        if (count != (int)sizeof...(Parameters)) return "another number of arguments";
        for (int i = 0; i < count; ++i) if (sizes[i] != wanted[i]) return "an argument of another size";
        return nullptr;
    }
    template <size_t... I>
    static void invoke(void (*f)(Parameters...), const uint64_t *cells, std::index_sequence<I...>) {
        f(read<Parameters>(cells[I])...);
    }
    template <typename P> static P read(const uint64_t &cell) {
        P p;
        std::memcpy(&p, &cell, sizeof(P));
        return p;
    }
};
static const uint64_t *cells_;
static void enter_(void *) {
    using F = decltype(&%(name)s);
    auto call = []<typename... P>(void (*f)(P...)) {
        Call<void (*)(P...)>::invoke(f, cells_, std::index_sequence_for<P...>{});
    };
    call(&%(name)s);
}
extern "C" __attribute__((visibility("default"))) const char *emulation_launch(
    unsigned x, unsigned y, unsigned z, unsigned threads, int count, const int *sizes,
    const uint64_t *cells) {
    static std::string text;
    if (const char *wrong = Call<decltype(&%(name)s)>::check(count, sizes)) {
        return wrong;
    }
    cells_ = cells;
    emulation::run_grid({x, y, z}, threads, enter_, nullptr);
    text = emulation::failure;
    return text.empty() ? nullptr : text.c_str();
}
"""


class EmulationFailed(Exception):
    """A kernel does not compile, or broke a rule of CUDA's while it ran. The message says which."""


def missing() -> str | None:
    """Why kernels cannot be run here; None where they can."""
    if platform.machine() != "x86_64":
        return "the emulation switches fibres in x86-64 assembly"
    return None if shutil.which("g++") else "needs g++"


class EmulatedLauncher:
    """Runs kernels on CPU tensors. `processors` is small, so that persistent grids loop."""

    def __init__(
        self, *, flags: Sequence[str] = PLAIN, replacements: Mapping[str, Path] | None = None
    ) -> None:
        """`replacements`: other files for some of the kernels' own."""
        self._flags = tuple(flags)
        self._replacements = {"ptx.cuh": HERE / "ptx.cuh", **(replacements or {})}
        self._functions: dict[Kernel, ctypes._CFuncPtr] = {}  # type: ignore[name-defined]

    @property
    def processors(self) -> int:
        return 2

    def prepare(self, kernel: Kernel) -> None:
        self._function(kernel)

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, arguments: Sequence[Argument]
    ) -> None:
        """Run to the end. Raises EmulationFailed."""
        if 0 in grid:
            return
        cells = (ctypes.c_uint64 * len(arguments))()
        sizes = (ctypes.c_int * len(arguments))()
        for index, argument in enumerate(arguments):
            sizes[index] = 8 if isinstance(argument, int) else 4
            cells[index] = argument if isinstance(argument, int) else _bits(argument)
        wrong = self._function(kernel)(*grid, block, len(arguments), sizes, cells)
        if wrong is not None:
            raise EmulationFailed(f"{kernel.name} of {kernel.source}: {wrong.decode()}")

    def _function(self, kernel: Kernel) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
        if kernel not in self._functions:
            library = ctypes.CDLL(str(build(kernel, self._flags, self._replacements)))
            function = library.emulation_launch
            function.restype = ctypes.c_char_p
            self._functions[kernel] = function
        return self._functions[kernel]


def _bits(value: np.int32 | np.float32) -> int:
    return int(np.array(value).view(np.uint32))


def build(kernel: Kernel, flags: Sequence[str], replacements: Mapping[str, Path]) -> Path:
    """The shared object of one kernel, kept by everything that it is made of."""
    text = f"{read_source(kernel.source, replacements)}\n{_TRAMPOLINE % {'name': kernel.name}}"
    text = re.sub(r"#pragma unroll.*", "", text)
    header = _header(flags)
    defines = [f"-D{name}={value}" for name, value in kernel.defines]
    options = [*flags, *_ALWAYS, "-shared", *defines, "-include", str(header)]
    target = _folder() / f"{_digest([*options, text])}.so"
    if not target.exists():
        _compile(f"{kernel.name} of {kernel.source}", text, options, target)
    return target


def _header(flags: Sequence[str]) -> Path:
    """What stands before every kernel. Beside it, where g++ looks by itself, its compiled form."""
    text, options = (HERE / "cuda_on_cpu.h").read_text(), [*flags, *_ALWAYS, "-x", "c++-header"]
    header = _folder() / f"{_digest([*options, text])}.h"
    compiled = header.with_name(f"{header.name}.gch")
    if not compiled.exists():
        partial = header.with_name(f"{header.name}.{os.getpid()}")
        partial.write_text(text)
        partial.replace(header)
        _compile("the emulation", text, options, compiled)
    return header


def _compile(what: str, text: str, options: Sequence[str], target: Path) -> None:
    """Several processes may build the same at once: what they leave is whole."""
    source, partial = (target.with_name(f"{target.name}.{os.getpid()}.{end}") for end in ("cpp", "out"))
    source.write_text(text)
    built = subprocess.run(
        ["g++", *options, str(source), "-o", str(partial)], capture_output=True, text=True, check=False
    )
    source.unlink()
    if built.returncode:
        raise EmulationFailed(f"{what} does not compile:\n{built.stderr[:2000]}")
    partial.replace(target)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"loraplex-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]
