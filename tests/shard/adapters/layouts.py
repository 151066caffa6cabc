"""Layouts of tiny models, and adapter files made by hand."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from transformers.pytorch_utils import Conv1D

from loraplex.shard.adapters.digest import weight_digest
from loraplex.shard.adapters.layout import AdapterLayout, BaseWeight, Target

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def layout_of(model: torch.nn.Module, *, dtype: str = "float32", max_rank: int = 64) -> AdapterLayout:
    """Every linear of a transformers model; q/k/v and gate/up share a site."""
    sites: dict[tuple[str, str], int] = {}
    widths: dict[int, int] = {}
    targets, others = [], []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D):
            if next(module.parameters(recurse=False), None) is not None:
                others.append(name)
            continue
        parent, _, leaf = name.rpartition(".")
        group = next((group[0] for group in _SHARED_INPUT if leaf in group), leaf)
        site = sites.setdefault((parent, group), len(sites))
        transposed = isinstance(module, Conv1D)
        out_features, in_features = module.weight.shape[::-1] if transposed else module.weight.shape
        offset = widths.get(site, 0)
        widths[site] = offset + out_features
        targets.append(Target(name, site, in_features, out_features, offset, transposed))
    head = model.get_output_embeddings().weight.detach().to(getattr(torch, dtype)).contiguous()
    digest = weight_digest(head.view(torch.uint8).numpy().tobytes())
    return AdapterLayout(tuple(targets), tuple(others), dtype, max_rank, (BaseWeight("lm_head", digest),))


TOY = AdapterLayout(
    targets=(
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
