"""Attention over the paged cache, registered with transformers under a name of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from .batch import Batch, DecodeSegment, PromptSegment
from .errors import ModelRefused
from .kv import KvCache

NAME = "loraplex_paged"

SERVED = frozenset({"scaling", "sliding_window", "softcap"})
HARMLESS = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "return_dict"})
"""Arguments that say nothing a paged, causal, inference-time attention does not already know; so do
those that ask for further outputs (`output_…`)."""

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]


def register(function: AttentionFunction) -> None:
    """Make transformers call `function` for every layer of models set to attention NAME.

    Process-wide: the last function registered serves every such model, so a process runs one.
    """
    AttentionInterface.register(NAME, function)


@dataclass(frozen=True, slots=True)
class Options:
    """What a layer asks of its attention beside queries, keys and values."""

    scale: float
    window: int | None
    """How many newest tokens a query sees, itself included; None: all."""
    softcap: float | None
    """Scores s become softcap * tanh(s / softcap); None: as they are."""

    @classmethod
    def parse(cls, head_dim: int, kwargs: Mapping[str, Any]) -> Options:
        """Read the arguments that transformers passes. Raises ModelRefused for one that would change the
        result if it were ignored."""
        unknown = sorted(
            name
            for name, value in kwargs.items()
            if value is not None and name not in SERVED | HARMLESS and not name.startswith("output_")
        )
        if unknown:
            raise ModelRefused(
                f"this model's attention takes arguments that are not served: {', '.join(unknown)}"
            )
        scale = kwargs.get("scaling")
        return cls(
            scale=head_dim**-0.5 if scale is None else float(scale),
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
        )


class PagedAttention:
    """Writes a step's keys and values into the cache and attends over each row's own blocks.

    `batch` is set by the model before each forward pass. No mask comes from transformers: which keys a
    query sees follows from the positions and the layer's window.
    """

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._batch: Batch | None = None
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def begin(self, batch: Batch) -> None:
        """Attend over this batch until the next call."""
        self._batch = batch
        self._masks.clear()

    @property
    def batch(self) -> Batch:
        """What was begun last."""
        if self._batch is None:
            raise RuntimeError("no batch was begun")
        return self._batch

    def forward(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, heads, T, dim], key and value [1, kv_heads, T, dim] -> [1, T, heads, value_dim]."""
        options = Options.parse(query.shape[-1], kwargs)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self._kv.write(layer, self.batch.kv_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return self.attend(layer, query[0].transpose(0, 1), options).unsqueeze(0), None

    def attend(self, layer: int, q: torch.Tensor, options: Options) -> torch.Tensor:
        """q [T, heads, dim] over the cache, this step's keys and values included -> [T, heads, value_dim]."""
        batch = self.batch
        out = q.new_empty(*q.shape[:-1], self._kv.layer(layer)[1].shape[-1])
        if batch.decode is not None:
            rows = batch.decode.lengths.shape[0]
            self._decode(layer, out[:rows], q[:rows], batch.decode, options)
        if batch.prompts:
            self._prompts(layer, out, q, batch.prompts, options)
        return out

    def _mask(self, first: int, window: int | None, build: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The mask of the segment that begins at token `first`: the same in every layer with the same
        window, so built once a step."""
        if (first, window) not in self._masks:
            self._masks[first, window] = build()
        return self._masks[first, window]

    def _decode(
        self, layer: int, out: torch.Tensor, q: torch.Tensor, segment: DecodeSegment, options: Options
    ) -> None:
        """q [n, heads, dim]. Queries that share a KV head are passed as one group of rows."""
        keys, values = self._kv.read(layer, segment.block_tables)
        n, heads, dim = q.shape
        kv_heads, width = keys.shape[2], keys.shape[1]
        grouped = q.view(n, kv_heads, heads // kv_heads, dim)
        mask = self._mask(0, options.window, lambda: decode_mask(segment.lengths, width, options.window))
        attended = attend(grouped, keys.transpose(1, 2), values.transpose(1, 2), mask, options)
        out.copy_(attended.reshape(n, heads, -1))

    def _prompts(
        self,
        layer: int,
        out: torch.Tensor,
        q: torch.Tensor,
        prompts: Sequence[PromptSegment],
        options: Options,
    ) -> None:
        """q and out [T, heads, dim] of the whole step."""
        for segment in prompts:
            span = slice(segment.first, segment.first + segment.count)
            out[span] = self._prompt(layer, q[span], segment, options)

    def _prompt(self, layer: int, q: torch.Tensor, segment: PromptSegment, options: Options) -> torch.Tensor:
        """q [count, heads, dim] of one prompt, over its cached tokens and itself."""
        keys, values = self._kv.read(layer, segment.blocks)
        total = segment.start + segment.count
        kv_heads = keys.shape[1]
        grouped = q.transpose(0, 1).reshape(kv_heads, -1, *q.shape[::2])
        # The heads of a group see the same keys and values, which are not copied for each of them.
        k, v = (
            each[:total].transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1)
            for each in (keys, values)
        )
        mask = self._mask(segment.first, options.window, lambda: prompt_mask(segment, options.window))
        return attend(grouped, k, v, mask, options).flatten(0, 1).transpose(0, 1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, options: Options
) -> torch.Tensor:
    """softmax(softcap(scale * q k^T), over unmasked keys) v.

    q [n, heads, queries, dim], k and v [n, heads, keys, dim], mask broadcast to [n, heads, queries, keys].
    """
    if options.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * options.scale
    scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1).to(q.dtype), v)


def decode_mask(lengths: torch.Tensor, width: int, window: int | None) -> torch.Tensor:
    """[n, 1, 1, width]: True where a row's newest token, at lengths - 1, sees the key at that position."""
    positions = torch.arange(width, device=lengths.device)
    lengths = lengths[:, None]
    visible = positions < lengths
    if window is not None:
        visible &= positions >= lengths - window
    return visible[:, None, None, :]


def prompt_mask(segment: PromptSegment, window: int | None) -> torch.Tensor:
    """[count, start + count]: causal, at most `window` keys back, the query itself included."""
    device = segment.blocks.device
    queries = torch.arange(segment.start, segment.start + segment.count, device=device)[:, None]
    keys = torch.arange(segment.start + segment.count, device=device)[None, :]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return visible
