"""Sampling of a group: rank 0 draws, the others learn what it drew."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sampling import Sampled, Sampler, SampleRow, TokenLogprobs
from .ranks import Ranks

NO_TOKEN = -1


class GroupSampler:
    """`Sampler` of one rank of several. Logprobs are rank 0's alone: nobody reads the others' answers."""

    def __init__(self, sampler: Sampler, ranks: Ranks) -> None:
        self._sampler = sampler
        self._ranks = ranks

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """As `Sampler.sample`."""
        tokens = torch.full((len(rows),), NO_TOKEN)
        drawn: list[Sampled] = []
        if self._ranks.rank == 0:
            drawn = self._sampler.sample(logits, rows)
            tokens = torch.tensor([NO_TOKEN if each.token is None else each.token for each in drawn])
        self._ranks.from_first(tokens)
        return drawn or [Sampled(None if token == NO_TOKEN else token, None) for token in tokens.tolist()]

    def prompt_logprobs(self, logits: torch.Tensor, targets: Sequence[int], k: int) -> list[TokenLogprobs]:
        """As `Sampler.prompt_logprobs`."""
        return self._sampler.prompt_logprobs(logits, targets, k) if self._ranks.rank == 0 else []
