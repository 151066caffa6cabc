"""The processes that hold one copy of a model between them, and what they tell each other in a step.

Every rank makes the same calls in the same order, since every rank runs the same plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..adapters.norms import Board
from ..errors import RanksLost


class Ranks(Protocol):
    """The group, from one of its ranks."""

    @property
    def rank(self) -> int:
        """This one's number, from 0."""
        ...

    @property
    def size(self) -> int: ...

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x; may overwrite it. The same bits on every rank."""
        ...

    def join(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """Every rank's x [rows, widths[rank]] side by side, on every rank."""
        ...

    def from_first(self, values: torch.Tensor) -> None:
        """Overwrite a tensor on the CPU with rank 0's."""
        ...

    def least(self, number: int) -> int:
        """The smallest of every rank's numbers."""
        ...


class Alone:
    """`Ranks` of a process that holds the whole model."""

    rank = 0
    size = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def join(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return x

    def from_first(self, values: torch.Tensor) -> None:
        """They are its own."""

    def least(self, number: int) -> int:
        return number


class ProcessGroup:
    """`Ranks` over torch.distributed: gloo for tensors on the CPU, NCCL on GPUs.

    Every call raises RanksLost where the others have gone.
    """

    def __init__(self, rank: int, size: int, board: Board) -> None:
        """Of a process that has joined; see `meeting.meet`. `board`: for what has no place among steps."""
        self.rank = rank
        self.size = size
        self.board = board
        self.calls: Counter[str] = Counter()
        """Collectives so far, by kind."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        with self._collective("sum"):
            dist.all_reduce(x)
        return x

    def join(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        widest = max(widths)
        padded = F.pad(x, (0, widest - x.shape[1])) if x.shape[1] < widest else x.contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._collective("join"):
            dist.all_gather(parts, padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def from_first(self, values: torch.Tensor) -> None:
        with self._collective("from_first"):
            dist.broadcast(values, src=0)

    def least(self, number: int) -> int:
        value = torch.tensor(number)
        with self._collective("least"):
            dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return int(value)

    @contextmanager
    def _collective(self, kind: str) -> Iterator[None]:
        """Count one. Raises RanksLost where it fails: a rank has gone, or keeps others waiting too long."""
        self.calls[kind] += 1
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RanksLost(f"rank {self.rank} of {self.size} lost another rank: {reason}") from error
