"""Float conversions in NumPy, which knows no bfloat16: that travels as its upper 16 bits, uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Stored = NDArray[Any]
"""float32, float16, or uint16 holding bfloat16."""

STORED: dict[str, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
"""How a dtype of ours is kept in NumPy."""

_FILE_DTYPES: dict[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BF16_EXPONENT = 0x7F80


def read_float32(data: memoryview, dtype: str) -> Float32:
    """The bytes of one tensor as a flat float32 array; what float32 cannot hold becomes infinite."""
    values = np.frombuffer(data, dtype=_FILE_DTYPES[dtype])
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def store(values: Float32, dtype: str) -> Stored:
    """Finite float32 values rounded to nearest even in `dtype`; what it cannot hold becomes infinite."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(STORED[dtype], copy=False)


def all_finite(stored: Stored) -> bool:
    if stored.dtype == np.uint16:
        return not bool(((stored & _BF16_EXPONENT) == _BF16_EXPONENT).any())
    return bool(np.isfinite(stored).all())
