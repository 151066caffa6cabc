"""Layouts of tiny models, and adapter files made by hand."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.changes import Change, ParsedAdapter
from loraplex.shard.adapters.layout import AdapterLayout, Target
from loraplex.shard.attention import PagedAttention
from loraplex.shard.kv import KvCache
from loraplex.shard.model import Specialised, specialise
from loraplex.shard.trace import trace


def specialised(model: torch.nn.Module, *, max_rank: int = 64, blocks: int = 2) -> Specialised:
    """A copy of a transformers model as a shard serves it, with blocks of 16 tokens for keys and values."""
    copied = copy.deepcopy(model)
    seen = trace(copied)
    dtype = next(copied.parameters()).dtype
    kv = KvCache(seen.layers, blocks=blocks, block_size=16, dtype=dtype, device=torch.device("cpu"))
    return specialise(copied, seen, attention=PagedAttention(kv), ops=CpuLoraOps(), max_rank=max_rank)


def layout_of(model: torch.nn.Module, *, dtype: str = "float32", max_rank: int = 64) -> AdapterLayout:
    """What adapters can change in a transformers model; weights are packed as `dtype`."""
    return replace(specialised(model, max_rank=max_rank).layout, dtype=dtype)


def base_of(model: torch.nn.Module) -> BaseTensors:
    """The weights of a transformers model as readers of adapters ask for them."""
    return BaseTensors(specialised(model).parameters)


def changes_of(adapter: ParsedAdapter) -> dict[str, Change]:
    """Every change of an adapter that makes one to each of its targets, by the target's name."""
    changes = {placed.target.name: placed.build() for placed in adapter.placed}
    assert len(changes) == len(adapter.placed)
    return changes


TOY = AdapterLayout(
    linears=(
        Target("model.layers.0.self_attn.q_proj", 0, 8, 8, 0),
        Target("model.layers.0.self_attn.k_proj", 0, 8, 4, 8),
        Target("model.layers.0.self_attn.v_proj", 0, 8, 4, 12),
        Target("model.layers.0.mlp.down_proj", 1, 6, 8, 0),
    ),
    other_modules=("model.embed_tokens", "model.norm"),
    dtype="float32",
    max_rank=4,
)
"""Four linears at two sites."""


def held(tensors: Mapping[str, torch.Tensor]) -> BaseTensors:
    """A base of these weights."""
    return BaseTensors({name: (lambda value=value: value) for name, value in tensors.items()})


TOY_BASE = held(
    {
        f"{target.name}.weight": torch.linspace(-1, 1, target.in_features * target.out_features).view(
            target.out_features, target.in_features
        )
        for target in TOY.linears
    }
)
"""The weights of the base that TOY describes."""

NO_WEIGHTS = BaseTensors({})
"""A base for adapters that never ask for its weights."""

Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = "base_model.model.model.layers.0.self_attn.v_proj"


def config_bytes(**fields: Any) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields).encode()


def toy_tensors(rank: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """LoRA on q and v of TOY."""
    random = np.random.default_rng(seed)
    return {
        f"{Q}.lora_A.weight": random.standard_normal((rank, 8), np.float32),
        f"{Q}.lora_B.weight": random.standard_normal((8, rank), np.float32),
        f"{V}.lora_A.weight": random.standard_normal((rank, 8), np.float32),
        f"{V}.lora_B.weight": random.standard_normal((4, rank), np.float32),
    }


def weights_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    return save(dict(tensors))


def toy_files(seed: int = 0) -> dict[str, bytes]:
    """A small valid adapter for TOY, by file name."""
    return {
        "adapter_config.json": config_bytes(),
        "adapter_model.safetensors": weights_bytes(toy_tensors(seed=seed)),
    }


def raw_safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with exactly this header, valid or not. Header: bytes, or anything JSON can say."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def mentions(message: str, *words: str) -> bool:
    """Whether every word occurs in a message."""
    return all(re.search(re.escape(word), message) for word in words)
