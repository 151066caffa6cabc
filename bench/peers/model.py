"""Generates the model and the adapters that every server is measured with.

A Llama of 87.8 million random parameters in bfloat16, and LoRA adapters on all seven projections as PEFT
saves them. The same seed writes the same bytes.

    python -m bench.peers.model DIR [--adapters 16] [--ranks 8,16,32,64]

writes DIR/base and DIR/a0, DIR/a1, … whose ranks go through the list in turn; what is there already stays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from . import tokenizer

SHAPE = LlamaConfig(
    vocab_size=8000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
RANKS = (8, 16, 32, 64)
WEIGHT_STD = 0.02
"""Of A and B alike: below rank 256 a delta stays smaller than the output that it is added to."""


def projections(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The seven linear modules of a layer: (inputs, outputs) by path below the layer."""
    assert config.num_key_value_heads is not None
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden // config.num_attention_heads * config.num_key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, narrow),
        "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def write_base(directory: Path, config: LlamaConfig, seed: int) -> None:
    """Save a random model with its tokenizer; the generator of random numbers is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(directory)
    tokenizer.save(directory, config.vocab_size, config.max_position_embeddings)


def write_adapter(directory: Path, config: LlamaConfig, rank: int, seed: int) -> None:
    """Save LoRA of one rank on every projection: A [rank, inputs], B [outputs, rank], bfloat16, scale 2."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config.num_hidden_layers):
        for path, (inputs, outputs) in projections(config).items():
            module = f"base_model.model.model.layers.{layer}.{path}"
            for part, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
                values = torch.randn(shape, generator=random) * WEIGHT_STD
                tensors[f"{module}.{part}.weight"] = values.to(torch.bfloat16)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [path.rpartition(".")[2] for path in projections(config)],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def write_all(
    directory: Path, adapters: int, ranks: Sequence[int], config: LlamaConfig = SHAPE, seed: int = 0
) -> None:
    """Write what is missing of the base and of a0 to a{adapters - 1}.

    A part counts as there once its last file is: an interrupted run is simply run again.
    """
    base = directory / "base"
    if not (base / "tokenizer.json").exists():
        write_base(base, config, seed)
    for index in range(adapters):
        adapter = directory / f"a{index}"
        if not (adapter / "adapter_config.json").exists():
            write_adapter(adapter, config, ranks[index % len(ranks)], seed + 1 + index)


def parse_ranks(text: str) -> tuple[int, ...]:
    """`8,16` as numbers. Raises ArgumentTypeError for anything but a list of ranks."""
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        ranks = ()
    if not ranks or min(ranks) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ranks; write numbers such as 8,16,32,64")
    return ranks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--ranks", type=parse_ranks, default=RANKS)
    options = parser.parse_args(arguments)
    try:
        write_all(options.directory, options.adapters, options.ranks)
    except OSError as error:
        print(f"model: {options.directory} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{options.directory}: base and {options.adapters} adapters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
