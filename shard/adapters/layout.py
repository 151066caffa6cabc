"""What of the base an adapter can change, as plain data that crosses a process boundary.

Everything that adapters change at once in the forward pass is a *site*, numbered: linears that share one
input, an embedding, a module that can be replaced for some rows (a norm), the experts of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from .share import Share


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
    has_bias: bool = False
    is_head: bool = False
    """Its output is the logits: an adapter may make it wider."""
    tied_to: str = ""
    """The embedding whose weight this one shares, where it does."""
    share: Share | None = None
    """What this rank holds of it, where several ranks hold the model; everything else says what it is as a
    whole."""

    @property
    def held_inputs(self) -> int:
        """Of its inputs, how many this rank has."""
        axis = self.share.inputs if self.share else None
        return self.in_features if axis is None else axis.held

    @property
    def held_outputs(self) -> int:
        """Of its outputs, how many this rank has."""
        axis = self.share.outputs if self.share else None
        return self.out_features if axis is None else axis.held

    @property
    def held_offset(self) -> int:
        """First column of its output in what this rank makes of the site."""
        return self.share.out_offset if self.share else self.out_offset


@dataclass(frozen=True, slots=True)
class EmbeddingTarget:
    """The token embedding. Adapter tensors for it are A [rank, vocab_size] and B [hidden_size, rank]."""

    name: str
    site: int
    vocab_size: int
    hidden_size: int
    share: Share | None = None
    """As of a Target; its outputs are token ids."""

    @property
    def held_tokens(self) -> int:
        """Of the vocabulary, how many rows this rank has."""
        axis = self.share.outputs if self.share else None
        return self.vocab_size if axis is None else axis.held


@dataclass(frozen=True, slots=True)
class ModuleTarget:
    """A module that is replaced as a whole for an adapter's rows: a norm."""

    name: str
    site: int
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, shape) of each of its own parameters."""


@dataclass(frozen=True, slots=True)
class ExpertsParameter:
    """One 3-D parameter that holds the same linear of every expert."""

    name: str
    """For example `gate_up_proj`."""
    in_features: int
    out_features: int
    is_transposed: bool
    """Stored as [experts, in, out] instead of [experts, out, in]."""
    halves: tuple[str, ...] = ()
    """Names of the linears whose outputs, equally wide, lie one after the other in this one's. Empty where it
    is a single linear, or where they interleave."""
    share: Share | None = None
    """As of a Target."""
    half_share: Share | None = None
    """Of each of the halves."""


@dataclass(frozen=True, slots=True)
class ExpertsTarget:
    """The experts of one layer."""

    name: str
    """Module path, for example `model.layers.0.mlp.experts`."""
    site: int
    experts: int
    parameters: tuple[ExpertsParameter, ...]


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Everything the parser needs to know of the model: it never sees the model itself."""

    linears: tuple[Target, ...]
    dtype: str
    """"float32", "bfloat16" or "float16": what weights are packed as."""
    max_rank: int
    aliases: tuple[Target, ...] = ()
    """Columns of these linears under names that other models of the family give them: `qkv_proj` where the
    base has q, k and v apart, or the reverse."""
    embeddings: tuple[EmbeddingTarget, ...] = ()
    modules: tuple[ModuleTarget, ...] = ()
    experts: tuple[ExpertsTarget, ...] = ()
    other_modules: tuple[str, ...] = ()
    """Modules with weights that no adapter can change here: refused by name."""
