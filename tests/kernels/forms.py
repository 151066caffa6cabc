"""The forms in which the CPU's operators are computed, for tests that all of them must pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import EmbeddingLora, Entries, LoraOps, LoraWeights, route

try:
    from loraplex.kernels import _native
except ImportError:  # an install without a compiler
    LEVELS: tuple[str, ...] = ()
else:
    LEVELS = _native.levels()


@dataclass(frozen=True)
class Form:
    """One form, on tables that are made for each call."""

    ops: LoraOps

    def add_to(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        entries: Sequence[Entries],
        table: Mapping[int, LoraWeights],
        *,
        linears: int = 1,
        shares: int = 1,
    ) -> None:
        """What every row's adapters bring to `y`, in place. `linears`: of the site."""
        resident = self.ops.site_table([1] * linears, shares=shares)
        resident.update(table)
        self.ops.start_lora(x, self.ops.place(route(entries), shares=shares), resident).add_to(y)

    def add_embedding(
        self,
        e: torch.Tensor,
        tokens: torch.Tensor,
        entries: Sequence[Entries],
        table: Mapping[int, EmbeddingLora],
    ) -> None:
        resident = self.ops.embedding_table()
        resident.update(table)
        self.ops.add_embedding(e, tokens, self.ops.place(route(entries)), resident)


@contextmanager
def using(level: str) -> Iterator[None]:
    """Have the extension use one set of instructions."""
    _native.use(level)
    try:
        yield
    finally:
        _native.use(LEVELS[0])


@contextmanager
def form_named(name: str) -> Iterator[Form]:
    """torch's form, or the extension's with one set of instructions."""
    if name == "torch":
        yield Form(CpuLoraOps())
        return
    from loraplex.kernels.native_lora import NativeLoraOps

    with using(name):
        yield Form(NativeLoraOps())
