"""How a merged adapter is made of others, and what it is called on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, cast, get_args

import msgspec

from ...errors import AdapterRejected

Method = Literal[
    "linear", "cat", "svd",
    "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
MajoritySign = Literal["total", "frequency"]

_DOMAIN = b"loraplex merge 1\0"

METHODS: tuple[str, ...] = get_args(Method)
_UNPRUNED = frozenset({"linear", "cat", "svd"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecipe:
    """A method of PEFT's `add_weighted_adapter` with its parameters."""

    method: Method = "linear"
    density: float | None = None
    """Share of the values that the pruning methods keep."""
    majority_sign_method: MajoritySign = "total"
    seed: int = 0
    """Of what the dare methods drop."""
    rank: int = 0
    """Of what the svd methods write; 0: the largest of the parts."""


@dataclass(frozen=True, slots=True)
class MergePart:
    """A downloaded adapter that goes into a merge."""

    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """A merge of adapters that are on this host."""

    parts: tuple[MergePart, ...]
    recipe: MergeRecipe

    def key(self) -> str:
        """64 hex digits, equal for equal merges on every host."""
        return hashlib.sha256(_DOMAIN + msgspec.json.encode(self)).hexdigest()


@dataclass(frozen=True, slots=True)
class PartPlace:
    """Where a part of a merge lies, and what to call it in errors."""

    name: str
    directory: str


def merge_recipe(
    method: str,
    *,
    density: float | None = None,
    majority_sign_method: str = "",
    seed: int = 0,
    rank: int = 0,
) -> MergeRecipe:
    """A checked recipe. Raises AdapterRejected naming a parameter that is missing, wrong or of no effect."""
    if method not in METHODS:
        raise AdapterRejected(f"there is no merge method {method[:40]!r}; take one of {', '.join(METHODS)}")
    if method in _UNPRUNED and density is not None:
        raise AdapterRejected(f"method {method} prunes nothing; leave density out")
    if method not in _UNPRUNED and (density is None or not 0 < density <= 1):
        said = "missing" if density is None else f"{density}"
        raise AdapterRejected(f"density is {said}; method {method} needs one above 0 and at most 1")
    if majority_sign_method not in ("", *get_args(MajoritySign)):
        raise AdapterRejected(
            f"majority_sign_method is {majority_sign_method[:40]!r}; take total or frequency"
        )
    if rank and not method.endswith("svd"):
        raise AdapterRejected(f"method {method} keeps the ranks of its parts; leave rank out")
    if rank < 0:
        raise AdapterRejected(f"rank is {rank}; a rank is at least 1")
    return MergeRecipe(
        method=cast("Method", method),
        density=density,
        majority_sign_method=cast("MajoritySign", majority_sign_method or "total"),
        seed=seed,
        rank=rank,
    )
