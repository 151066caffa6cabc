"""DoRA: rows of W + BA, brought to trained norms."""

from __future__ import annotations

import numpy as np

from ...errors import AdapterRejected
from ..base_weights import BaseWeights
from ..changes import LinearChange, Norm
from ..floats import Float32, all_finite
from ..layout import Target
from ..tensors import Tensors


def linear_scale(
    target: Target, base: BaseWeights, key: str, tensors: Tensors, a: Float32, b: Float32
) -> Float32:
    """`read_scale` of a linear; 1 for outputs that other ranks hold, which are cut away."""
    name, outputs = f"{target.name}.weight", target.share.outputs if target.share else None
    if outputs is None:
        return read_scale(tensors.read(key), key, base.read(name), a, b)
    held = outputs.positions(len(b))
    scale = np.ones(len(b), np.float32)
    scale[held] = read_scale(tensors.read(key)[held], key, base.read_held(name), a, b[held])
    return scale


def are_inputs_divided(target: Target) -> bool:
    """Whether each rank has a part of a linear's inputs, and so of its rows' norms."""
    return target.share is not None and target.share.inputs is not None


def divided_change(
    target: Target, base: BaseWeights, a: Float32, b: Float32, magnitude: Float32, shift: Float32 | None
) -> LinearChange:
    """The change to a linear whose inputs are divided, all of the adapter's in it.

    Args:
        a, b: [rank, in] and [out, rank], alpha over rank folded in.
        magnitude: [out].
        shift: [out]: what is added beside BA, as if the base's bias were not there.
    """
    assert target.share is not None
    assert target.share.inputs is not None
    columns = target.share.inputs.positions(a.shape[1])
    squares = row_squares(base.read_held(f"{target.name}.weight"), a[:, columns], b)
    bias = base.read(f"{target.name}.bias") if target.has_bias else None
    return LinearChange(a, b, shift=shift, norm=Norm(magnitude, squares, bias))


def read_scale(magnitude: Float32, key: str, weight: Float32, a: Float32, b: Float32) -> Float32:
    """`magnitude_scale` with the magnitudes under `key`. Raises AdapterRejected where a row has no length."""
    scale = magnitude_scale(magnitude, weight, a, b)
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
    """Norms of the rows of W + BA."""
    # Rounding may leave a sum that ought to be 0 just below it.
    norms: Float32 = np.sqrt(np.maximum(row_squares(weight, a, b), 0))
    return norms


def row_squares(weight: Float32, a: Float32, b: Float32) -> Float32:
    """Their squares, without forming BA: |w|² + 2 b (A w) + b (A A^T) b for each row. Columns of W and A may
    be taken apart, and the results added."""
    squares: Float32 = np.einsum("oi,oi->o", weight, weight)
    squares += 2 * np.einsum("or,or->o", weight @ a.T, b)
    squares += np.einsum("or,or->o", b @ (a @ a.T), b)
    return squares
