"""All layers of a decoder's step in one call of the C++ extension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import _native
from .decoder_ops import Scores
from .device_tables import DeviceTable
from .native_decoder import UNSEEN
from .native_lora import NativeRouting
from .ops import SiteTable

_LINEAR = [(name, np.int64) for name in ("weight", "bias", "inputs", "outputs", "adapters")]
_LAYER = np.dtype(
    [
        ("input_norm", np.int64),
        ("post_norm", np.int64),
        ("input_eps", np.float64),
        ("post_eps", np.float64),
        *((name, _LINEAR) for name in ("qkv", "o", "gate_up", "down")),
        ("keys", np.int64),
        ("values", np.int64),
        ("scale", np.float64),
        ("softcap", np.float64),
        ("window", np.int64),
    ]
)
"""`Layer` in native/calls.h."""

if _LAYER.itemsize != _native.LAYER_BYTES:
    raise ImportError("the extension was built for layers of another shape: run `make setup` again")


@dataclass(frozen=True, slots=True)
class StackLinear:
    """Linears that share an input."""

    panels: torch.Tensor
    """As `native_linear.to_panels` makes them."""
    bias: torch.Tensor | None
    inputs: int
    outputs: int
    table: SiteTable
    """What adapters bring to them."""


@dataclass(frozen=True, slots=True)
class StackNorm:
    """An RMS norm."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class StackLayer:
    """One layer's pieces, all of bfloat16."""

    input_norm: StackNorm
    qkv: StackLinear
    o: StackLinear
    post_norm: StackNorm
    gate_up: StackLinear
    down: StackLinear
    keys: torch.Tensor
    values: torch.Tensor
    """[blocks, block_size, kv_heads, dim]."""
    scores: Scores

    @property
    def linears(self) -> tuple[StackLinear, ...]:
        return (self.qkv, self.o, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class StackInput:
    """What a step of T tokens brings."""

    residual: torch.Tensor
    """[T, hidden]: embeddings; changed to what the last layer adds to."""
    rotation: tuple[torch.Tensor, torch.Tensor]
    """Cosines and sines [T, dim]."""
    kv_slots: torch.Tensor
    """[T] int64: where each token's keys and values go, counted over all blocks."""
    tables: torch.Tensor
    """[T, width] int32: the blocks of each token's row; lines may lie apart."""
    lengths: torch.Tensor
    """[T] int64: how many tokens of its row each one sees, itself included."""
    placed: NativeRouting | None
    """The tokens' adapters; None: the base alone."""


class NativeStack:
    """Layers with what they need, where the extension reads it."""

    def __init__(self, layers: Sequence[StackLayer], heads: int) -> None:
        """`heads`: of queries. Raises ValueError where an adapters' table is not the extension's."""
        self._layers = layers
        self._heads = heads
        self._records = np.zeros(len(layers), _LAYER)
        for record, layer in zip(self._records, layers, strict=True):
            _fill(record, layer)
        tables = [linear.table for layer in layers for linear in layer.linears]
        self._tables = [table for table in tables if isinstance(table, DeviceTable)]
        if len(self._tables) < len(tables):
            raise ValueError("a site's adapters are not where the extension reads them")

    def run(self, step: StackInput) -> torch.Tensor:
        """Run every layer; answers what the last one adds to the residual [T, hidden]."""
        residual, first = step.residual, self._layers[0]
        rows, hidden = residual.shape
        _, block_size, kv_heads, dim = first.keys.shape

        def room(width: int) -> torch.Tensor:
            return torch.empty(rows, width, dtype=residual.dtype)

        added, normed, qkv = room(hidden), room(hidden), room(first.qkv.outputs)
        q, attended = room(self._heads * dim), room(self._heads * dim)
        gate_up, gated = room(first.gate_up.outputs), room(first.down.inputs)
        tasks = hidden_values = stride = 0
        if step.placed is not None:
            tasks, hidden_values = step.placed.tasks.data_ptr(), step.placed.hidden.data_ptr()
            stride = self._place_adapters(residual.dtype)
        _native.stack(
            self._records.ctypes.data,
            len(self._records),
            rows,
            hidden,
            self._heads,
            kv_heads,
            dim,
            block_size,
            residual.data_ptr(),
            added.data_ptr(),
            step.rotation[0].data_ptr(),
            step.rotation[1].data_ptr(),
            step.kv_slots.data_ptr(),
            step.tables.data_ptr(),
            step.tables.stride(0),
            step.lengths.data_ptr(),
            tasks,
            hidden_values,
            stride,
            *(each.data_ptr() for each in (normed, qkv, q, attended, gate_up, gated)),
        )
        return added

    def _place_adapters(self, dtype: torch.dtype) -> int:
        """Tell the records where their sites' tables are now, which move as adapters come; answers the bytes
        from one slot to the next."""
        addresses = []
        for table in self._tables:
            table.check(dtype)
            addresses.append(table.address if table else 0)
        for name, column in zip(("qkv", "o", "gate_up", "down"), range(4), strict=True):
            self._records[name]["adapters"] = addresses[column::4]
        return self._tables[0].arena.stride


def _fill(record: np.void, layer: StackLayer) -> None:
    """Write down everything that stays as it is."""
    for name, norm in (("input", layer.input_norm), ("post", layer.post_norm)):
        record[f"{name}_norm"], record[f"{name}_eps"] = norm.weight.data_ptr(), norm.eps
    for name, linear in zip(("qkv", "o", "gate_up", "down"), layer.linears, strict=True):
        bias = 0 if linear.bias is None else linear.bias.data_ptr()
        record[name] = (linear.panels.data_ptr(), bias, linear.inputs, linear.outputs, 0)
    scores = layer.scores
    record["keys"], record["values"] = layer.keys.data_ptr(), layer.values.data_ptr()
    record["scale"], record["softcap"] = scores.scale, scores.softcap or 0.0
    record["window"] = UNSEEN if scores.window is None else scores.window
