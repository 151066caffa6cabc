"""Reading an adapter's files: regular files only, bounded in size, each read once."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np

from ..errors import AdapterRejected

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
WEIGHTS_NAMES = (WEIGHTS, MLX_WEIGHTS)
"""What a weights file is called; where there are both, the first is used."""
PICKLED_WEIGHTS = "adapter_model.bin"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
COMPANIONS = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
"""Files that an adapter may bring along."""

PICKLE_REFUSED = (
    f"it has only {PICKLED_WEIGHTS}, a pickle, which is never opened; "
    "turn it into safetensors with `loraplex adapters convert`"
)

_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FileLimits:
    """The largest files that are fetched or read, in bytes."""

    config: int = 1024 * 1024
    weights: int = 8 * 1024**3
    companion: int = 64 * 1024 * 1024

    def of(self, name: str) -> int:
        if name in WEIGHTS_NAMES:
            return self.weights
        return self.config if name == CONFIG else self.companion

    def check(self, name: str, size: int) -> None:
        """Raises AdapterRejected where a file is too large to be fetched."""
        if size > self.of(name):
            raise AdapterRejected(f"{name} has {size} bytes; at most {self.of(name)} are fetched")


def find_weights(directory: Path) -> Path:
    """The weights file of an adapter's directory, under either of its names.

    Raises AdapterRejected where there is none, or only a pickle.
    """
    for name in WEIGHTS_NAMES:
        if os.path.lexists(directory / name):
            return directory / name
    if os.path.lexists(directory / PICKLED_WEIGHTS):
        raise AdapterRejected(PICKLE_REFUSED)
    raise AdapterRejected(f"there is no {WEIGHTS} in its directory; save the adapter again")


def open_regular(path: Path, limit: int) -> BufferedReader:
    """Open a regular file, or a link to one, of at most `limit` bytes. Never waits for a pipe or a device.

    Raises AdapterRejected naming the file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AdapterRejected(f"{path.name} is not a regular file")
        # Nothing may have taken its place in between: look again at what was opened, without blocking on it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise AdapterRejected(
            f"there is no {path.name} in its directory; name one that holds an adapter"
        ) from error
    except OSError as error:
        raise AdapterRejected(f"{path.name} cannot be read: {error.strerror}") from error
    file = os.fdopen(descriptor, "rb")
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise AdapterRejected(f"{path.name} is not a regular file")
    raise AdapterRejected(f"{path.name} has {status.st_size} bytes; at most {limit} are read")


def read_regular(path: Path, limit: int) -> memoryview:
    """The whole content of a regular file, as one snapshot that later changes of the file do not reach."""
    with open_regular(path, limit) as file:
        buffer = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
        length = file.readinto(buffer.data)
        if length != buffer.size or file.read(1):
            raise AdapterRejected(f"{path.name} changed while it was read; try again")
    return buffer.data


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file or a link to one."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    """The id that git gives this content: SHA-1 over a header and the bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
