"""Tiny random models and PEFT adapters, as directories like those on a hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 300
_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": 297,
}


def _config(cls: type[PreTrainedConfig], drop: tuple[str, ...] = (), **extra: Any) -> PreTrainedConfig:
    return cls(**({k: v for k, v in _LLAMA_LIKE.items() if k not in drop} | extra))


CONFIGS: Mapping[str, PreTrainedConfig] = {
    "llama": _config(LlamaConfig),
    "qwen2": _config(Qwen2Config),
    "qwen3": _config(Qwen3Config, head_dim=16),
    "mistral": _config(MistralConfig, sliding_window=8),
    "gemma2": _config(Gemma2Config, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": _config(Gemma3TextConfig, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "phi3": _config(Phi3Config),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=298, eos_token_id=299
    ),
    "gpt_neox": _config(GPTNeoXConfig, drop=("num_key_value_heads",)),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=298,
        eos_token_id=299,
    ),
    "mixtral": _config(MixtralConfig, num_local_experts=4),
    "qwen3_moe": _config(
        Qwen3MoeConfig, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40
    ),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
    "lfm2": _config(Lfm2Config, layer_types=["conv", "full_attention", "conv"]),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2),
    "llama_tied": _config(LlamaConfig, tie_word_embeddings=True, eos_token_id=[299, 296]),
    "falcon": FalconConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=298,
        eos_token_id=299,
    ),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens 0 .. 255, so that any text encodes and any id decodes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATE)


def build_model(kind: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of this kind with a byte tokenizer; weights large enough that adapters show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
        if parameter.dim() == 1:
            parameter.data += 0.5
    model.to(dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class AdapterRecipe:
    """One PEFT adapter to make: LoraConfig arguments."""

    rank: int
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    extra: Mapping[str, Any] = field(default_factory=dict)


def build_adapter(base: Path, directory: Path, recipe: AdapterRecipe, *, seed: int) -> Path:
    """Write a PEFT adapter with random A and B for the model at `base`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    targets = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **{"fan_in_fan_out": model.config.model_type == "gpt2", **recipe.extra},
    )
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(wrapped.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (
                0.5 / parameter.shape[-1] ** 0.5
            )
    wrapped.save_pretrained(directory, save_embedding_layers="lm_head" in targets)
    return directory
