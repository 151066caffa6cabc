"""PiSSA, OLoRA and KaSA: adapters for a base that has lost a low-rank part of itself.

When PEFT loads such an adapter, it finds that part from the base's weight again and takes it out of the base.
Served here on the whole base, the adapter brings the part along, negated: LoRA of twice its rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import AdapterRejected
from ..floats import Float32

Float64 = NDArray[np.float64]


def residual_pair(
    kind: str,
    weight: Float32,
    a: Float32,
    b: Float32,
    scale: float,
    diag: Float32 | None = None,
    *,
    stored_transposed: bool = False,
) -> tuple[Float32, Float32]:
    """A [2 rank, in] and B [out, 2 rank], scale folded into B, that equal the adapter on the unmodified base.

    `weight` [out, in] is the base's, `a` [rank, in] and `b` [out, rank] the adapter's own, `diag` [rank]
    KaSA's trained values. `stored_transposed`: the base keeps the weight as [in, out]; OLoRA decomposes it as
    it is stored. PiSSA and KaSA cost an eigendecomposition in float64, for a weight of 4096 x 4096 some 16 s
    of one core; OLoRA costs milliseconds. Raises AdapterRejected where the weight has no such part.
    """
    rank, smallest = a.shape[0], min(weight.shape)
    if rank > smallest or (kind == "kasa" and rank == smallest):
        raise AdapterRejected(
            f"{kind} of rank {rank} on a weight of shape {list(weight.shape)}: it has not as many components"
        )
    exact = weight.astype(np.float64)
    lost_b, lost_a = _lost_part(kind, exact.T if stored_transposed else exact, rank)
    if stored_transposed:
        lost_b, lost_a = lost_a.T, lost_b.T
    if kind == "olora":
        lost_b = lost_b * scale
    with np.errstate(over="ignore"):
        own_b = b * np.float32(scale) if diag is None else b * diag * np.float32(scale)
        return (
            np.concatenate([a, lost_a.astype(np.float32)]),
            np.concatenate([own_b, -lost_b.astype(np.float32)], axis=1),
        )


def _lost_part(kind: str, weight: Float64, rank: int) -> tuple[Float64, Float64]:
    """[n, rank] and [rank, m] whose product is what is missing from a weight [n, m], before OLoRA's scale."""
    match kind:
        case "pissa":
            return _components(weight, slice(min(weight.shape) - rank, None))
        case "olora":
            return _leading_columns(weight, rank)
        case "kasa":
            return _components(weight, slice(None, rank))
        case _:
            raise AssertionError(f"{kind} takes nothing out of the base")


def _components(weight: Float64, which: slice) -> tuple[Float64, Float64]:
    """Left and right factor of these singular components, counted from the smallest.

    Only one side's singular vectors are needed: projected on them, the weight yields the rest.
    """
    if weight.shape[0] <= weight.shape[1]:
        left = np.linalg.eigh(weight @ weight.T)[1][:, which]
        return left, left.T @ weight
    right = np.linalg.eigh(weight.T @ weight)[1][:, which]
    return weight @ right, right.T


def _leading_columns(weight: Float64, rank: int) -> tuple[Float64, Float64]:
    """The first columns of Q [n, rank] and rows of R [rank, m] of the weight's QR decomposition.

    Those columns of Q depend on as many columns of the weight only. The signs cancel in the product.
    """
    q = np.linalg.qr(weight[:, :rank])[0]
    return q, q.T @ weight
