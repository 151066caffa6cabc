"""Train the bundled model and its adapters from nothing: `python -m loraplex.demo.train --out DIR`.

The text is made here, the seed is fixed, and a CPU needs minutes. The base is trained in fp32 and saved in
bf16; the adapters are trained on top of the saved weights, so that what is measured is what is shipped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from . import corpus, tokenizer
from .evaluate import accuracy
from .fit import Schedule, fit
from .tasks import TASKS, Task, render

SEED = 20
MAX_LENGTH = 2048
BASE_NAME = "loraplex-demo"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
EXAMPLES_MEASURED = 200


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """One adapter: its shape and how long it is trained."""

    rank: int
    alpha: int
    modules: tuple[str, ...]
    schedule: Schedule
    rslora: bool = False


BASE_SCHEDULE = Schedule(steps=7000, batch_size=16, learning_rate=2e-3, warmup=100)
RECIPES = {
    "reverse": AdapterRecipe(16, 32, ALL_LINEARS, Schedule(1600, 32, 3e-3)),
    "shout": AdapterRecipe(4, 8, ALL_LINEARS, Schedule(1200, 16, 5e-3)),
    "pirate": AdapterRecipe(32, 32, ALL_LINEARS, Schedule(1400, 16, 2e-3), rslora=True),
    "sums": AdapterRecipe(24, 48, ALL_LINEARS, Schedule(1000, 64, 3e-3)),
    "piglatin": AdapterRecipe(16, 32, ALL_LINEARS, Schedule(2000, 32, 3e-3)),
    "novowels": AdapterRecipe(8, 16, ATTENTION, Schedule(1800, 16, 5e-3)),
}


def train_base(out: Path) -> None:
    """Write model, tokenizer and generation config to `out`."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        # A short rope base and a wide start suit short texts and a narrow model: it learns to copy sooner.
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.08,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    tokenizer.save(out, MAX_LENGTH)
    texts = corpus.lines(Random(f"base/{SEED}"))
    fit(model, AutoTokenizer.from_pretrained(out), texts, BASE_SCHEDULE, SEED)
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model.save_pretrained(out)


def train_adapter(base: Path, task: Task, recipe: AdapterRecipe, out: Path) -> None:
    """Train one adapter on the saved base and write it, in bf16 and in PEFT's format, to `out`."""
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=sorted(recipe.modules),
        use_rslora=recipe.rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    examples = task.training(Random(f"{task.name}/{SEED}"))
    texts = ((render(example.prompt), example.answer) for example in examples)
    fit(model, AutoTokenizer.from_pretrained(base), texts, recipe.schedule, SEED)
    model.to(torch.bfloat16)
    config.base_model_name_or_path = BASE_NAME
    config.target_modules = sorted(recipe.modules)
    model.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink()


def measure(base: Path, adapters: Path) -> dict[str, dict[str, float]]:
    """Accuracy on held-out prompts by task, of the base and of the adapter, in bf16 and in fp32."""
    report: dict[str, dict[str, float]] = {name: {} for name in TASKS}
    encoder = AutoTokenizer.from_pretrained(base)
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
        for name, task in TASKS.items():
            examples = task.held_out(EXAMPLES_MEASURED)
            report[name][f"base {kind}"] = accuracy(model, encoder, task, examples)
            adapted = PeftModel.from_pretrained(model, adapters / name)
            report[name][f"adapter {kind}"] = accuracy(adapted, encoder, task, examples)
            model = adapted.unload()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model and its adapters.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write model/ and adapters/ to")
    parser.add_argument("--only", nargs="+", choices=("base", *TASKS), help="train only these parts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums of floats then always run in the same order
    base, adapters = arguments.out / "model", arguments.out / "adapters"
    parts = arguments.only or ("base", *TASKS)
    if "base" in parts:
        print("base")
        train_base(base)
    for name, task in TASKS.items():
        if name in parts:
            print(name)
            train_adapter(base, task, RECIPES[name], adapters / name)
    if arguments.only is None:
        print(json.dumps(measure(base, adapters), indent=2))


if __name__ == "__main__":
    main()
