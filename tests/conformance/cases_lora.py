"""Rows 1 to 16: LoRA on linears, its scales and patterns, and the architectures."""

from __future__ import annotations

from .bench import Saved, lora, reconfigured
from .case import served

_OVERLAP = {"layers.1.*": 3, "q_proj": -4, "v_proj": 2.5}
_FAN = lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)

CASES = (
    served(1, "q-v", lora(target_modules=["q_proj", "v_proj"])),
    served(2, "ranks-1-3-7-64", *(lora(r=rank) for rank in (1, 3, 7, 64))),
    served(3, "rslora-r7", lora(r=7, use_rslora=True), kind="rsLoRA"),
    served(4, "rank-pattern-suffix", lora(rank_pattern={"q_proj": 2, "mlp.down_proj": 6})),
    served(4, "rank-pattern-regex", lora(rank_pattern={r"[qk]_proj": 5, r"layers\.1\.mlp\..*": 3})),
    served(4, "rank-pattern-anchored", lora(rank_pattern={r"^model.layers.0.self_attn.v_proj": 7})),
    served(4, "rank-pattern-alternation", lora(rank_pattern={"gate_proj|up_proj": 1, "o_proj": 9})),
    served(4, "rank-pattern-matching-nothing", lora(rank_pattern={"_proj": 2, "base_model.model.q_proj": 3})),
    served(
        5,
        "alpha-pattern-rslora",
        lora(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"down_proj": 3, "v_proj": 20}),
    ),
    served(
        6,
        "overlapping-patterns",
        lora(rank_pattern={"layers.1.*": 3, "q_proj": 5}, alpha_pattern=_OVERLAP),
    ),
    served(
        6,
        "overlapping-patterns-swapped",
        reconfigured(
            lora(alpha_pattern=_OVERLAP), alpha_pattern=dict(reversed([*_OVERLAP.items()]))
        ),
    ),
    served(7, "alpha-zero", reconfigured(lora(), lora_alpha=0), moves=False),
    served(7, "alpha-negative", reconfigured(lora(), lora_alpha=-6)),
    served(7, "alpha-float", reconfigured(lora(), lora_alpha=5.25)),
    served(8, "layers-to-transform-int", lora(target_modules=["q_proj", "o_proj"], layers_to_transform=1)),
    served(8, "layers-to-transform-list", lora(target_modules=["up_proj"], layers_to_transform=[0, 2])),
    served(
        8,
        "layers-pattern",
        lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    ),
    served(9, "target-regex", lora(target_modules=r".*layers\.[02]\.(self_attn\.[qk]_proj|mlp\.up_proj)")),
    served(9, "exclude-list", lora(exclude_modules=["q_proj", "model.layers.1.mlp.up_proj"])),
    served(9, "exclude-regex", lora(exclude_modules=r".*layers\.1\..*")),
    served(10, "one-module", lora(target_modules=["model.layers.1.mlp.down_proj"])),
    served(11, "fresh", lora(Saved(randomise=False)), moves=False, exact=True),
    *(
        served(row, f"{base}-all-linear", lora(), base=base)
        for row, base in (
            (12, "qwen2"), (12, "qwen3"), (13, "mistral"), (13, "gemma"), (13, "gemma2"), (13, "gemma3"),
            (14, "phi3"), (16, "opt"),
        )
    ),
    served(14, "phi3-qkv-only", lora(target_modules=["qkv_proj"]), base="phi3"),
    served(15, "gpt2-fan-in-fan-out-true", _FAN, base="gpt2"),
    served(15, "gpt2-fan-in-fan-out-false", reconfigured(_FAN, fan_in_fan_out=False), base="gpt2"),
    served(15, "gpt2-fan-in-fan-out-null", reconfigured(_FAN, fan_in_fan_out=None), base="gpt2"),
)  # fmt: skip
