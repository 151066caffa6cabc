"""The base models of the matrix: tiny, random, fp32; written once, copied afresh for every reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from .. import tiny

_SHAPE = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": 297,
}

CONFIGS: Mapping[str, PreTrainedConfig] = {
    **tiny.CONFIGS,
    "llama_wide": LlamaConfig(**(_SHAPE | {"hidden_size": 96, "head_dim": 24})),
    "gemma": GemmaConfig(**_SHAPE),
    "qwen3_moe": Qwen3MoeConfig(
        **_SHAPE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True
    ),
}


class Base:
    """One base: its directory, and copies of it for PEFT to change."""

    def __init__(self, name: str, directory: Path) -> None:
        """Write the model with weights large enough that adapters show, unless the directory is there."""
        self.name = name
        self.directory = directory
        if not directory.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.12)
                if parameter.dim() == 1:
                    parameter.data += 0.5
            model.save_pretrained(directory)
            tiny.tokenizer().save_pretrained(directory)

    @cached_property
    def _model(self) -> nn.Module:
        # Eager attention: others leave Gemma's soft cap out.
        return AutoModelForCausalLM.from_pretrained(
            self.directory, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def fresh(self) -> nn.Module:
        """A copy that nothing has changed."""
        return copy.deepcopy(self._model)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer, to add tokens to."""
        return tiny.tokenizer()
