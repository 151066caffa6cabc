"""Every family that is converted answers as PEFT does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PeftConfig,
    VeraConfig,
)

from loraplex.shard.adapters.changes import ParsedAdapter

from .oracle import Draw, draw_near_one, draw_small, logits, make

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:Specified to not (save|load) vera_A and vera_B:UserWarning",
)

_SOME = ["q_proj", "v_proj", "down_proj"]
_GPT2 = ["c_attn", "c_fc", "mlp.c_proj"]
_PATTERNS = {
    "rank_pattern": {"layers.0.*": 2, "q_proj": 3},
    "alpha_pattern": {"v_proj": 2.5, "down_proj": -4},
}


@dataclass(frozen=True)
class Case:
    model: str
    config: PeftConfig
    rank: int
    """The largest that is served."""
    draw: Draw = draw_small


def _vera_without_projections() -> VeraConfig:
    config = VeraConfig(r=8, target_modules=["q_proj", "down_proj"], projection_prng_key=2**40 + 7)
    config.save_projection = False  # said to the constructor, it warns
    return config


CASES = {
    "VeRA": Case("llama", VeraConfig(r=8, target_modules=_SOME), 8),
    "VeRA all linear": Case("qwen2", VeraConfig(r=5, target_modules="all-linear"), 5),
    "VeRA transposed": Case("gpt2", VeraConfig(r=8, target_modules=_GPT2), 8),
    "VeRA without projections": Case("llama", _vera_without_projections(), 8),
    "LoHa": Case("llama", LoHaConfig(r=4, alpha=8, target_modules=_SOME), 16),
    "LoHa patterns": Case("llama", LoHaConfig(r=4, target_modules=_SOME, **_PATTERNS), 16),
    "LoHa of full rank": Case("qwen2", LoHaConfig(r=16, target_modules="all-linear"), 64),
    "LoKr": Case("llama", LoKrConfig(r=2, target_modules=_SOME), 16),
    "LoKr patterns": Case("llama", LoKrConfig(r=4, target_modules=_SOME, **_PATTERNS), 32),
    "LoKr decomposed": Case(
        "llama", LoKrConfig(r=2, decompose_both=True, decompose_factor=8, target_modules=_SOME), 4
    ),
    "LoKr decomposed on both sides": Case(
        "llama", LoKrConfig(r=3, alpha=7, decompose_both=True, target_modules=["q_proj", "up_proj"]), 9
    ),
    "LoKr whole": Case("llama", LoKrConfig(r=64, decompose_factor=4, target_modules=_SOME), 64),
    "MiSS": Case("llama", MissConfig(r=4, target_modules=_SOME), 4),
    "MiSS with a remainder": Case("qwen2", MissConfig(r=7, target_modules="all-linear"), 7),
    "MiSS mini": Case("llama", MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=_SOME), 4),
    "IA3 on outputs": Case(
        "qwen2",
        IA3Config(target_modules=["q_proj", "v_proj", "up_proj"], feedforward_modules=[]),
        0,
        draw_near_one,
    ),
    "IA3": Case(
        "qwen2",
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        0,
        draw_near_one,
    ),
    "IA3 by expression": Case(
        "llama",
        IA3Config(target_modules=r".*\.(k|down)_proj", feedforward_modules=r".*\.down_proj"),
        0,
        draw_near_one,
    ),
    "IA3 transposed": Case(
        "gpt2", IA3Config(target_modules=_GPT2, feedforward_modules=["mlp.c_proj", "c_fc"]), 0, draw_near_one
    ),
    "LN tuning": Case("llama", LNTuningConfig(target_modules=["input_layernorm", "norm"]), 0, draw_near_one),
    "LN tuning with biases": Case("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_f"]), 0, draw_near_one),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_peft(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES[name]
    directory = make(tiny_model(case.model), tmp_path, case.config, draw=case.draw)
    adapter = directory.parse()
    expected = directory.peft_logits()
    torch.testing.assert_close(directory.our_logits(), expected, rtol=0, atol=1e-4)
    assert (expected - logits(directory.model())).abs().max() > 0.1, "the adapter shows"
    assert adapter.max_rank == case.rank
    assert not adapter.traits.warnings
    assert _ranks(adapter) == {placed.target.name: placed.rank for placed in adapter.placed}


def _ranks(adapter: ParsedAdapter) -> dict[str, int]:
    """The ranks of what is built."""
    ranks = {}
    for placed in adapter.placed:
        a = getattr(placed.build(), "a", None)
        ranks[placed.target.name] = 0 if a is None else len(a)
    return ranks
