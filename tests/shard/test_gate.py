"""Which models are served, and that the gate tells a leaking one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from loraplex.shard import gate, load
from loraplex.shard.batch import Batch, build_batch
from loraplex.shard.config import ShardConfig
from loraplex.shard.errors import ModelRefused

SERVED = [
    "llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3",
    "phi3", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe",
]  # fmt: skip


def config(directory: Path, **changes: object) -> ShardConfig:
    return ShardConfig(model=str(directory), device="cpu", kv_memory=1 << 20, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SERVED)
def test_serves_models_whose_attention_can_be_paged(kind: str, tiny_model: Callable[[str], Path]) -> None:
    loaded = load.load_model(config(tiny_model(kind)))
    assert loaded.vocab_size == 300
    assert [target.is_head for target in loaded.layout.linears].count(True) == 1
    assert len(loaded.layout.embeddings) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bloom", "AttentionInterface"),
        ("falcon", "AttentionInterface"),
        ("lfm2", "conv"),
        ("mamba", "keep"),
    ],
)
def test_refuses_by_name_what_cannot_be_packed(
    kind: str, reason: str, tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelRefused, match=reason):
        load.load_model(config(tiny_model(kind)))


def test_tells_attention_that_leaks_between_rows(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt reads the first prompt's blocks: the gate must see it."""

    def leaky(*args: Any, **kwargs: Any) -> Batch:
        batch = build_batch(*args, **kwargs)
        prompts = tuple(replace(prompt, blocks=prompt.blocks * 0 + 1) for prompt in batch.prompts)
        return replace(batch, prompts=prompts)

    monkeypatch.setattr(gate, "build_batch", leaky)
    with pytest.raises(ModelRefused, match="packed"):
        load.load_model(config(tiny_model("llama")))


def test_refuses_attention_arguments_it_does_not_know(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaAttention.forward

    def with_sinks(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        return original(self, *args, s_aux=torch.zeros(4), **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", with_sinks)
    with pytest.raises(ModelRefused, match="s_aux"):
        load.load_model(config(tiny_model("llama")))


def test_length_limit_keeps_batch_dependent_ropes_where_they_are_constant() -> None:
    long = Phi3Config(
        max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
            "original_max_position_embeddings": 1024,
        },
    )
    assert gate.length_limit(long, None) == 1024
    with pytest.raises(ModelRefused, match="1024"):
        gate.length_limit(long, 2048)
    assert gate.length_limit(LlamaConfig(max_position_embeddings=2048), None) == 2048
    assert gate.length_limit(LlamaConfig(max_position_embeddings=131072), None) == 8192
    assert gate.length_limit(LlamaConfig(max_position_embeddings=131072), 50000) == 50000


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="safetensors"):
        load.load_model(config(tmp_path))
    with pytest.raises(ModelRefused, match="neither a directory nor"):
        load.load_model(config(tmp_path / "no" / "such" / "folder"))


def test_refuses_a_kv_budget_below_one_block(tiny_model: Callable[[str], Path]) -> None:
    small = ShardConfig(model=str(tiny_model("llama")), device="cpu", kv_memory=1)
    with pytest.raises(ModelRefused, match="kv-memory"):
        load.load_model(small)
