"""The rows of running sequences: what a shard remembers of each between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.ops import Entries
from ..proto import shard_pb2 as pb
from .errors import BadPlan
from .sampling import RowSampling


@dataclass(slots=True, eq=False)
class Row:
    """One running sequence. Changed only on the device thread."""

    id: int
    sampling: RowSampling
    prompt_length: int
    spans: tuple[tuple[int, Entries], ...]
    """(first position, entries), ascending; before the first span the base alone applies."""
    prompt_logprobs: int | None
    """Alternatives beside each prompt token; None where the prompt's logprobs are not asked for."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and output so far; the newest sampled token, whose keys are not cached yet, is the last."""
    block_count: int = 0
    """Blocks in the row's line of the block table."""
    masked: bool = False
    """A stop id was sampled, or the logits were not finite: the row takes no part until it ends."""
    held_logits: torch.Tensor | None = None
    """[vocab]: of the last prompt token scored; its target comes with the next chunk."""

    @classmethod
    def from_proto(cls, start: pb.RowStart) -> Row:
        scored = start.output == pb.RowStart.PROMPT_LOGPROBS
        return cls(
            id=start.row,
            sampling=RowSampling.from_proto(start.sampling, start.seed)
            if start.HasField("sampling")
            else RowSampling(),
            prompt_length=start.prompt_length,
            spans=tuple(
                (span.start, tuple((e.slot, e.weight) for e in span.entries)) for span in start.spans
            ),
            prompt_logprobs=start.prompt_logprobs if scored else None,
        )

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt tokens of the next chunk still want logprobs."""
        return self.prompt_logprobs is not None

    @property
    def output_index(self) -> int:
        """Index of the next output token, counted over preemptions."""
        return len(self.tokens) - self.prompt_length

    def entries_between(self, start: int, end: int) -> list[Entries]:
        """The entry list of each position start .. end - 1."""
        if len(self.spans) == 1 and self.spans[0][0] <= start:
            return [self.spans[0][1]] * (end - start)
        result: list[Entries] = [()] * (end - start)
        for first, entries in self.spans:
            offset = max(first, start)
            result[offset - start :] = [entries] * max(0, end - offset)
        return result

    def last_entries(self) -> Entries:
        """The entry list of the newest positions: what rows are laid side by side by."""
        return self.spans[-1][1] if self.spans else ()


class RowTable:
    """Live rows by id, and their block tables as one array."""

    def __init__(self, capacity: int, max_blocks: int) -> None:
        """`max_blocks`: the most that one row can hold."""
        self.block_tables = np.zeros((capacity, max_blocks), dtype=np.int64)
        """[capacity, max_blocks]: a line for each row, padded with the sink block 0."""
        self._rows: dict[int, Row] = {}

    def __getitem__(self, row_id: int) -> Row:
        try:
            return self._rows[row_id]
        except KeyError:
            raise BadPlan(f"row {row_id} is not running") from None

    def __len__(self) -> int:
        return len(self._rows)

    def start(self, row: Row) -> None:
        """Add a row, without blocks."""
        if row.id in self._rows:
            raise BadPlan(f"row {row.id} is already running")
        if row.id >= len(self.block_tables):
            raise BadPlan(f"row {row.id} is above the limit of {len(self.block_tables)} rows")
        self.block_tables[row.id] = 0
        self._rows[row.id] = row

    def extend(self, row_id: int, blocks: Sequence[int]) -> None:
        """Append blocks to a row's table."""
        row = self[row_id]
        end = row.block_count + len(blocks)
        if end > self.block_tables.shape[1]:
            raise BadPlan(f"row {row_id} cannot hold {end} blocks")
        self.block_tables[row_id, row.block_count : end] = blocks
        row.block_count = end

    def end(self, row_id: int) -> None:
        if self._rows.pop(row_id, None) is None:
            raise BadPlan(f"row {row_id} is not running")

    def clear(self) -> None:
        self._rows.clear()
