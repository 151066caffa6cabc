"""How often a model's greedy answers are right, measured with transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from .tasks import Example, Task, render

MAX_NEW_TOKENS = 96


class Generating(Protocol):
    """A transformers model, bare or with adapters."""

    def generate(self, **inputs: Any) -> Any: ...


@torch.inference_mode()
def answers(model: Generating, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The model's greedy answers, all prompts in one left-padded batch."""
    batch = tokenizer([render(prompt) for prompt in prompts], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    new_tokens = output[:, batch["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def accuracy(
    model: Generating, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example]
) -> float:
    """The share of examples that the model gets right, 0 to 1."""
    outputs = answers(model, tokenizer, [example.prompt for example in examples])
    right = sum(task.is_right(example, output) for example, output in zip(examples, outputs, strict=True))
    return right / len(examples)
