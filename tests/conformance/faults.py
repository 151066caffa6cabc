"""Directories that are no adapters, or bad ones, for the tiny Llama; small, and each wrong in one way."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from loraplex.shard.errors import AdapterNotFound, AdapterRejected, ShardError

from .bench import CONFIG, WEIGHTS

Q = "base_model.model.model.layers.0.self_attn.q_proj"
Arrays = dict[str, np.ndarray]
_GOOD_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@dataclass(frozen=True)
class Fault:
    """What is written, and what must be said about it."""

    write: Callable[[Path], None]
    """Given a directory that exists and is empty."""
    says: tuple[str, ...]
    """Patterns: the first offending key or both values, and the remedy."""
    error: type[ShardError] = AdapterRejected
    rooted: bool = False
    """Named under an allowed root, the directory's parent."""


def good_arrays(seed: int = 0) -> Arrays:
    dice = np.random.default_rng(seed)
    return {
        f"{Q}.lora_A.weight": dice.standard_normal((2, 64), np.float32),
        f"{Q}.lora_B.weight": dice.standard_normal((64, 2), np.float32),
    }


def write_files(directory: Path, config: object, weights: bytes) -> None:
    directory.mkdir(exist_ok=True)
    encoded = config if isinstance(config, bytes) else json.dumps(config).encode()
    (directory / CONFIG).write_bytes(encoded)
    (directory / WEIGHTS).write_bytes(weights)


def write_good(directory: Path, seed: int = 0, **fields: Any) -> None:
    write_files(directory, _GOOD_CONFIG | fields, save(good_arrays(seed)))


def _config(**fields: Any) -> Callable[[Path], None]:
    return lambda directory: write_good(directory, **fields)


def _config_bytes(data: bytes) -> Callable[[Path], None]:
    return lambda directory: write_files(directory, data, save(good_arrays()))


def _arrays(change: Callable[[Arrays], Arrays], **fields: Any) -> Callable[[Path], None]:
    return lambda directory: write_files(directory, _GOOD_CONFIG | fields, save(change(good_arrays())))


def _weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: write_files(directory, _GOOD_CONFIG, change(save(good_arrays())))


def _header(entries: object, data: bytes = b"") -> Callable[[Path], None]:
    encoded = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return _weights(lambda _: struct.pack("<Q", len(encoded)) + encoded + data)


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> Mapping[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _holding(value: float) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        arrays[f"{Q}.lora_B.weight"][7, 1] = value
        return arrays

    return change


def _only(side: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {key: value for key, value in arrays.items() if f"lora_{side}" in key}


def _reshaped(side: str, shape: tuple[int, int]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {f"{Q}.lora_{side}.weight": np.ones(shape, np.float32)}


def _without_weights(directory: Path) -> None:
    write_good(directory)
    (directory / WEIGHTS).unlink()


def _pickle_only(directory: Path) -> None:
    _without_weights(directory)
    (directory / "adapter_model.bin").write_bytes(b"\x80\x02.")


def _weights_are_a_pipe(directory: Path) -> None:
    _without_weights(directory)
    os.mkfifo(directory / WEIGHTS)


def _weights_are_a_device(directory: Path) -> None:
    _without_weights(directory)
    (directory / WEIGHTS).symlink_to("/dev/zero")


def _weights_are_linked(directory: Path) -> None:
    _without_weights(directory)
    (directory / WEIGHTS).symlink_to("/etc/hostname")


def _is_linked(directory: Path) -> None:
    directory.rmdir()
    directory.symlink_to("/etc")


FAULTS: Mapping[str, Fault] = {
    "no directory": Fault(Path.rmdir, ("no such directory",), AdapterNotFound),
    "empty directory": Fault(lambda directory: None, ("adapter_config.json",)),
    "no weights": Fault(_without_weights, (r"adapter_model\.safetensors",)),
    "a pickle": Fault(_pickle_only, (r"adapter_model\.bin", "safetensors|convert")),
    "weights are a pipe": Fault(_weights_are_a_pipe, ("not a regular file",)),
    "weights are a device": Fault(_weights_are_a_device, ("not a regular file",)),
    "weights are a link out of the root": Fault(_weights_are_linked, ("out of the allowed",), rooted=True),
    "a directory linked out of the root": Fault(_is_linked, ("out of the allowed",), rooted=True),
    "config is no JSON": Fault(_config_bytes(b"{"), (r"adapter_config\.json is not JSON",)),
    "config is no object": Fault(_config_bytes(b"[1]"), ("not a JSON object",)),
    "config nests without end": Fault(_config_bytes(b"[" * 100_000), (r"adapter_config\.json",)),
    "zero tensors": Fault(_arrays(lambda arrays: {}), ("no tensors", "save the adapter again")),
    "A without B": Fault(_arrays(_only("A")), (rf"{Q}\.lora_A", "lora_B", "save the adapter again")),
    "B without A": Fault(_arrays(_only("B")), (rf"{Q}\.lora_B", "lora_A", "save the adapter again")),
    "NaN": Fault(_arrays(_holding(np.nan)), (rf"{Q}\.lora_B\.weight", "NaN", "diverged|damaged")),
    "infinity": Fault(_arrays(_holding(np.inf)), (rf"{Q}\.lora_B\.weight", "infinity", "diverged|damaged")),
    "rank not the config's": Fault(_config(r=3), (rf"{Q}\.lora_A\.weight", "rank 2", "says 3")),
    "A for another width": Fault(
        _arrays(_reshaped("A", (2, 48))), (rf"{Q}\.lora_A\.weight", "in=48", "base has 64")
    ),
    "B for another width": Fault(
        _arrays(_reshaped("B", (48, 2))), (rf"{Q}\.lora_B\.weight", "out=48", "base has 64")
    ),
    "ranks of A and B differ": Fault(_arrays(_reshaped("B", (64, 3))), (rf"{Q}\.lora_A\.weight", "2", "3")),
    "rank above the limit": Fault(
        _arrays(lambda _: {f"{Q}.lora_A.weight": np.ones((65, 64), np.float32),
                           f"{Q}.lora_B.weight": np.ones((64, 65), np.float32)}, r=65),
        (rf"{Q}\.lora_A\.weight", "65", "--max-rank 64"),
    ),
    "rank zero": Fault(_config(r=0), ("r is 0", "at least 1")),
    "rank is a word": Fault(_config(r="many"), ("adapter_config.json", r"\br\b")),
    "a tensor too many": Fault(
        _arrays(lambda arrays: arrays | {"stray": np.ones((2, 2), np.float32)}), ("stray", "1 of its 3")
    ),
    "a layer too many": Fault(
        _arrays(lambda arrays: {key.replace("layers.0", "layers.9"): value for key, value in arrays.items()}),
        (r"layers\.9\.self_attn\.q_proj\.lora_A", "no such"),
    ),
    "DoRA without magnitudes": Fault(_config(use_dora=True), ("q_proj", "magnitude", "use_dora")),
    "magnitudes without DoRA": Fault(
        _arrays(lambda arrays: arrays | {f"{Q}.lora_magnitude_vector": np.ones(64, np.float32)}),
        (rf"{Q}\.lora_magnitude_vector", "use_dora"),
    ),
    "unknown type": Fault(_config(peft_type="TELEPATHY"), ("TELEPATHY", "LoRA|LORA")),
    "no type": Fault(_config(peft_type=None), ("peft_type", "LORA")),
    "unknown option": Fault(_config(use_telepathy=True), ("use_telepathy", "merge|remove")),
    "a pattern that is no regex": Fault(_config(rank_pattern={"(": 2}), ("rank_pattern", r"\(")),
    "empty file": Fault(_weights(lambda data: b""), ("0 bytes",)),
    "cut short in the data": Fault(_weights(lambda data: data[:-5]), ("cut short", "bytes")),
    "cut short in the header": Fault(_weights(lambda data: data[:60]), ("cut short", "60 bytes")),
    "bytes too many": Fault(_weights(lambda data: data + b"more"), ("bytes",)),
    "a header of exabytes": Fault(
        _weights(lambda data: struct.pack("<Q", 1 << 60) + data[8:]), ("header", str(1 << 60))
    ),
    "a header that nests without end": Fault(_header(b"[" * 200_000), ("header", "JSON")),
    "a header that names a tensor twice": Fault(_header(b'{"a":{},"a":{}}'), ("'a' twice",)),
    "a tensor larger than its bytes": Fault(
        _header({f"{Q}.lora_A.weight": _entry([1 << 40, 1 << 40], 0, 8)}, bytes(8)),
        (rf"{Q}\.lora_A", "bytes"),
    ),
    "tensors that overlap": Fault(
        _header({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, bytes(12)), ("b", "overlaps")
    ),
    "a gap between tensors": Fault(
        _header({"a": _entry([1], 0, 4), "b": _entry([1], 8, 12)}, bytes(12)), ("b", "gap")
    ),
    "integers": Fault(_header({"a": _entry([1], 0, 4, "I32")}, bytes(4)), ("a", "I32", "F32")),
}  # fmt: skip
