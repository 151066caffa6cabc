"""PiSSA, OLoRA and KaSA on the unmodified base equal PEFT's on its modified one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from loraplex.shard.adapters.families.residual import residual_pair
from loraplex.shard.errors import AdapterRejected

from .oracle import make

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

_TARGETS = ["q_proj", "k_proj", "down_proj", "up_proj"]
"""Square, wide and high weights."""
CASES = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": KasaConfig()},
}


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("kind", CASES)
def test_equals_peft(kind: str, rank: int, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = LoraConfig(r=rank, lora_alpha=24, use_rslora=rank > 1, target_modules=_TARGETS, **CASES[kind])
    directory = make(tiny_model("llama"), tmp_path, config)
    base = directory.model()
    loaded = PeftModel.from_pretrained(directory.model(), directory.path).base_model.model
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 12
    lost = []
    for name, layer in layers.items():
        weight = base.get_submodule(name).weight.detach().numpy()
        a, b = (side["default"].weight.detach().numpy() for side in (layer.lora_A, layer.lora_B))
        diag = layer.lora_diag["default"].detach().numpy() if kind == "kasa" else None
        pair_a, pair_b = residual_pair(kind, weight, a, b, layer.scaling["default"], diag)
        assert pair_a.shape == (2 * rank, weight.shape[1])
        assert pair_b.shape == (weight.shape[0], 2 * rank)
        assert pair_a.dtype == pair_b.dtype == np.float32
        delta = torch.tensor(pair_b @ pair_a)
        own = b @ (a if diag is None else diag[:, None] * a) * layer.scaling["default"]
        expected = layer.base_layer.weight.detach() + torch.tensor(own)
        torch.testing.assert_close(torch.tensor(weight) + delta, expected, rtol=0, atol=5e-5)
        lost.append((layer.base_layer.weight.detach() - torch.tensor(weight)).abs().max())
    assert max(lost) > 1e-3, "PEFT has taken something out of the base"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize(("kind", "targets"), [("pissa", ["c_attn", "c_proj"]), ("olora", ["attn.c_proj"])])
def test_on_transposed_weights(
    kind: str, targets: list[str], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT's OLoRA decomposes them as they are stored, which works for square ones only."""
    config = LoraConfig(r=4, lora_alpha=24, target_modules=targets, init_lora_weights=kind)
    directory = make(tiny_model("gpt2"), tmp_path, config)
    torch.testing.assert_close(directory.our_logits(), directory.peft_logits(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_untrained_adapter_changes_nothing(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=24, target_modules=_TARGETS, init_lora_weights=kind)
    directory = make(tiny_model("llama"), tmp_path, config, draw=lambda parameter, _: parameter.data)
    base, tensors = directory.model(), directory.tensors
    name = "model.layers.1.mlp.up_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].numpy() for side in "AB")
    pair_a, pair_b = residual_pair(kind, base.get_submodule(name).weight.detach().numpy(), a, b, 6.0)
    assert np.abs(pair_b @ pair_a).max() < 1e-5


@pytest.mark.parametrize(("kind", "rank"), [("pissa", 7), ("olora", 7), ("kasa", 6)])
def test_rank_above_what_the_weight_has(kind: str, rank: int) -> None:
    weight = np.ones((6, 9), np.float32)
    a, b = np.ones((rank, 9), np.float32), np.ones((6, rank), np.float32)
    with pytest.raises(AdapterRejected, match=rf"{kind} of rank {rank} on a weight of shape \[6, 9\]"):
        residual_pair(kind, weight, a, b, 1.0, np.ones(rank, np.float32))
