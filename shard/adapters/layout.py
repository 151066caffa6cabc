"""Which linears of the base an adapter can change, as plain data that crosses a process boundary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """One base linear. Adapter tensors for it are A [rank, in_features] and B [out_features, rank]."""

    name: str
    """Module path in the model, for example `model.layers.0.self_attn.q_proj`."""
    site: int
    """Index of the site (linears that share one input) this linear belongs to."""
    in_features: int
    out_features: int
    out_offset: int
    """First column of this linear's output in the site's output."""
    fan_in_fan_out: bool = False
    """The base stores this weight as [in, out] (GPT-2's Conv1D)."""


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """A base weight that trainers save along with an adapter (output head): an exact copy changes nothing."""

    name: str
    """Module path of the embedding or head."""
    digest: str
    """`digest.weight_digest` of the weight, row-major [out, in], in the layout's dtype."""


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Everything the parser needs to know of the model: it never sees the model itself."""

    targets: tuple[Target, ...]
    other_modules: tuple[str, ...]
    """Modules with weights that no adapter of ours can change (embeddings, norms): refused by name."""
    dtype: str
    """"float32", "bfloat16" or "float16": what A and B are packed as."""
    max_rank: int
    base_weights: tuple[BaseWeight, ...] = ()
    """Weights whose copies in an adapter file are recognised and dropped; any other copy is refused."""
