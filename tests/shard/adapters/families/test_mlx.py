"""Directories of mlx-lm: what its layers compute, computed here by its formulas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from loraplex.shard.adapters.changes import ExpertsChange
from loraplex.shard.errors import AdapterRejected

from .oracle import Directory, logits

RANK = 4
SCALE = 2.5

Tensors = dict[str, torch.Tensor]
Base = Callable[[str], Path]


def write(base: Path, path: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Directory:
    """As mlx-lm saves it, among fields of its training."""
    fields = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
        "model": "mlx-community/Some-Model-4bit",
        "optimizer": "adam",
        "mask_prompt": True,
    }
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(dict(tensors), path / "adapters.safetensors")
    return Directory(base, path)


def pair(in_features: int, out_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(in_features, RANK, generator=generator) * 0.2,
        torch.randn(RANK, out_features, generator=generator) * 0.2,
    )


def on_linears(model: torch.nn.Module, *names: str) -> Tensors:
    """LoRA on linears of a model, by their paths."""
    tensors: Tensors = {}
    for seed, name in enumerate(names):
        weight = model.get_submodule(name).weight
        out_features, in_features = reversed(weight.shape) if _is_transposed(model, name) else weight.shape
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = pair(in_features, out_features, seed)
    return tensors


def _is_transposed(model: torch.nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), Conv1D)


@torch.no_grad()
def fused(model: torch.nn.Module, tensors: Tensors) -> torch.nn.Module:
    """A model with the weights that fusing such an adapter makes."""
    for key in tensors:
        if not key.endswith(".lora_a"):
            continue
        name = key.removesuffix(".lora_a")
        module = model.get_submodule(name)
        a, b = tensors[key], tensors[f"{name}.lora_b"]
        if isinstance(module, torch.nn.Embedding):
            module.weight += SCALE * a @ b
            continue
        delta = (SCALE * b.T) @ a.T
        weight = (module.weight.T if _is_transposed(model, name) else module.weight) + delta
        if f"{name}.m" in tensors:
            weight *= (tensors[f"{name}.m"] / weight.norm(dim=1))[:, None]
        module.weight.copy_(weight.T if _is_transposed(model, name) else weight)
    return model


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj", "lm_head"]),
        ("qwen2", ["model.layers.0.self_attn.k_proj", "model.layers.2.mlp.up_proj"]),
        ("phi3", ["model.layers.2.self_attn.qkv_proj"]),
        ("gpt2", ["transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_proj"]),
    ],
)
def test_lora(kind: str, names: list[str], tiny_model: Base, tmp_path: Path) -> None:
    base = tiny_model(kind)
    model = Directory(base, tmp_path).model()
    directory = write(base, tmp_path, on_linears(model, *names))
    adapter = directory.parse()
    assert (adapter.traits.kind, adapter.traits.alone, adapter.max_rank) == ("LoRA of MLX", "", RANK)
    expected = logits(fused(directory.model(), directory.tensors))
    torch.testing.assert_close(directory.our_logits(), expected, rtol=0, atol=1e-4)
    assert (expected - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_dora(kind: str, tiny_model: Base, tmp_path: Path) -> None:
    names = ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    base = tiny_model(kind)
    model = Directory(base, tmp_path).model()
    tensors = on_linears(model, *names)
    for name in names:
        tensors[f"{name}.m"] = model.get_submodule(name).weight.detach().norm(dim=1) * 1.2
    directory = write(base, tmp_path, tensors, fine_tune_type="dora")
    adapter = directory.parse()
    assert (adapter.traits.kind, adapter.traits.alone) == ("DoRA of MLX", "DoRA")
    expected = logits(fused(directory.model(), tensors))
    torch.testing.assert_close(directory.our_logits(), expected, rtol=0, atol=1e-4)
    assert (expected - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_embedding(kind: str, tiny_model: Base, tmp_path: Path) -> None:
    """MLX runs a tied embedding, with its adapter, as the output head too."""
    base = tiny_model(kind)
    a, b = pair(300, 64)
    tensors = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    directory = write(base, tmp_path, tensors)
    model = directory.model()
    tied = kind == "llama_tied"
    assert len(directory.parse().placed) == 1 + tied
    expected = fused(directory.model(), tensors)
    assert torch.equal(expected.lm_head.weight, model.lm_head.weight) is not tied
    # Apart from each other, so that either is changed by its own part of the adapter.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(logits(directory.applied_to(model)), logits(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("parent", ["mlp", "block_sparse_moe"])
def test_experts(parent: str, tiny_model: Base, tmp_path: Path) -> None:
    """MLX keeps gate and up apart; the base has both in one parameter."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    sizes = {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    for linear, (in_features, out_features) in sizes.items():
        key = f"model.layers.1.{parent}.switch_mlp.{linear}"
        tensors[f"{key}.lora_a"] = torch.randn(4, RANK, in_features, generator=generator)
        tensors[f"{key}.lora_b"] = torch.randn(4, out_features, RANK, generator=generator)
    directory = write(tiny_model("mixtral"), tmp_path, tensors)
    placed = directory.parse().placed
    assert {one.target.name for one in placed} == {"model.layers.1.mlp.experts"}
    found = {}
    for one in placed:
        change = one.build()
        assert isinstance(change, ExpertsChange)
        found |= {name: torch.tensor(lora.b @ lora.a) for name, lora in change.parameters.items()}
    assert found.keys() == sizes.keys()
    for linear in sizes:
        key = f"model.layers.1.{parent}.switch_mlp.{linear}"
        expected = SCALE * tensors[f"{key}.lora_b"] @ tensors[f"{key}.lora_a"]
        torch.testing.assert_close(found[linear], expected, rtol=0, atol=1e-4)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({}, {"fine_tune_type": "full"}, "mlx_lm.fuse"),
        ({}, {"fine_tune_type": "odd"}, "fine_tune_type is 'odd'"),
        ({}, {"lora_parameters": {"rank": 4, "scale": 1.0, "alpha": 16}}, "alpha 16.0 beside scale 1.0"),
        ({}, {"lora_parameters": {"rank": 4}}, "missing required field `scale`"),
        ({}, {"lora_parameters": {"rank": 4, "scale": 1.0, "use_odd": True}}, "unknown field `use_odd`"),
        ({}, {"lora_parameters": {"rank": 0, "scale": 1.0}}, "rank is 0"),
        ({}, {"lora_parameters": {"rank": 8, "scale": 1.0}}, r"q_proj.lora_a has shape \[64, 4\].*\[64, 8\]"),
        ({}, {"lora_parameters": {"rank": 65, "scale": 1.0}}, "has rank 65; .*--max-rank 64"),
        ({}, {"fine_tune_type": "dora"}, "there is no m beside it"),
        ({f"{Q}.m": (64,)}, {}, r"q_proj.m \(its config does not say that it is DoRA"),
        ({f"{Q}.weight": (64, 64)}, {}, r"q_proj.weight \(not a LoRA tensor of MLX\)"),
        ({"model.layers.9.mlp.up_proj.lora_a": (64, 4)}, {}, r"9.mlp.up_proj.lora_a \(there is no lora_b"),
        ({"model.norm.lora_a": (64, 4), "model.norm.lora_b": (4, 64)}, {}, "on this kind of module"),
        ({"odd.lora_a": (64, 4), "odd.lora_b": (4, 64)}, {}, "the base has no such module"),
        (
            {
                "model.layers.0.mlp.switch_mlp.up_proj.lora_a": (4, 4, 64),
                "model.layers.0.mlp.switch_mlp.up_proj.lora_b": (4, 96, 4),
            },
            {},
            "the base has no such experts",
        ),
    ],
)
def test_refused(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], words: str, tiny_model: Base, tmp_path: Path
) -> None:
    base = tiny_model("llama")
    sound = on_linears(Directory(base, tmp_path).model(), Q)
    directory = write(
        base, tmp_path, sound | {key: torch.ones(shape) for key, shape in tensors.items()}, **config
    )
    with pytest.raises(AdapterRejected, match=words):
        directory.parse()


@pytest.mark.parametrize(
    ("linear", "shape", "words"),
    [
        ("gate_up_proj", (4, 96, 4), r"need \[4, 192, 4\]"),
        ("up_proj", (4, 64, 4), r"has shape \[4, 64, 4\].*need \[4, 96, 4\]"),
        ("up_proj", (3, 96, 4), r"has shape \[3, 96, 4\].*need \[4, 96, 4\]"),
        ("w1", (4, 96, 4), "the base's experts have no such linear"),
    ],
)
def test_experts_of_another_shape_are_refused(
    linear: str, shape: tuple[int, ...], words: str, tiny_model: Base, tmp_path: Path
) -> None:
    key = f"model.layers.0.mlp.switch_mlp.{linear}"
    tensors = {f"{key}.lora_a": torch.ones(4, 4, 64), f"{key}.lora_b": torch.ones(shape)}
    with pytest.raises(AdapterRejected, match=words):
        write(tiny_model("mixtral"), tmp_path, tensors).parse()
