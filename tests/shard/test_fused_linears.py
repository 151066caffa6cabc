"""An adapter made for a fused base serves one that has the same linears apart, and the other way round."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from loraplex.shard.adapters.assemble import assemble
from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.layout import Target
from loraplex.shard.adapters.parse import parse_adapter
from loraplex.shard.adapters.weights import PackedAdapter
from loraplex.shard.errors import AdapterRejected
from loraplex.shard.fused_linears import aliases

from ..tiny import CONFIGS
from .dense import Shard

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


SIZES = [64, 32, 32]
"""Outputs of q, k and v."""


@pytest.fixture(scope="module")
def twins() -> dict[str, nn.Module]:
    """One model twice: as Phi-3 with fused linears, and as a Llama with the same weights apart."""
    torch.manual_seed(0)
    fused = AutoModelForCausalLM.from_config(CONFIGS["phi3"], dtype=torch.float32).eval()
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.12)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in fused.state_dict().items():
        if "qkv_proj" in name:
            parts = zip("qkv", weight.split(SIZES), strict=True)
            weights |= {name.replace("qkv", part): value for part, value in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), weight.chunk(2), strict=True)
            weights |= {name.replace("gate_up", part): value for part, value in parts}
        else:
            weights[name] = weight
    llama = LlamaConfig.from_dict(CONFIGS["llama"].to_dict() | {"rms_norm_eps": fused.config.rms_norm_eps})
    apart = AutoModelForCausalLM.from_config(llama, dtype=torch.float32).eval()
    apart.load_state_dict(weights)
    torch.testing.assert_close(logits(fused), logits(apart))
    return {"fused": fused, "apart": apart}


@torch.inference_mode()
def logits(model: nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
    return result


def train(model: nn.Module, directory: Path, **fields: Any) -> torch.Tensor:
    """Save a random adapter for a copy of the model; answers what PEFT computes with it."""
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    wrapped = get_peft_model(copied.eval(), LoraConfig(r=4, lora_alpha=8, **fields))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + noise if "magnitude" in name else noise * 0.2
    wrapped.save_pretrained(directory)
    assert isinstance(wrapped, PeftModel)
    return logits(wrapped)


def served(model: nn.Module, directory: Path, tensors: Mapping[str, torch.Tensor] = {}) -> torch.Tensor:
    """What a shard with this base computes with an adapter, to whose file `tensors` are added."""
    file = directory / "adapter_model.safetensors"
    if tensors:
        save_file(load_file(file) | dict(tensors), file)
    shard = Shard.of(model)
    special = shard.special
    config, weights = (directory / "adapter_config.json").read_bytes(), memoryview(file.read_bytes())
    parsed = parse_adapter(config, weights, special.layout, BaseTensors(special.parameters))
    packed = io.BytesIO()
    index = assemble(parsed, packed, "float32")
    buffer = torch.frombuffer(bytearray(packed.getvalue()), dtype=torch.uint8)
    shard.pool.load(0, "adapter", PackedAdapter(index, buffer))
    adapted, base = shard.logits([PROMPT, PROMPT], [((0, 1.0),), ()])
    torch.testing.assert_close(base, logits(model), rtol=0, atol=1e-4)
    return adapted


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("trained", "base", "targets"),
    [
        ("fused", "apart", ["qkv_proj", "gate_up_proj", "down_proj"]),
        ("apart", "fused", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj"]),
        ("apart", "fused", ["v_proj", "up_proj"]),
    ],
)
def test_the_other_form_serves(
    twins: dict[str, nn.Module],
    tmp_path: Path,
    trained: str,
    base: str,
    targets: list[str],
    use_dora: bool,
) -> None:
    expected = train(twins[trained], tmp_path, target_modules=targets, use_dora=use_dora)
    assert (expected - logits(twins[trained])).abs().max() > 0.1
    torch.testing.assert_close(served(twins[base], tmp_path), expected, rtol=0, atol=1e-4)


def test_a_linear_and_its_part_are_refused_together(twins: dict[str, nn.Module], tmp_path: Path) -> None:
    train(twins["apart"], tmp_path, target_modules="all-linear")
    q = "base_model.model.model.layers.0.self_attn.qkv_proj"
    extra = {f"{q}.lora_A.weight": torch.ones(4, 64), f"{q}.lora_B.weight": torch.ones(128, 4)}
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj"', '"q_proj", "qkv_proj"'))
    with pytest.raises(AdapterRejected, match=r"q_proj and .*qkv_proj|qkv_proj and .*q_proj"):
        served(twins["apart"], tmp_path, extra)


def linear(name: str, out_features: int, offset: int = 0) -> Target:
    return Target(f"layer.{name}", 0, 64, out_features, offset)


@pytest.mark.parametrize(
    ("targets", "model_type"),
    [
        ([linear("qkv_proj", 128)], "codegen"),
        ([linear("qkv_proj", 120)], "phi3"),
        ([linear("k_proj", 32), linear("q_proj", 64, 32), linear("v_proj", 32, 96)], "llama"),
        ([linear("q_proj", 64), linear("k_proj", 32, 64)], "llama"),
    ],
)
def test_what_is_not_known_to_be_the_same_is_left_alone(targets: list[Target], model_type: str) -> None:
    config = SimpleNamespace(
        model_type=model_type, hidden_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    assert aliases(targets, config, {}) == []
