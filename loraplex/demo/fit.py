"""The training loop: a causal language model learns to continue one text with another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100
BATCHES_SORTED = 16
REPORT_EVERY = 100


@dataclass(frozen=True, slots=True)
class Schedule:
    """AdamW steps with a linear warm-up and a cosine decay."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 40


def fit(
    model: torch.nn.Module,
    encoder: PreTrainedTokenizerBase,
    texts: Iterator[tuple[str, str]],
    schedule: Schedule,
    seed: int,
) -> None:
    """Train what is trainable, in place, to continue each pair's first text with the other."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    rate = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=schedule.warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps - schedule.warmup),
        ],
        milestones=[schedule.warmup],
    )
    model.train()
    began, losses = time.monotonic(), 0.0
    batches = islice(bucketed(texts, schedule.batch_size, Random(seed)), schedule.steps)
    for step, batch in enumerate(batches, start=1):
        input_ids, labels = encode(encoder, batch)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        rate.step()
        losses += loss.item()
        if step % REPORT_EVERY == 0:
            mean, seconds = losses / REPORT_EVERY, time.monotonic() - began
            print(f"  step {step}/{schedule.steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
            losses = 0.0
    model.eval()


def bucketed(
    texts: Iterator[tuple[str, str]], batch_size: int, rng: Random
) -> Iterator[list[tuple[str, str]]]:
    """Endless batches of pairs of similar length, so that little of a batch is padding."""
    while True:
        pairs = sorted(
            islice(texts, batch_size * BATCHES_SORTED), key=lambda pair: len(pair[0]) + len(pair[1])
        )
        batches = [pairs[at : at + batch_size] for at in range(0, len(pairs), batch_size)]
        rng.shuffle(batches)
        yield from batches


def encode(
    encoder: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both int64 [pairs, longest], padded right; only continuations have labels."""
    given = encoder([pair[0] for pair in pairs])["input_ids"]
    continued = encoder([pair[1] for pair in pairs], add_special_tokens=False)["input_ids"]
    width = max(len(head) + len(tail) + 1 for head, tail in zip(given, continued, strict=True))
    input_ids = torch.full((len(pairs), width), encoder.pad_token_id)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, (head, tail) in enumerate(zip(given, continued, strict=True)):
        tokens = torch.tensor([*head, *tail, encoder.eos_token_id])
        input_ids[row, : len(tokens)] = tokens
        labels[row, len(head) : len(tokens)] = tokens[len(head) :]
    return input_ids, labels
