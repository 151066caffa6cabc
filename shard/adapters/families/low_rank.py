"""Products of two matrices at their true rank: how far a delta can be cut to what the server allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import AdapterRejected

Float64 = NDArray[np.float64]

TOLERANCE = 1e-3
"""The largest relative error, in the Frobenius norm, at which a delta may be cut to a lower rank."""
_EXACT = 1e-6
"""A relative error as small as the rounding of float32 files."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How many singular values are kept, and the relative error of leaving out the others."""

    rank: int
    error: float

    @property
    def is_exact(self) -> bool:
        return self.error <= _EXACT


def thin_svd(b: Float64, a: Float64) -> tuple[Float64, Float64, Float64]:
    """Left vectors [out, k], singular values [k] and right vectors [k, in] of `b` [out, k] times `a` [k, in].

    Costs two QR decompositions and one SVD of k x k: for 4096 x 4096 and k = 1024 about 3 s of one core.
    """
    left, left_core = np.linalg.qr(b)
    right, right_core = np.linalg.qr(a.T)
    u, s, v = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u, s, v @ right.T


def cut(module: str, singular: Float64, max_rank: int) -> Cut:
    """The rank at which a delta with these singular values, in descending order, is served.

    Its own rank where that is allowed, else `max_rank` where the error stays within TOLERANCE. Raises
    AdapterRejected naming the rank it would take, and what to do.
    """
    energy = np.cumsum(singular[::-1] ** 2)[::-1]
    errors = np.sqrt(np.append(energy, 0.0) / energy[0]) if energy[0] else np.zeros(1)
    exact = max(int(np.argmax(errors <= _EXACT)), 1)
    if exact <= max_rank:
        return Cut(exact, 0.0)
    if errors[max_rank] <= TOLERANCE:
        return Cut(max_rank, float(errors[max_rank]))
    needed = int(np.argmax(errors <= TOLERANCE))
    raise AdapterRejected(
        f"{module}: its delta has an effective rank of {needed}; the server was started with "
        f"--max-rank {max_rank}; serve with --max-rank {needed} or more, or convert the adapter with "
        "peft.convert_to_lora to a lower rank"
    )
