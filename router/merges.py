"""Adapters made of others: how, of which, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from .errors import InvalidRequest
from .sources import Source

MAX_PARTS: Final = 8
_PRUNING: Final = frozenset({"ties", "dare_linear", "dare_ties", "magnitude_prune"})
METHODS: Final = frozenset({"linear", "cat", "svd", *_PRUNING, *(f"{method}_svd" for method in _PRUNING)})
_OF_ONE: Final = frozenset({"linear", "cat", "svd"})
"""Methods that mean something for a single adapter."""
_SIGN_METHODS: Final = ("total", "frequency")
_SEEDS: Final = range(2**64)
_RANKS: Final = range(2**32)


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """How adapters are merged; methods and parameters are PEFT's. A parameter that its method does not read
    has its default, so that equal merges are equal recipes."""

    method: str = "linear"
    density: float | None = None
    """Share of the values that pruning keeps."""
    majority_sign_method: str = "total"
    seed: int = 0
    """Of what dare drops."""
    rank: int = 0
    """Of the svd methods; 0: the largest of the parts."""

    @classmethod
    def checked(
        cls,
        method: str,
        *,
        density: float | None = None,
        majority_sign_method: str = "",
        seed: int = 0,
        rank: int = 0,
    ) -> MergeRecipe:
        """A recipe of what a caller says. Raises InvalidRequest, naming the field."""
        if method not in METHODS:
            raise InvalidRequest(f"method must be one of {', '.join(sorted(METHODS))}", param="method")
        plain = method.removesuffix("_svd")
        prunes = plain in _PRUNING
        if prunes and (density is None or not 0 < density <= 1):
            raise InvalidRequest(f"density is needed for {method}: above 0 and at most 1", param="density")
        if majority_sign_method not in ("", *_SIGN_METHODS):
            raise InvalidRequest(
                f"majority_sign_method must be {' or '.join(_SIGN_METHODS)}", param="majority_sign_method"
            )
        if seed not in _SEEDS:
            raise InvalidRequest("seed must be an unsigned 64-bit integer", param="seed")
        if rank not in _RANKS:
            raise InvalidRequest("rank must not be negative", param="rank")
        return cls(
            method,
            density if prunes else None,
            majority_sign_method or "total" if plain.endswith("ties") else "total",
            seed if plain.startswith("dare") else 0,
            rank if method.endswith("svd") else 0,
        )


@dataclass(frozen=True, slots=True)
class MergePart:
    """A version that goes into a merge, and where its bytes can be had again. Its digest is what counts."""

    digest: str
    weight: float
    name: str = field(compare=False)
    source: Source | Merge = field(compare=False)
    revision: str = field(compare=False)
    token: str = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Merge:
    """The source of a merged adapter: others, at their digests, and a recipe."""

    parts: tuple[MergePart, ...]
    recipe: MergeRecipe

    def __str__(self) -> str:
        parts = ", ".join(f"{part.weight:g} {part.name}" for part in self.parts)
        return f"merge:{self.recipe.method}({parts})"


def check_part_count(count: int, recipe: MergeRecipe, param: str = "adapters") -> None:
    """Raises InvalidRequest for too few or too many adapters to merge."""
    fewest = 1 if recipe.method in _OF_ONE else 2
    if not fewest <= count <= MAX_PARTS:
        raise InvalidRequest(
            f"{recipe.method} merges {fewest} to {MAX_PARTS} adapters, not {count}", param=param
        )
