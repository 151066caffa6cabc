"""PEFT's ways of making one tensor, or one pair of A and B, of several.

Tensors are float32. What only adds, multiplies and compares gives the same bits on every machine; the svd
methods use LAPACK in float64, which may differ in the last bit between processors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..floats import Float32
from .recipe import MajoritySign, MergeRecipe

Pair = tuple[Float32, Float32]
"""A [rank, in] and B [out, rank]."""


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's share in a module."""

    a: Float32
    b: Float32
    scale: float
    """What the adapter itself multiplies B A with."""
    weight: float


def merge_pairs(terms: Sequence[Term], recipe: MergeRecipe, rank: int, random: np.random.Generator) -> Pair:
    """A and B whose product, unscaled, is the merge of the terms; for the svd methods, of this rank at most.

    The dare methods draw from `random`. Raises LinAlgError where a decomposition does not converge.
    """
    if recipe.method == "cat":
        return _concatenate(terms)
    if recipe.method == "svd":
        return _truncate_product(*_factors(terms), rank)
    weights = [term.weight for term in terms]
    if recipe.method.endswith("_svd"):
        deltas = [np.float32(term.scale) * (term.b @ term.a) for term in terms]
        return _truncate(merge_tensors(deltas, weights, recipe, random), rank)
    # The weight is split evenly between A and B; its sign goes to A, or it would cancel.
    shares = [term.weight * term.scale for term in terms]
    roots = [math.sqrt(abs(share)) for share in shares]
    signed = [
        math.copysign(root, share) if share else root for root, share in zip(roots, shares, strict=True)
    ]
    return (
        merge_tensors([term.a for term in terms], signed, recipe, random),
        merge_tensors([term.b for term in terms], roots, recipe, random),
    )


def merge_tensors(
    tensors: Sequence[Float32], weights: Sequence[float], recipe: MergeRecipe, random: np.random.Generator
) -> Float32:
    """Prune, weight and add tensors of one shape as the recipe's method does, before any decomposition."""
    method, density = recipe.method.removesuffix("_svd"), recipe.density
    if density is not None and density < 1:
        tensors = [
            _drop_at_random(tensor, density, random)
            if method.startswith("dare")
            else keep_largest(tensor, density)
            for tensor in tensors
        ]
    if method.endswith("ties"):
        return _mean_of_majority(tensors, weights, recipe.majority_sign_method)
    merged = np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        merged += tensor * np.float32(weight)
    return merged


def keep_largest(tensor: Float32, density: float) -> Float32:
    """The share `density` of the values that are largest by magnitude; the others become 0.

    Among equals the first are kept.
    """
    count = int(density * tensor.size)
    if count == 0:
        return np.zeros_like(tensor)
    magnitudes = np.abs(tensor).reshape(-1)
    smallest_kept = np.partition(magnitudes, tensor.size - count)[tensor.size - count]
    keep = magnitudes > smallest_kept
    equals = np.flatnonzero(magnitudes == smallest_kept)
    keep[equals[: count - int(keep.sum())]] = True
    return np.where(keep.reshape(tensor.shape), tensor, np.float32(0))


def _drop_at_random(tensor: Float32, density: float, random: np.random.Generator) -> Float32:
    """Each value with probability `density`, divided by it; else 0."""
    keep = random.random(tensor.shape, dtype=np.float32) < density
    return np.where(keep, tensor / np.float32(density), np.float32(0))


def _mean_of_majority(
    tensors: Sequence[Float32], weights: Sequence[float], sign_method: MajoritySign
) -> Float32:
    """Per element, the weighted sum of the values that have the elected sign, divided by their number."""
    votes = np.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor if sign_method == "total" else np.sign(tensor)
    elected = np.where(votes >= 0, np.float32(1), np.float32(-1))
    total, count = np.zeros_like(votes), np.zeros_like(votes)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = np.sign(tensor) == elected
        total += np.where(agrees, tensor * np.float32(weight), np.float32(0))
        count += agrees
    merged: Float32 = np.divide(total, np.maximum(count, np.float32(1)))
    return merged


def _concatenate(terms: Sequence[Term]) -> Pair:
    a = np.concatenate([term.a * np.float32(term.weight) * np.float32(term.scale) for term in terms])
    return a, np.concatenate([term.b for term in terms], axis=1)


_Float64 = NDArray[np.float64]


def _factors(terms: Sequence[Term]) -> tuple[_Float64, _Float64]:
    """B [out, sum of ranks] and A [sum of ranks, in] whose product is the weighted sum."""
    b = np.concatenate([np.float64(term.weight * term.scale) * term.b for term in terms], axis=1)
    return b, np.concatenate([term.a for term in terms]).astype(np.float64)


def _truncate_product(b: _Float64, a: _Float64, rank: int) -> Pair:
    """The best approximation of B A of this rank, found without forming B A."""
    b_basis, b_inner = np.linalg.qr(b)
    a_basis, a_inner = np.linalg.qr(a.T)
    left, values, right = np.linalg.svd(b_inner @ a_inner.T)
    return _pair(b_basis @ left[:, : len(values)], values, right[: len(values)] @ a_basis.T, rank)


def _truncate(delta: Float32, rank: int) -> Pair:
    """The best approximation of this rank, by the eigenvectors of the smaller of the matrix's two squares:
    in float64 as exact as float32 can show, and several times faster than its full decomposition."""
    is_tall = delta.shape[0] > delta.shape[1]
    wide = (delta.T if is_tall else delta).astype(np.float64)
    basis = np.linalg.eigh(wide @ wide.T).eigenvectors[:, : -rank - 1 : -1]
    rows = basis.T @ wide
    values = np.linalg.norm(rows, axis=1)
    rows /= np.where(values > 0, values, 1)[:, None]
    return _pair(rows.T, values, basis.T, rank) if is_tall else _pair(basis, values, rows, rank)


def _pair(left: _Float64, values: _Float64, right: _Float64, rank: int) -> Pair:
    """A and B of a decomposition. Each vector has the sign that makes A's largest entry positive."""
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    largest = np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1)
    signs = np.where(largest < 0, -1.0, 1.0)
    return (right * signs).astype(np.float32), (left * values * signs.T).astype(np.float32)
