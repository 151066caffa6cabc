"""What PEFT's LoHa and LoKr have in common: config, scale, and how their conversion is described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import AdapterRejected
from ..changes import Traits
from ..matching import pattern_table
from .low_rank import Cut
from .peft_fields import PeftFields, read_fields

_TRAINING = (
    "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "init_weights",
    "decompose_both", "decompose_factor",
)  # fmt: skip
"""What `decompose_*` has chosen shows in the tensors; convolutions are not served."""
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8


class LycorisFields(PeftFields):
    r: int | None = None
    alpha: float | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def rank_of(self, module: str) -> int:
        """The rank of one module. Raises AdapterRejected unless it is at least 1."""
        default = _DEFAULT_RANK if self.r is None else self.r
        rank = pattern_table("rank_pattern", self.rank_pattern).lookup(module, default)
        if rank < 1:
            raise AdapterRejected(f"the rank of {module} is {rank}; a rank is at least 1")
        return rank

    def scale_of(self, module: str) -> float:
        """alpha / r, with the module's own alpha and r."""
        default = _DEFAULT_ALPHA if self.alpha is None else self.alpha
        return pattern_table("alpha_pattern", self.alpha_pattern).lookup(module, default) / self.rank_of(
            module
        )


def read_lycoris_fields(raw: Mapping[str, Any]) -> tuple[LycorisFields, tuple[str, ...]]:
    """The typed config, and warnings. Raises AdapterRejected naming a field that cannot be served."""
    return read_fields(raw, LycorisFields, _TRAINING)


def traits(family: str, cuts: Mapping[str, Cut], warnings: tuple[str, ...]) -> Traits:
    """Of an adapter whose modules, by name, are served at these ranks."""
    rank = max(cut.rank for cut in cuts.values())
    worst = max(cuts, key=lambda module: cuts[module].error)
    if not cuts[worst].is_exact:
        warnings += (
            f"its deltas were cut to rank {rank}; the largest relative error is {cuts[worst].error:.1e}, "
            f"at {worst}",
        )
    return Traits(kind=f"{family} as LoRA, rank {rank}", warnings=warnings)
