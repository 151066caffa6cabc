"""A strict reader of the safetensors header, bounded in size, run before anything believes the file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterRejected

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""One tensor for each of 128 experts in 48 layers needs 5 MB; every linear of 80 dense layers 150 KB."""
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8

_AGAIN = "save it again, or fetch it again if it is whole elsewhere"

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The dtypes that are served, in bytes an element."""

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int


def read_header(file: memoryview) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by key.

    Raises AdapterRejected unless the header is small, names every tensor once, with a float dtype, and the
    tensors tile the rest of the file without gap or overlap.
    """
    if len(file) < _LENGTH_BYTES:
        raise AdapterRejected(
            f"the weights file has {len(file)} bytes, too few for a safetensors file; {_AGAIN}"
        )
    length = int.from_bytes(file[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise AdapterRejected(
            f"its safetensors header claims {length} bytes; at most {MAX_HEADER_BYTES} are read; {_AGAIN}"
        )
    start = _LENGTH_BYTES + length
    if start > len(file):
        raise AdapterRejected(
            f"the weights file is cut short: {len(file)} bytes, its header alone needs {start}; {_AGAIN}"
        )
    entries = _decode(bytes(file[_LENGTH_BYTES:start]))
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise AdapterRejected(f"it has {len(entries)} tensors; at most {MAX_TENSORS} are read; split it")
    tensors = {key: _tensor(key, entry, start) for key, entry in entries.items()}
    _check_tiling(tensors, start, len(file))
    return tensors


def _decode(header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"its safetensors header is not JSON: {error}; {_AGAIN}") from error
    if not isinstance(entries, dict):
        raise AdapterRejected(f"its safetensors header is not a JSON object; {_AGAIN}")
    return entries


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise AdapterRejected(f"its safetensors header names {twice[:200]!r} twice; {_AGAIN}")
    return result


def _tensor(key: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterRejected(f"{key}: its header entry is not dtype, shape and data_offsets; {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise AdapterRejected(
            f"{key}: dtype {str(dtype)[:20]} is not served; save it as one of {', '.join(ITEM_BYTES)}"
        )
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise AdapterRejected(f"{key}: its shape in the header is not a short list of sizes; {_AGAIN}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise AdapterRejected(f"{key}: its data_offsets in the header are not two positions; {_AGAIN}")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise AdapterRejected(
            f"{key}: {dtype} of shape {shape} does not fill the {end - begin} bytes it claims; {_AGAIN}"
        )
    return TensorInfo(key, dtype, tuple(shape), start + begin, start + end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(tensors: dict[str, TensorInfo], start: int, file_size: int) -> None:
    position = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            what = "overlaps another tensor" if tensor.begin < position else "leaves a gap before it"
            raise AdapterRejected(f"{tensor.key}: its data {what}; the weights file is damaged; {_AGAIN}")
        position = tensor.end
    if position != file_size:
        what = "is cut short" if position > file_size else "has bytes that belong to no tensor"
        raise AdapterRejected(
            f"the weights file {what}: {file_size} bytes, its header describes {position}; {_AGAIN}"
        )
