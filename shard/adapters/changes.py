"""What an adapter does to the base, in NumPy: what every format is turned into before it is packed.

At a linear, with x the input, W and b the base's weight and bias (rows of them replaced where `rows` says so)
and w the weight that a request gives the adapter:

    y = scale * (W (input_scale * x) + b) + w * (shift + B A x)

At an embedding, e = scale * E[token] + w * A[token] B, before the model's own scaling of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .floats import Float32
from .layout import EmbeddingTarget, ExpertsTarget, ModuleTarget, Target

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a base weight that the adapter brings its own of."""

    ids: Int64 | None
    """[n] ascending; None: rows 0 .. n - 1. They may lie beyond the base's last row."""
    weight: Float32
    """[n, in]."""
    bias: Float32 | None = None
    """[n]; None: the base's bias, and none beyond its last row."""


@dataclass(frozen=True, slots=True)
class Norm:
    """What a scale is made of once every rank's part of the norms is known: `magnitude` over the root of the
    sum of all `squares`. B then is multiplied by it, and a shift loses `bias` times it."""

    magnitude: Float32
    """[out]."""
    squares: Float32
    """[out]: of the rows of W + BA, over the inputs that this rank holds."""
    bias: Float32 | None = None
    """[out]: the base's."""


@dataclass(frozen=True, slots=True)
class LinearChange:
    """To one linear. The absent parts change nothing."""

    a: Float32 | None = None
    """[rank, in]."""
    b: Float32 | None = None
    """[out, rank], alpha over rank folded in; `out` may exceed the base's at a head with replaced rows."""
    scale: Float32 | None = None
    """[out]."""
    shift: Float32 | None = None
    """[out]."""
    input_scale: Float32 | None = None
    """[in]; every linear of the site must be given the same."""
    rows: Rows | None = None
    norm: Norm | None = None
    """In place of a scale, where ranks divide the inputs."""


@dataclass(frozen=True, slots=True)
class EmbeddingChange:
    a: Float32 | None = None
    """[vocabulary, rank]: A as PEFT stores it, transposed."""
    b: Float32 | None = None
    """[hidden, rank], alpha over rank folded in."""
    scale: Float32 | None = None
    """[hidden]."""
    rows: Rows | None = None
    """Of the embedding matrix [vocabulary, hidden]."""
    norm: Norm | None = None
    """In place of a scale, where ranks divide the vocabulary: of the matrix's columns."""


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """The parameters a module has on this adapter's rows."""

    parameters: Mapping[str, Float32]


@dataclass(frozen=True, slots=True)
class ExpertLora:
    """Low-rank deltas of one parameter of every expert."""

    a: Float32
    """[experts, rank, in]."""
    b: Float32
    """[experts, out, rank], alpha over rank folded in."""


@dataclass(frozen=True, slots=True)
class ExpertsChange:
    parameters: Mapping[str, ExpertLora]
    """By parameter or half of one, for example `gate_up_proj`, `up_proj`."""


AnyTarget = Target | EmbeddingTarget | ModuleTarget | ExpertsTarget
Change = LinearChange | EmbeddingChange | ModuleChange | ExpertsChange


@dataclass(frozen=True, slots=True)
class Placed:
    """One change in its place. Its values are read and computed when it is built, one site after another.

    Several may fall to one target, as long as no field of theirs is given twice.
    """

    target: AnyTarget
    rank: int
    """Of its low-rank part; 0 without one."""
    build: Callable[[], Change] = field(repr=False)
    """Raises AdapterRejected naming a tensor whose values cannot be served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the router must know of an adapter. The fields of the contract's AdapterManifest."""

    kind: str
    alone: str = ""
    owns: tuple[str, ...] = ()
    invocation_tokens: tuple[int, ...] = ()
    vocab_size: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedAdapter:
    """An adapter whose every tensor has its place."""

    placed: tuple[Placed, ...]
    traits: Traits

    @property
    def modules(self) -> int:
        """Base modules that it changes."""
        return len({placed.target.name for placed in self.placed})

    @property
    def max_rank(self) -> int:
        return max((placed.rank for placed in self.placed), default=0)
