"""A vocabulary whose ids several ranks share: embeddings and logits of each are on one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .ranks import Ranks
from .split import Split

ELSEWHERE = 1 << 40
"""Stands for a token that another rank has: beyond every vocabulary."""


class VocabularyShare:
    """What one rank has of the vocabulary, and how ranks put theirs together."""

    def __init__(self, size: int, ranks: Ranks) -> None:
        """`size`: of the base's whole vocabulary."""
        self.size = size
        self._ranks = ranks
        self._rows = -(-size // ranks.size)
        self._first = ranks.rank * self._rows
        self._is_last = ranks.rank == ranks.size - 1

    @classmethod
    def of(cls, split: Split, held: int) -> VocabularyShare:
        """`held`: rows of the embedding or of the head that this rank has."""
        return cls(held if split.vocabulary is None else split.vocabulary.size, split.ranks)

    @property
    def is_whole(self) -> bool:
        return self._ranks.size == 1

    def local(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The place of each token among this rank's; ELSEWHERE for another's. Ids beyond the base's
        vocabulary, which adapters bring, are the last rank's."""
        if self.is_whole:
            return token_ids
        here = token_ids >= self._first
        if not self._is_last:
            here &= token_ids < self._first + self._rows
        return torch.where(here, token_ids - self._first, ELSEWHERE)

    def sum(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Each rank has the embeddings of its own tokens, and zeros for the others."""
        return self._ranks.sum(embeddings)

    def widths(self, total: int) -> Sequence[int]:
        """Logits that each rank has where there are `total` in all, at least as many as the base has."""
        equal = [min(self._rows, self.size - rank * self._rows) for rank in range(self._ranks.size)]
        return [*equal[:-1], equal[-1] + total - self.size]

    def width(self, total: int) -> int:
        """Logits that this rank has."""
        return self.widths(total)[self._ranks.rank]

    def join(self, logits: torch.Tensor, total: int) -> torch.Tensor:
        """Logits [rows, width(total)] of each rank as [rows, total] on every rank."""
        return logits if self.is_whole else self._ranks.join(logits, self.widths(total))
