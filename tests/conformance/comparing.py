"""Served answers against references."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .bench import Made
from .serving import TOKENS, Answer, Ask, Use

TOLERANCE = 1e-4
"""Largest difference of any logprob in fp32."""
ALONE = 2e-5
"""Largest difference that neighbours in its batch may make to a row."""
_VISIBLE = 0.05


def expected_logprobs(made: Made, output: Sequence[int]) -> torch.Tensor:
    """What the reference says follows each token of prompt and output but the last: fp32 [n, vocabulary]."""
    return torch.log_softmax(made.reference.logits(made.prompt, output)[:-1].double(), -1).float()


def check_equal(answer: Answer, made: Made, label: str) -> None:
    """Every logprob of prompt and output is the reference's, and every token its greedy choice."""
    assert len(answer.tokens) == TOKENS
    expected = expected_logprobs(made, answer.tokens)
    difference = largest_difference(answer.logprobs, expected)
    assert difference <= TOLERANCE, f"{label}: a logprob is {difference:.1e} off"
    assert expected[len(made.prompt) - 1 :].argmax(-1).tolist() == answer.tokens, label


def check_same(answer: Answer, alone: Answer, label: str) -> None:
    """A row of a batch is what the row is alone."""
    assert answer.tokens == alone.tokens, label
    difference = largest_difference(answer.logprobs, alone.logprobs)
    assert difference <= ALONE, f"{label}: its neighbours change a logprob by {difference:.1e}"


def check_moves(answer: Answer, base: Answer, moves: bool, label: str) -> None:
    """Whether an adapter changes its row: `base` is the base's answer to the same prompt."""
    prompt = len(answer.logprobs) - TOKENS + 1
    difference = largest_difference(answer.logprobs[: prompt - 1], base.logprobs[: prompt - 1])
    assert (difference > _VISIBLE) == moves, f"{label}: it moves the base's logprobs by {difference:.1e}"


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two matrices of logprobs; a token that one of them does not know has minus infinity in the other."""
    width = max(first.shape[1], second.shape[1])
    one, two = (
        torch.nn.functional.pad(m, (0, width - m.shape[1]), value=-torch.inf) for m in (first, second)
    )
    return float(torch.where(one == two, 0.0, (one - two).abs()).nan_to_num(torch.inf).max())


def ask_for(made: Made, slots: Sequence[int], invocations: Sequence[Sequence[int]]) -> Ask:
    """The row that serves an adapter or a sum; what must be invoked applies from its last invocation on."""
    uses = []
    for (_, weight), slot, invocation in zip(made.adapters, slots, invocations, strict=True):
        start = last_occurrence(made.prompt, invocation) if invocation else 0
        if start is not None:
            uses.append(Use(slot, weight, start))
    return Ask(made.prompt, tuple(uses))


def last_occurrence(tokens: Sequence[int], sought: Sequence[int]) -> int | None:
    """Where `sought` last begins in `tokens`."""
    starts = range(len(tokens) - len(sought), -1, -1)
    return next((start for start in starts if [*tokens[start : start + len(sought)]] == [*sought]), None)
