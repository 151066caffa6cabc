"""Adapters that change everything that ranks divide."""

from __future__ import annotations

from collections.abc import Mapping

from ...tiny import AdapterRecipe

EXPERTS = ("mixtral", "qwen3_moe")


def recipes(kind: str) -> Mapping[str, AdapterRecipe]:
    """Every projection of a model, at ranks that nothing divides, with magnitudes, and the experts where it
    has such."""
    targets = ("gate_up_proj", "down_proj", "qkv_proj", "o_proj") if kind == "phi3" else "all-linear"
    # PEFT has no magnitudes of experts.
    with_magnitudes = ("q_proj", "k_proj", "o_proj") if kind in EXPERTS else targets
    found = {
        "small": AdapterRecipe(4, targets=targets),
        "odd": AdapterRecipe(3, targets=targets),
        "dora": AdapterRecipe(8, targets=with_magnitudes, extra={"use_dora": True}),
    }
    if kind in EXPERTS:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        found["experts"] = AdapterRecipe(4, targets=("q_proj",), extra={"target_parameters": parameters})
    return found
