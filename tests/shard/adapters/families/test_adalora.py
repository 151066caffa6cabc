"""AdaLoRA, before and after pruning, answers as PEFT does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loraplex.shard.errors import AdapterRejected

from .oracle import Directory, draw_small, logits, make

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
    "ignore:Adapter 'default'.*invalid shape",
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
)

_TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**fields: object) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_r": 6, "total_step": 10, "target_modules": _TARGETS} | fields)


def make_pruned(base: Path, path: Path, **fields: object) -> Directory:
    """As training leaves it: of each vector of singular values, a mask says what is kept."""
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(**fields))
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for name, parameter in wrapped.base_model.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = draw_small(parameter, generator)
        if "lora_E" in name:
            kept = int(torch.randint(0, 7, (1,), generator=generator))
            masks[name] = [True] * kept + [False] * (6 - kept)
    masks[next(iter(masks))] = [False] * 6
    masks[list(masks)[1]] = [False, True, False, True, True, False]
    wrapped.peft_config["default"].rank_pattern = masks
    wrapped.save_pretrained(path)
    return Directory(base, path)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("llama", {"lora_alpha": 16}),
        ("llama", {"lora_alpha": 0}),
        ("qwen2", {"lora_alpha": 4, "target_modules": "all-linear"}),
        ("gpt2", {"lora_alpha": 16, "target_modules": ["c_attn", "c_fc"]}),
    ],
)
def test_unpruned(
    model: str, fields: dict[str, object], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = make(tiny_model(model), tmp_path, config(**fields))
    adapter = directory.parse()
    assert (adapter.traits.kind, adapter.max_rank) == ("AdaLoRA as LoRA", 6)
    expected = directory.peft_logits()
    torch.testing.assert_close(directory.our_logits(), expected, rtol=0, atol=1e-4)
    assert (expected - logits(directory.model())).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [16, 0])
def test_pruned(alpha: int, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = make_pruned(tiny_model("llama"), tmp_path, lora_alpha=alpha)
    ranks = {placed.target.name: placed.rank for placed in directory.parse().placed}
    first = "model.layers.0.self_attn.q_proj"
    assert first not in ranks, "nothing is left of it"
    assert ranks["model.layers.0.self_attn.v_proj"] == 3
    assert len(set(ranks.values())) > 2
    torch.testing.assert_close(directory.our_logits(), directory.peft_logits(), rtol=0, atol=1e-4)


def test_a_rank_other_than_the_pattern_leaves(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = make_pruned(tiny_model("llama"), tmp_path)
    pattern = directory.config["rank_pattern"]
    pattern["model.layers.0.self_attn.v_proj.lora_E"] = [True] * 5 + [False]
    directory.rewrite(rank_pattern=pattern)
    with pytest.raises(AdapterRejected, match=r"v_proj\.lora_A has shape \[3, 64\].* need \[5, 64\]"):
        directory.parse()


def test_pruned_to_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = make_pruned(tiny_model("llama"), tmp_path)
    nothing = {key: [False] * 6 for key in directory.config["rank_pattern"]}
    tensors = {
        key: tensor[:, :0] if key.endswith("lora_B") else tensor[:0]
        for key, tensor in directory.tensors.items()
    }
    directory.rewrite({key: tensor.contiguous() for key, tensor in tensors.items()}, rank_pattern=nothing)
    with pytest.raises(AdapterRejected, match="pruned all of it"):
        directory.parse()


def test_a_missing_vector(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = make(tiny_model("llama"), tmp_path, config())
    tensors = directory.tensors
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_E"]
    with pytest.raises(AdapterRejected, match=r"down_proj\.lora_. has no lora_E beside it"):
        directory.rewrite(tensors).parse()


def test_rank_above_the_limit(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = make(tiny_model("llama"), tmp_path, config())
    with pytest.raises(AdapterRejected, match="has rank 6; the server was started with --max-rank 5"):
        directory.parse(max_rank=5)
