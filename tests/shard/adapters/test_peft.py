"""What is parsed equals what PEFT computes: scales, ranks and weight deltas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from loraplex.shard.adapters.config import parse_config
from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.pack import Packer
from loraplex.shard.adapters.weights import PackedAdapter, read_packed
from loraplex.shard.errors import AdapterRejected

from ...tiny import AdapterRecipe, build_adapter
from .layouts import layout_of

pytestmark = [
    # PEFT uses what transformers is about to rename, and says when it saves the head along.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

LLAMA_PATTERNS = {
    "rank_pattern": {"gate_proj|up_proj": 1, "layers.0.*": 3, "q_proj": 5},
    "alpha_pattern": {"^model.layers.1.*": 9, "q_proj": -4, "v_proj": 2.5},
}
"""Overlapping keys, in alphabetical order: PEFT sorts them when it saves."""


@dataclass(frozen=True)
class Case:
    model: str
    recipe: AdapterRecipe


CASES = {
    "q and v": Case("llama", AdapterRecipe(4, 8, ("q_proj", "v_proj"))),
    "all linear": Case("llama", AdapterRecipe(7, 16)),
    "rslora": Case("llama", AdapterRecipe(7, 16, extra={"use_rslora": True})),
    "patterns": Case("llama", AdapterRecipe(4, 8, extra=LLAMA_PATTERNS)),
    "patterns with rslora": Case("llama", AdapterRecipe(4, 8, extra=LLAMA_PATTERNS | {"use_rslora": True})),
    "one module": Case("llama", AdapterRecipe(64, 8, ("model.layers.1.mlp.down_proj",))),
    "some layers": Case("llama", AdapterRecipe(2, 8, ("q_proj",), {"layers_to_transform": [0, 2]})),
    "regular expression": Case("llama", AdapterRecipe(2, 8, r".*\.1\..*(q|up)_proj")),
    "head": Case("llama", AdapterRecipe(3, 8, ("q_proj", "lm_head"))),
    "biased base": Case("qwen2", AdapterRecipe(4, 8)),
    "fused base": Case("phi3", AdapterRecipe(5, 8, extra={"rank_pattern": {"qkv_proj": 2}})),
    "transposed base": Case(
        "gpt2",
        AdapterRecipe(
            4, 8, ("c_attn", "c_proj", "c_fc"), {"fan_in_fan_out": True, "alpha_pattern": {"mlp.c_proj": 1}}
        ),
    ),
}


def deltas(adapter: PackedAdapter) -> dict[tuple[int, int], torch.Tensor]:
    """(site, output offset) to the [out, in] that the adapter adds there."""
    return {
        (site, part.out_offset): part.b.t() @ weights.a[part.rank_offset : part.rank_offset + part.b.shape[0]]
        for site, weights in adapter.site_weights().items()
        for part in weights.parts
    }


def pack(directory: Path, target: Path, model: torch.nn.Module, **layout: Any) -> PackedAdapter:
    packed = Packer(layout_of(model, **layout), FileLimits()).pack(directory, target)
    return read_packed(target, packed.file.index, pin=False)


@pytest.mark.parametrize("name", CASES)
def test_deltas_equal_peft(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES[name]
    base = tiny_model(case.model)
    directory = build_adapter(base, tmp_path / "adapter", case.recipe, seed=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    layout = layout_of(model)
    targets = {target.name: target for target in layout.targets}
    actual = deltas(pack(directory, tmp_path / "packed", model))
    spec = parse_config((directory / "adapter_config.json").read_bytes())
    wrapped = PeftModel.from_pretrained(model, directory).base_model.model
    layers = {key: module for key, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    assert len(actual) == len(layers) > 0
    for key, layer in layers.items():
        target = targets[key]
        assert (spec.rank_of(key), spec.scale_of(key)) == (layer.r["default"], layer.scaling["default"])
        expected = layer.get_delta_weight("default")
        if target.fan_in_fan_out:
            expected = expected.t()
        delta = actual[target.site, target.out_offset]
        assert delta.shape == (target.out_features, target.in_features)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
        assert delta.abs().max() > 0.01


def test_sites_at_true_rank(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_model("llama")
    recipe = AdapterRecipe(4, 8, ("q_proj", "v_proj"), {"rank_pattern": {"v_proj": 2}})
    directory = build_adapter(base, tmp_path / "adapter", recipe, seed=1)
    adapter = pack(directory, tmp_path / "packed", AutoModelForCausalLM.from_pretrained(base))
    weights = adapter.site_weights()
    assert len(weights) == 3
    assert adapter.modules == 6
    for site in weights.values():
        assert site.a.shape == (6, 64)
        assert [tuple(part.b.shape) for part in site.parts] == [(4, 64), (2, 32)]
        assert all(tensor.is_contiguous() for tensor in (site.a, *(part.b for part in site.parts)))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in (site.a, *(part.b for part in site.parts)))
    assert adapter.nbytes < 3 * 4 * (6 * 64 + 4 * 64 + 2 * 32) + 9 * 128


def test_a_head_that_was_trained_along_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_model("llama")
    directory = build_adapter(base, tmp_path / "adapter", CASES["head"].recipe, seed=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_output_embeddings().weight.data[0, 0] += 1
    with pytest.raises(AdapterRejected, match=r"lm_head\.base_layer\.weight \(whole weights"):
        pack(directory, tmp_path / "packed", model)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_variants_saved_by_peft_are_refused(
    extra: dict[str, Any], word: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_model("llama")
    recipe = AdapterRecipe(4, 8, ("q_proj",), extra)
    directory = build_adapter(base, tmp_path / "adapter", recipe, seed=1)
    with pytest.raises(AdapterRejected, match=word):
        pack(directory, tmp_path / "packed", AutoModelForCausalLM.from_pretrained(base))


def test_an_adapter_of_another_model_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = build_adapter(tiny_model("llama"), tmp_path / "adapter", AdapterRecipe(4), seed=1)
    other = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    with pytest.raises(AdapterRejected, match="the base has no such linear"):
        pack(directory, tmp_path / "packed", other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(
    dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_model("llama")
    directory = build_adapter(base, tmp_path / "adapter", AdapterRecipe(7, 3), seed=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    exact = pack(directory, tmp_path / "exact", model).site_weights()
    half = pack(directory, tmp_path / "half", model, dtype=dtype).site_weights()
    for site, weights in exact.items():
        assert torch.equal(half[site].a, weights.a.to(getattr(torch, dtype)))
        for one, two in zip(half[site].parts, weights.parts, strict=True):
            assert torch.equal(one.b, two.b.to(getattr(torch, dtype)))
