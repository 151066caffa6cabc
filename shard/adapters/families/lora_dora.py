"""DoRA: rows of W + BA, brought to trained norms."""

from __future__ import annotations

import numpy as np

from ...errors import AdapterRejected
from ..floats import Float32, all_finite
from ..tensors import Tensors


def read_scale(key: str, tensors: Tensors, weight: Float32, a: Float32, b: Float32) -> Float32:
    """`magnitude_scale` with the magnitudes of a file. Raises AdapterRejected where a row has no length."""
    scale = magnitude_scale(tensors.read(key), weight, a, b)
    if not all_finite(scale):
        raise AdapterRejected(
            f"{key}: a row of W + BA has no length that could be scaled; the adapter is damaged"
        )
    return scale


def magnitude_scale(magnitude: Float32, weight: Float32, a: Float32, b: Float32) -> Float32:
    """What each row of W + BA is multiplied with to have its trained norm, [out].

    `magnitude` [out], `weight` [out, in], `a` [rank, in], `b` [out, rank] with alpha over rank folded in.
    Not finite where a row's own norm is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return magnitude / row_norms(weight, a, b)


def row_norms(weight: Float32, a: Float32, b: Float32) -> Float32:
    """Norms of the rows of W + BA, without forming BA: |w|² + 2 b (A w) + b (A A^T) b for each row."""
    squares: Float32 = np.einsum("oi,oi->o", weight, weight)
    squares += 2 * np.einsum("or,or->o", weight @ a.T, b)
    squares += np.einsum("or,or->o", b @ (a @ a.T), b)
    # Rounding may leave a sum that ought to be 0 just below it.
    norms: Float32 = np.sqrt(np.maximum(squares, 0))
    return norms
