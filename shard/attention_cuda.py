"""Attention over the paged cache on a GPU: decode rows by our kernel, prompts by FlashAttention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import varlen

from ..kernels.cuda_decoder import HALVES, PLAIN_DIM, CudaDecoderOps, attention_room, splits_of
from ..kernels.decoder_ops import Scores
from .attention import Options, PagedAttention
from .batch import Batch, DecodeSegment, PromptSegment
from .device import send
from .kv import KvCache


@dataclass(frozen=True, slots=True)
class Packed:
    """The prompts of one step, one behind the other."""

    first: int
    """Index in the step of their first token; they reach to the step's end."""
    kv_slots: torch.Tensor
    """[keys] int64: where their keys and values lie in the cache, from each prompt's first token on."""
    query_ends: torch.Tensor
    """[prompts + 1] int32: 0, then where each prompt's queries end."""
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int


VarlenAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed, Options], torch.Tensor]
"""(q [queries, heads, dim], k and v [keys, kv_heads, dim], packed, options) -> [queries, heads, dim]. The
last query of a prompt sees all of its keys, each earlier one a key less."""


def flash_attention() -> VarlenAttention:
    """torch's, whose arguments differ from version to version."""
    known = inspect.signature(varlen.varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, options: Options
    ) -> torch.Tensor:
        back = -1 if options.window is None else options.window - 1
        result = varlen.varlen_attn(
            q,
            k,
            v,
            packed.query_ends,
            packed.key_ends,
            packed.longest_query,
            packed.longest_key,
            scale=options.scale,
            window_size=(back, 0),
            **grouped,
        )
        assert isinstance(result, torch.Tensor)
        return result

    return attend


class CudaAttention(PagedAttention):
    """`PagedAttention` by kernels. Room for decode rows is taken once, for the largest step."""

    def __init__(
        self,
        kv: KvCache,
        ops: CudaDecoderOps,
        varlen_attention: VarlenAttention,
        *,
        rows: int,
        max_blocks: int,
    ) -> None:
        """`rows`, `max_blocks`: what a step's block tables hold at most."""
        super().__init__(kv)
        self._ops = ops
        self._varlen = varlen_attention
        self._rows = rows
        self._max_blocks = max_blocks
        self._room: torch.Tensor | None = None
        self._packed: Packed | None = None

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._packed = None

    def _decode(
        self, layer: int, out: torch.Tensor, q: torch.Tensor, segment: DecodeSegment, options: Options
    ) -> None:
        cache = self._kv.layer(layer)
        if cache[0].shape[-1] != cache[1].shape[-1] or cache[0].shape[-1] > PLAIN_DIM:
            super()._decode(layer, out, q, segment, options)
            return
        scores = Scores(options.scale, options.window, options.softcap)
        room = self._room_for(q)
        self._ops.decode_attention(
            out, q.contiguous(), cache, segment.block_tables, segment.lengths, room, scores
        )

    def _prompts(
        self,
        layer: int,
        out: torch.Tensor,
        q: torch.Tensor,
        prompts: Sequence[PromptSegment],
        options: Options,
    ) -> None:
        keys, values = self._kv.layer(layer)
        if not _can_flash(keys, values, options):
            super()._prompts(layer, out, q, prompts, options)
            return
        if self._packed is None:
            self._packed = pack(prompts, self._kv.block_size)
        packed = self._packed
        k = keys.flatten(0, 1).index_select(0, packed.kv_slots)
        v = values.flatten(0, 1).index_select(0, packed.kv_slots)
        out[packed.first :].copy_(self._varlen(q[packed.first :], k, v, packed, options))

    def _room_for(self, q: torch.Tensor) -> torch.Tensor:
        splits = splits_of(self._max_blocks, self._kv.block_size)
        needed = attention_room(self._rows, q.shape[1], q.shape[2], splits)
        if self._room is None or self._room.numel() < needed:
            self._room = torch.empty(needed, dtype=torch.float32, device=q.device)
        return self._room


def _can_flash(keys: torch.Tensor, values: torch.Tensor, options: Options) -> bool:
    dim = keys.shape[-1]
    is_served = keys.dtype in HALVES and dim % 8 == 0 and dim <= 256 and dim == values.shape[-1]
    return is_served and options.softcap is None


def pack(prompts: Sequence[PromptSegment], block_size: int) -> Packed:
    """The prompts of a step, which lie one behind the other at its end.

    The host waits for nothing: what it knows goes to the device in one copy.
    """
    device = prompts[0].blocks.device
    counts = np.array([prompt.count for prompt in prompts])
    totals = counts + [prompt.start for prompt in prompts]
    rooms = np.array([len(prompt.blocks) for prompt in prompts]) * block_size
    gaps = np.cumsum(rooms - totals) - (rooms - totals)
    tokens = np.arange(totals.sum()) + np.repeat(gaps, totals)
    host = [torch.from_numpy(tokens), _ends(counts), _ends(totals)]
    used, query_ends, key_ends = send(host, device)
    blocks = torch.cat([prompt.blocks for prompt in prompts])
    slots = blocks[:, None] * block_size + torch.arange(block_size, device=device)
    return Packed(
        first=prompts[0].first,
        kv_slots=slots.flatten().index_select(0, used),
        query_ends=query_ends,
        key_ends=key_ends,
        longest_query=int(counts.max()),
        longest_key=int(totals.max()),
    )


def _ends(counts: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32))
