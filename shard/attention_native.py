"""Attention over the paged cache on a CPU by the C++ extension."""

from __future__ import annotations

import numpy as np
import torch

from ..kernels.decoder_ops import DecoderOps, Scores
from ..kernels.native_decoder import NativeDecoderOps
from .attention import Options, PagedAttention
from .batch import Batch
from .kv import KvCache


class NativeAttention(PagedAttention):
    """`PagedAttention` that reads each token's keys and values where they lie: one call serves decode
    rows and prompts, and a token's result does not depend on the chunk that it came in."""

    def __init__(self, kv: KvCache, ops: DecoderOps) -> None:
        super().__init__(kv)
        assert isinstance(ops, NativeDecoderOps)
        self._ops = ops
        self.tables = torch.empty(0, 0, dtype=torch.int32)
        self.lengths = torch.empty(0, dtype=torch.int64)
        """Of the batch that was begun last: see `every_token`."""

    def begin(self, batch: Batch) -> None:
        """Attend over this batch until the next call."""
        super().begin(batch)
        self.tables, self.lengths = every_token(batch)

    def attend(self, layer: int, q: torch.Tensor, options: Options) -> torch.Tensor:
        """As `PagedAttention.attend`."""
        cache = self._kv.layer(layer)
        if q.dtype not in self._ops.dtypes or cache[0].shape[-1] != cache[1].shape[-1]:
            return super().attend(layer, q, options)
        out = torch.empty(q.shape, dtype=q.dtype)
        scores = Scores(options.scale, options.window, options.softcap)
        self._ops.paged_attention(out, q.contiguous(), cache, self.tables, self.lengths, scores)
        return out


def every_token(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token of a batch, decode rows before prompts: the blocks [T, width] int32 of its row, and how
    many tokens [T] int64 of the row it sees, itself included."""
    decode = batch.decode
    if decode is not None and not batch.prompts:
        return decode.block_tables, decode.lengths
    tables = [] if decode is None else [decode.block_tables.numpy()]
    lengths = [] if decode is None else [decode.lengths.numpy()]
    for prompt in batch.prompts:
        tables.append(np.broadcast_to(prompt.blocks.numpy(), (prompt.count, len(prompt.blocks))))
        lengths.append(np.arange(prompt.start, prompt.start + prompt.count) + 1)
    wide = np.zeros((sum(map(len, tables)), max(table.shape[1] for table in tables)), np.int32)
    first = 0
    for table in tables:
        wide[first : first + len(table), : table.shape[1]] = table
        first += len(table)
    return torch.from_numpy(wide), torch.from_numpy(np.concatenate(lengths))
