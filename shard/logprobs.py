"""How probable the model finds a token, before penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .device import on_device

_CHUNK = 64
"""Positions worked on at once: bounds the working memory to some 20 bytes a vocabulary entry each."""

_LOW_BITS = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token under the model's own distribution."""

    logprob: float
    rank: int
    """1: the most probable. Equal logits rank by id, lowest first."""
    top_ids: tuple[int, ...]
    """The most probable tokens, in order of rank."""
    top_logprobs: tuple[float, ...]


def score(logits: torch.Tensor, targets: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Logprobs of one token for each row of logits.

    Args:
        logits: [rows, vocabulary], any float dtype.
        targets: the token of each row.
        counts: how many alternatives each row reports.

    A row whose logits are not finite has the logprob NaN.
    """
    results: list[TokenLogprobs] = []
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        results += _score_chunk(logits[part].float(), targets[part], counts[part])
    return results


def top_ids(values: torch.Tensor, k: int) -> torch.Tensor:
    """Ids [rows, k] of the largest values of each fp32 row, in order; equal values by id, lowest first.

    One integer a token orders by value and then by id, so that ties fall alike on every device.
    """
    bits = (values + 0.0).view(torch.int32)
    ascending = (bits >> 31).bitwise_and_(_LOW_BITS).bitwise_xor_(bits)
    ids = torch.arange(values.shape[1], device=values.device)
    keys = ascending.long().bitwise_left_shift_(32).bitwise_or_(_LOW_BITS - ids)
    return _LOW_BITS - (keys.topk(k, dim=-1).values & _LOW_BITS)


def _score_chunk(logits: torch.Tensor, targets: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    vocabulary = logits.shape[1]
    width = min(max(counts), vocabulary)
    target = on_device(torch.tensor(targets), logits.device).unsqueeze(1)
    logprobs = torch.log_softmax(logits, dim=-1)
    value = logits.gather(1, target)
    tied_before = (logits == value) & (torch.arange(vocabulary, device=logits.device) < target)
    rank = 1 + ((logits > value) | tied_before).sum(dim=-1, keepdim=True)
    best = top_ids(logits, width) if width else target[:, :0]
    # One transfer for all: a double holds ids and fp32 values alike.
    columns = (logprobs.gather(1, target), rank, best, logprobs.gather(1, best))
    packed = torch.cat([column.double() for column in columns], dim=1)
    return [
        TokenLogprobs(
            logprob=numbers[0],
            rank=int(numbers[1]),
            top_ids=tuple(int(token) for token in numbers[2 : 2 + min(count, width)]),
            top_logprobs=tuple(numbers[2 + width : 2 + width + min(count, width)]),
        )
        for numbers, count in zip(packed.tolist(), counts, strict=True)
    ]
