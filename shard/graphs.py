"""Decode steps as captured CUDA graphs: a forward pass in one launch, whatever it serves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, takewhile

import torch
from tqdm import tqdm

from ..kernels.capture import Capture, Captured
from ..kernels.ops import Placed, Routing
from .batch import Batch, DecodeSegment
from .model import CausalModel, StepModel

log = logging.getLogger(__name__)

_NOTHING = Routing((), ())
_FIELDS = 4
"""Integers of a row beside its blocks: token, position, KV slot, length."""


class StepInputs:
    """The inputs of captured steps: at fixed places on the device, filled anew for each.

    Rows of padding write to the sink block and have nothing to attend to.
    """

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        self._max_blocks = max_blocks
        size = self._size(rows)
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._here = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._every_row = torch.arange(rows, device=device)

    def _size(self, rows: int) -> int:
        """Bytes of a step's inputs."""
        return rows * (_FIELDS * 8 + self._max_blocks * 4)

    def _views(self, buffer: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers [_FIELDS, rows] int64 and the block tables [rows, max_blocks] int32 of such a step."""
        cut = rows * _FIELDS * 8
        numbers = buffer[:cut].view(torch.int64).view(_FIELDS, rows)
        return numbers, buffer[cut : self._size(rows)].view(torch.int32).view(rows, self._max_blocks)

    def batch(self, rows: int) -> Batch:
        """The batch that a step of so many rows is captured with."""
        numbers, tables = self._views(self._there, rows)
        tokens, positions, kv_slots, lengths = numbers
        return Batch(
            token_ids=tokens,
            positions=positions,
            kv_slots=kv_slots,
            decode=DecodeSegment(tables, lengths),
            prompts=(),
            logit_rows=self._every_row[:rows],
            token_routing=_NOTHING,
            logit_routing=_NOTHING,
            samples=(),
            sample_rows=(),
            scored=(),
            row_count=rows,
        )

    def fill(self, batch: Batch, rows: int) -> None:
        """Bring a batch's decode rows to the device, padded to `rows`. The step before must have ended: the
        host's side is written over."""
        assert batch.decode is not None
        count, width = batch.decode.block_tables.shape
        numbers, tables = (view.numpy() for view in self._views(self._here, rows))
        columns = (batch.token_ids, batch.positions, batch.kv_slots, batch.decode.lengths)
        for line, values in zip(numbers, columns, strict=True):
            line[:count] = values.numpy()
            line[count:] = 0
        tables.fill(0)
        tables[:count, :width] = batch.decode.block_tables.numpy()
        size = self._size(rows)
        self._there[:size].copy_(self._here[:size], non_blocking=True)


@dataclass(frozen=True, slots=True)
class ReservedRouting:
    """Where captured steps find out which adapters their rows have."""

    placed: Placed
    fill: Callable[[Routing, int], bool]
    """Puts a routing, padded to so many rows, there. False, and nothing changes, where it does not fit."""


class StepGraphs:
    """Captured decode steps by (rows, whether any row has an adapter)."""

    def __init__(
        self, model: CausalModel, capture: Capture, inputs: StepInputs, reserved: ReservedRouting
    ) -> None:
        """`inputs`, `reserved`: room for the largest step."""
        self._model = model
        self._capture = capture
        self._inputs = inputs
        self._reserved = reserved
        self._graphs: dict[tuple[int, bool], Captured] = {}
        self._buckets: list[int] = []

    def capture(self, buckets: Sequence[int]) -> None:
        """Record every step, the largest first, so that the smaller ones find room in its memory. Where one
        cannot be recorded none is kept."""
        began, graphs = time.perf_counter(), {}
        for rows in tqdm(sorted(buckets, reverse=True), desc="capturing decode steps", disable=None):
            for adapters in (False, True):
                try:
                    graphs[rows, adapters] = self._record(rows, adapters)
                except RuntimeError as error:
                    log.warning("decode steps are not captured: %s", str(error).partition("\n")[0])
                    return
        self._graphs, self._buckets = graphs, sorted(buckets)
        log.info("captured %d decode steps in %.1f s", len(self._graphs), time.perf_counter() - began)

    def _record(self, rows: int, adapters: bool) -> Captured:
        batch, placed = self._inputs.batch(rows), self._reserved.placed if adapters else None

        def step() -> torch.Tensor:
            return self._model.forward_placed(batch, placed)

        step()
        return self._capture(step)

    def recorded(self, rows: int, adapters: bool) -> Captured:
        """One of the captured steps, which repeats whatever was replayed last."""
        return self._graphs[rows, adapters]

    def replay(self, batch: Batch) -> torch.Tensor | None:
        """Logits [rows, vocab] of decode rows alone, valid until the next step; None where no graph fits."""
        rows = next((bucket for bucket in self._buckets if bucket >= batch.row_count), None)
        if rows is None:
            return None
        adapters = bool(batch.token_routing.groups)
        if adapters and not self._reserved.fill(batch.token_routing, rows):
            return None
        self._inputs.fill(batch, rows)
        captured = self._graphs[rows, adapters]
        captured.replay()
        return captured.output[: batch.row_count]


class GraphedModel:
    """A StepModel that replays captured decode steps and runs everything else as it comes."""

    def __init__(
        self, inner: StepModel, graphs: StepGraphs, slots_are_plain: Callable[[Sequence[int]], bool]
    ) -> None:
        """`slots_are_plain`: whether these slots' adapters do nothing but what the operators do."""
        self._inner = inner
        self._graphs = graphs
        self._slots_are_plain = slots_are_plain

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        if (
            batch.decode is not None
            and not batch.prompts
            and self._slots_are_plain(batch.token_routing.slots)
        ):
            logits = self._graphs.replay(batch)
            if logits is not None:
                return logits
        return self._inner.forward(batch)


def with_graphs(
    model: StepModel, graphs: StepGraphs | None, slots_are_plain: Callable[[Sequence[int]], bool]
) -> StepModel:
    """A model as steps are run on it: with its captured steps, where it has any."""
    return model if graphs is None else GraphedModel(model, graphs, slots_are_plain)


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """Numbers of rows that steps are captured for: closer together where a row more costs more."""
    return (*takewhile(lambda bucket: bucket < rows, _steps()), rows)


def _steps() -> Iterator[int]:
    return chain((1, 2, 4), range(8, 64, 8), range(64, 128, 16), count(128, 32))
