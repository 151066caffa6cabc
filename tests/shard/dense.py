"""Adapters made of changes, run in two ways: in a shard's sites, and merged into a copy of the model."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraplex.kernels.ops import Entries
from loraplex.proto import shard_pb2 as pb
from loraplex.shard.adapters.assemble import assemble
from loraplex.shard.adapters.changes import (
    AnyTarget,
    Change,
    EmbeddingChange,
    LinearChange,
    ModuleChange,
    ParsedAdapter,
    Placed,
    Rows,
    Traits,
)
from loraplex.shard.adapters.floats import Float32
from loraplex.shard.adapters.layout import AdapterLayout
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import PackedAdapter
from loraplex.shard.batch import build_batch
from loraplex.shard.model import Specialised
from loraplex.shard.rows import Row, RowTable

from .adapters.layouts import specialised

BLOCK = 16
CPU = torch.device("cpu")

Changes = dict[str, Change]
"""By module."""


def target_of(layout: AdapterLayout, name: str) -> AnyTarget:
    every = (*layout.linears, *layout.embeddings, *layout.modules)
    return next(target for target in every if target.name == name)


def packed(layout: AdapterLayout, changes: Changes) -> PackedAdapter:
    """These changes as the adapter that a shard loads."""
    placed = tuple(
        Placed(target_of(layout, name), 1, lambda change=change: change)  # type: ignore[misc]
        for name, change in changes.items()
    )
    file = io.BytesIO()
    index = assemble(ParsedAdapter(placed, Traits(kind="test")), file, layout.dtype)
    return PackedAdapter(index, torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))


@dataclass
class Shard:
    """A model as it is served, with its resident adapters."""

    special: Specialised
    pool: AdapterPool

    @classmethod
    def of(cls, model: nn.Module) -> Shard:
        special = specialised(model, blocks=64)
        return cls(special, AdapterPool(special.sites, slots=16, budget=1 << 30))

    def load(self, slot: int, changes: Changes) -> None:
        self.pool.load(slot, str(slot), packed(self.special.layout, changes))

    def logits(self, prompts: Sequence[Sequence[int]], row_entries: Sequence[Entries]) -> list[torch.Tensor]:
        """All logits [tokens, vocab of the batch] of each prompt, from one packed batch."""
        rows, plan, block = RowTable(len(prompts), 8), pb.StepPlan(), 1
        for index, (prompt, entries) in enumerate(zip(prompts, row_entries, strict=True)):
            start = pb.RowStart(row=index, prompt_length=len(prompt), output=pb.RowStart.PROMPT_LOGPROBS)
            if entries:
                span = start.spans.add(start=0)
                for slot, weight in entries:
                    span.entries.add(slot=slot, weight=weight)
            rows.start(Row.from_proto(start))
            count = -(-len(prompt) // BLOCK)
            rows.extend(index, range(block, block + count))
            block += count
            plan.chunks.add(row=index, start=0, tokens=prompt)
        batch = build_batch(plan, rows, block_size=BLOCK)
        logits = self.special.model.forward(batch)
        return [logits[each.first : each.first + each.count] for each in _in_order(batch.scored)]


def _in_order(scored: Sequence[object]) -> list[object]:
    """Back in the order of the rows, which a batch lays out by adapters."""
    return sorted(scored, key=lambda each: each.row.id)  # type: ignore[attr-defined]


@torch.no_grad()
def merged(model: nn.Module, layout: AdapterLayout, entries: Sequence[tuple[Changes, float]]) -> nn.Module:
    """A float64 copy of the model into whose weights these adapters went, each times its weight."""
    copied = copy.deepcopy(model).double()
    if copied.config.tie_word_embeddings:
        _untie(copied)
    for changes, weight in entries:
        for name, change in changes.items():
            module = copied.get_submodule(name)
            match change:
                case LinearChange():
                    _merge_linear(module, change, weight)
                case EmbeddingChange():
                    _merge_embedding(module, change, weight)
                case ModuleChange():
                    for key, value in change.parameters.items():
                        setattr(module, key, nn.Parameter(_double(value)))
    return copied


def merged_logits(
    model: nn.Module, layout: AdapterLayout, entries: Sequence[tuple[Changes, float]], prompt: Sequence[int]
) -> torch.Tensor:
    """[tokens, vocab of the adapters], float64."""
    with torch.inference_mode():
        logits: torch.Tensor = merged(model, layout, entries)(input_ids=torch.tensor([prompt])).logits[0]
    return logits


def assert_row_equals(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal logits where the oracle has some, and minus infinity beyond."""
    width = want.shape[1]
    torch.testing.assert_close(got[:, :width].double(), want, rtol=tolerance, atol=tolerance)
    assert got[:, width:].isneginf().all()


def _double(values: Float32) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def _untie(model: nn.Module) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.weight = nn.Parameter(head.weight.clone())


def _replaced(weight: torch.Tensor, rows: Rows) -> torch.Tensor:
    """A weight with the adapter's rows: a whole matrix, or some rows, which may lie beyond the last."""
    if rows.ids is None:
        return _double(rows.weight)
    missing = max(0, int(rows.ids[-1]) + 1 - len(weight))
    result = torch.cat([weight, torch.full((missing, weight.shape[1]), torch.nan, dtype=weight.dtype)])
    result[torch.from_numpy(rows.ids)] = _double(rows.weight)
    return result


def _replaced_bias(bias: torch.Tensor | None, rows: Rows, count: int) -> torch.Tensor | None:
    if rows.bias is None and bias is None:
        return None
    result = torch.zeros(count, dtype=torch.float64)
    if bias is not None:
        result[: min(len(bias), count)] = bias[:count]
    if rows.bias is not None:
        ids = slice(0, len(rows.weight)) if rows.ids is None else torch.from_numpy(rows.ids)
        result[ids] = _double(rows.bias)
    return result


def _merge_linear(module: nn.Module, change: LinearChange, weight: float) -> None:
    """y = scale * (W (input_scale * x) + b) + weight * (shift + B A x), as one W and one b."""
    is_conv = isinstance(module, Conv1D)
    w: torch.Tensor = module.weight.t() if is_conv else module.weight  # type: ignore[assignment,operator]
    b: torch.Tensor | None = module.bias  # type: ignore[assignment]
    if change.rows is not None:
        w = _replaced(w, change.rows)
        b = _replaced_bias(b, change.rows, len(w))
    b = torch.zeros(len(w), dtype=torch.float64) if b is None else b.clone()
    if change.input_scale is not None:
        w = w * _double(change.input_scale)
    if change.scale is not None:
        w, b = w * _double(change.scale)[:, None], b * _double(change.scale)
    if change.a is not None and change.b is not None:
        w = w + weight * _double(change.b) @ _double(change.a)
    if change.shift is not None:
        b = b + weight * _double(change.shift)
    module.weight = nn.Parameter(w.t().contiguous() if is_conv else w)
    module.bias = nn.Parameter(b)


def _merge_embedding(module: nn.Module, change: EmbeddingChange, weight: float) -> None:
    e: torch.Tensor = module.weight  # type: ignore[assignment]
    if change.rows is not None:
        e = _replaced(e, change.rows)
    if change.scale is not None:
        e = e * _double(change.scale)
    if change.a is not None and change.b is not None:
        e = e[: len(change.a)] + weight * _double(change.a) @ _double(change.b).T
    module.weight = nn.Parameter(e)
    module.padding_idx = None  # type: ignore[assignment]
