"""Writing a safetensors file tensor by tensor, with the same bytes on every machine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import numpy as np

from ..floats import Float32

_ALIGNMENT = 8


def write_safetensors(
    file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], values: Iterable[Float32]
) -> None:
    """Write float32 tensors of these names and shapes. `values`: theirs, in this order, one at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for (name, shape), value in zip(shapes.items(), values, strict=True):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, announced was {shape}")
        file.write(np.ascontiguousarray(value, dtype="<f4").data)
