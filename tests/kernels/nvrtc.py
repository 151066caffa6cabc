"""NVIDIA's run-time compiler from the package index, and what it tells of each kernel. Needs no GPU."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = "nvidia-cuda-nvrtc-cu12"

_FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


class CompileError(Exception):
    """The compiler's log."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes."""

    registers: int
    """A thread."""
    shared: int
    """Bytes a block, static."""
    stack: int
    """Bytes of local memory a thread."""
    spilled: int
    """Bytes written to and read from local memory for want of registers."""


def compile_source(
    text: str, arch: int, options: Sequence[str] = (), *, room: Path | None = None
) -> dict[str, Usage]:
    """Compile for sm_<arch>. What each kernel of the text takes, by name. Raises CompileError.

    `room`: a folder in which answers are kept.
    """
    options = ("--std=c++17", f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v", *options)
    key = hashlib.sha256("\0".join((metadata.version(PACKAGE), *options, text)).encode()).hexdigest()
    kept = room / key if room else None
    if kept and kept.exists():
        log = kept.read_text()
    else:
        log = _compile(text, options)
        if kept:
            unfinished = kept.with_suffix(".unfinished")
            unfinished.write_text(log)
            unfinished.replace(kept)
    found = {match["name"]: _usage(match) for match in _FUNCTION.finditer(log)}
    assert len(found) == log.count("Compiling entry function"), log
    return found


def _usage(match: re.Match[str]) -> Usage:
    return Usage(
        registers=int(match["registers"]),
        shared=int(match["shared"] or 0),
        stack=int(match["stack"]),
        spilled=int(match["stores"]) + int(match["loads"]),
    )


@cache
def _library() -> ctypes.CDLL:
    """NVRTC, which finds its built-in functions because they are loaded before."""
    files = [Path(str(file.locate())) for file in metadata.files(PACKAGE) or ()]
    [builtins] = [file for file in files if file.name.startswith("libnvrtc-builtins.so.")]
    [library] = [file for file in files if file.name.startswith("libnvrtc.so.")]
    ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(library))


def _compile(text: str, options: Sequence[str]) -> str:
    """The log of a compilation that succeeds."""
    library, program = _library(), ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None))
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), flags)
        size = ctypes.c_size_t()
        _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetProgramLog(program, log))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise CompileError(log.value.decode())
    return log.value.decode()


def _check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC answers {status}")
