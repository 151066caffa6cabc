"""A program that turns one pickled state dict into safetensors, with as few rights as it can do with.

    python -I unpickle.py SIZE <adapter_model.bin >adapter_model.safetensors

Run by its path and importing nothing of ours. It reads standard input, SIZE bytes long, and writes standard
output; before it looks at the input it gives up the rights to open files and sockets, to start processes, and
to more time, memory and disk than the task takes. Exit code 1: refused, with the reason as the last line of
standard error.
"""

from __future__ import annotations

import io
import os
import re
import resource
import sys
import warnings
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors.torch import save

_MIB = 1024 * 1024
_SPARE_MEMORY = 512 * _MIB
_CPU_SECONDS = 60
_ASKED_FOR = re.compile(r"(?:GLOBAL|instantiate class) ([\w.]+)")


class Refused(Exception):
    """The input is not a dictionary of plain tensors."""


def main() -> NoReturn:
    """Convert standard input to standard output and end the process."""
    size = int(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _rehearse()
    give_up_rights(size)
    try:
        data = convert(sys.stdin.buffer)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except Exception as error:  # noqa: BLE001 - the edge of this process: every failure is an answer
        print(_reason(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def convert(file: BinaryIO) -> bytes:
    """A state dict, unpickled as weights only, as a safetensors file. Raises Refused for anything else."""
    state: Any = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and state.keys() == {"state_dict"}:
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise Refused("it holds no dictionary of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise Refused(f"{str(key)[:200]} is no tensor with a name")
        if value.layout is not torch.strided or value.is_quantized:
            raise Refused(f"{key[:200]} is a sparse or quantised tensor")
    # Tensors that share memory, which safetensors refuses, become tensors of their own.
    plain = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    return save(plain, metadata={"format": "pt"})


def give_up_rights(size: int) -> None:
    """Bound what this process may do from now on, for an input of `size` bytes. It cannot be undone without
    privileges."""
    with open("/proc/self/statm", "rb") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: mapped + 4 * size + _SPARE_MEMORY,
        resource.RLIMIT_CPU: _CPU_SECONDS + size // (64 * _MIB),
        resource.RLIMIT_FSIZE: 2 * size + _MIB,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        # Standard input, output and error stay open; every further file or socket has no descriptor to go to.
        resource.RLIMIT_NOFILE: 3,
    }
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))


def _rehearse() -> None:
    """Convert both layouts of pickled weights once, so that no module is left to be imported afterwards."""
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"a": torch.zeros(1)}, file, _use_new_zipfile_serialization=zipped)
        file.seek(0)
        convert(file)


def _reason(error: Exception) -> str:
    """One line of printable text."""
    text = " ".join(str(error).split())
    if asked := _ASKED_FOR.search(text):
        return f"its pickle asks for {asked[1]}, which is code, not weights"
    if isinstance(error, Refused):
        return "".join(char if char.isprintable() else "?" for char in text)
    return f"it cannot be read as weights ({type(error).__name__})"


if __name__ == "__main__":
    main()
