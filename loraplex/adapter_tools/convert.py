"""`loraplex adapters convert`: a pickled adapter to safetensors, in a process that may do nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ..shard.adapters.files import (
    COMPANIONS,
    CONFIG,
    PICKLED_WEIGHTS,
    WEIGHTS,
    FileLimits,
    is_regular,
    open_regular,
    read_regular,
)
from ..shard.adapters.parse import decode_config
from ..shard.adapters.tensors import Tensors
from .errors import REFUSED, UNUSABLE, ToolFailed, reported
from .output import new_directory
from .text import printable, size

_PICKLES = (PICKLED_WEIGHTS, "pytorch_model.bin")
"""Where PEFT, and before it trainers' checkpoints, put an adapter's weights."""
_PATIENCE_SECONDS = 600.0
_PROGRAM = Path(__file__).with_name("unpickle.py")
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH",)


def convert(source: Path, target: Path) -> None:
    """Write the adapter of `source` to the new directory `target`, its weights as safetensors.

    Raises ToolFailed where it is refused or nothing can be read or written; `target` is then not there.
    """
    pickle = _find_pickle(source)
    with reported(str(source)), new_directory(target) as draft:
        limits = FileLimits()
        config = read_regular(source / CONFIG, limits.config)
        decode_config(bytes(config))
        (draft / CONFIG).write_bytes(config)
        for name in COMPANIONS:
            if is_regular(source / name):
                (draft / name).write_bytes(read_regular(source / name, limits.companion))
        _unpickle(pickle, draft / WEIGHTS, limits.weights)
        tensors = Tensors(read_regular(draft / WEIGHTS, 2 * limits.weights))
        count, written = len(tensors), (draft / WEIGHTS).stat().st_size
    print(f"{target / WEIGHTS}: {count} tensors, {size(written)}")


def _find_pickle(source: Path) -> Path:
    if not source.is_dir():
        raise ToolFailed(UNUSABLE, f"there is no directory {source}")
    if is_regular(source / WEIGHTS):
        raise ToolFailed(UNUSABLE, f"{source} has {WEIGHTS} already; there is nothing to convert")
    for name in _PICKLES:
        if is_regular(source / name):
            return source / name
    raise ToolFailed(UNUSABLE, f"{source} has no {PICKLED_WEIGHTS}")


def _unpickle(pickle: Path, target: Path, limit: int) -> None:
    """Run the restricted program. Raises ToolFailed where it refuses or does not come back."""
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    with open_regular(pickle, limit) as file, target.open("xb") as output:
        length = os.fstat(file.fileno()).st_size
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(_PROGRAM), str(length)],
                stdin=file,
                stdout=output,
                stderr=subprocess.PIPE,
                env={"OMP_NUM_THREADS": "1", **environment},
                cwd="/",
                timeout=_PATIENCE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ToolFailed(REFUSED, f"{pickle}: not converted within {_PATIENCE_SECONDS:.0f} s") from error
    if done.returncode:
        raise ToolFailed(REFUSED, f"{pickle} is refused: {_last_words(done)}")


def _last_words(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"the converting process was ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return printable(lines[-1]) if lines else f"the converting process ended with code {done.returncode}"
