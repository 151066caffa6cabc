"""What an adapter's config says about rank and scale, whatever else is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..shard.adapters.matching import PatternTable, pattern_table
from ..shard.errors import AdapterRejected

_ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""Where types that divide an alpha by the config's rank keep it."""
_RANKS = {"LORA": 8, "LOHA": 8, "LOKR": 8, "VERA": 256, "MISS": 64}
"""What PEFT takes where the config has no `r`, for types whose tensors have that rank."""
_ALPHA = 8


class Scales:
    """Rank and scale of each module by `adapter_config.json`. Fields that make no sense count as absent."""

    def __init__(self, config: Mapping[str, Any], peft_type: str) -> None:
        self._config = config
        self._alpha_name = _ALPHAS.get(peft_type)
        self._rank = _given(config.get("r"), _RANKS[peft_type]) if peft_type in _RANKS else None
        self._ranks = _patterns(config, "rank_pattern")
        self._alphas = _patterns(config, "alpha_pattern")

    def rank_of(self, module: str) -> int | None:
        """None where the config does not say."""
        rank = self._ranks.lookup(module, self._rank)
        return None if rank is None else int(rank)

    def scale_of(self, module: str) -> float | None:
        """alpha / r, or alpha / sqrt(r); None where this type or config has no such thing."""
        if self._alpha_name is None:
            return None
        alpha = self._alphas.lookup(module, _given(self._config.get(self._alpha_name), _ALPHA))
        rank = self.rank_of(module)
        if alpha is None or not rank or rank < 0:
            return None
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


class MlxScales:
    """The same for MLX's `lora_parameters`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        parameters = config.get("lora_parameters")
        self._parameters = parameters if isinstance(parameters, Mapping) else {}

    def rank_of(self, module: str) -> int | None:
        rank = _number(self._parameters.get("rank"))
        return None if rank is None else int(rank)

    def scale_of(self, module: str) -> float | None:
        return _number(self._parameters.get("scale"))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _given(value: Any, default: int) -> float | None:
    """A number, the default where it is absent, None where it is something else."""
    return default if value is None else _number(value)


def _patterns(config: Mapping[str, Any], field: str) -> PatternTable[float | None]:
    given = config.get(field)
    values = {
        str(key): _number(value) for key, value in (given if isinstance(given, Mapping) else {}).items()
    }
    try:
        return pattern_table(field, values)
    except AdapterRejected:
        return pattern_table(field, {})
