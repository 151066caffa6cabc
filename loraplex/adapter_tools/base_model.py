"""A base whose weights are changed for good, as adapters would change its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from ..shard.adapters.changes import (
    AnyTarget,
    Change,
    EmbeddingChange,
    ExpertsChange,
    LinearChange,
    ModuleChange,
    Rows,
)
from ..shard.adapters.floats import Float32
from ..shard.adapters.layout import AdapterLayout, EmbeddingTarget, ExpertsTarget, ModuleTarget, Target
from .errors import REFUSED, ToolFailed


@dataclass(frozen=True, slots=True)
class Weighted:
    """A change, and the weight of the adapter that it belongs to."""

    change: Change
    weight: float


class EditableBase:
    """A transformers model in memory. Owns its parameters; is a `BaseWeights` of what they are now.

    Everything is computed in float32, and rounded once, to the parameter's own dtype.
    """

    def __init__(self, model: Any, layout: AdapterLayout) -> None:
        """`model`: a causal LM, which is changed in place. `layout`: of the same model."""
        self._model = model
        self._stored_transposed = {
            f"{target.name}.weight" for target in layout.linears if target.fan_in_fan_out
        }
        self._aliases = {target.name for target in layout.aliases}
        self._vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._was_tied = self._untie()

    def read(self, name: str) -> Float32:
        """As `BaseWeights.read`."""
        values = self._model.get_parameter(name).detach().to(torch.float32, copy=True)
        values = values.t() if name in self._stored_transposed else values
        return cast(Float32, values.contiguous().numpy())

    def read_held(self, name: str) -> Float32:
        """As `BaseWeights.read_held`: the whole, for there are no other ranks."""
        return self.read(name)

    def grow(self, vocab_size: int) -> None:
        """Make room for more token ids, in the embedding, the head and the config."""
        if vocab_size > self._vocab_size:
            self._model.resize_token_embeddings(vocab_size, mean_resizing=False)

    def check(self, name: str) -> None:
        """Raises ToolFailed where the base has a linear in another form than the adapter."""
        if name in self._aliases:
            raise ToolFailed(
                REFUSED, f"{name}: the base has this linear in another form, fused or apart; serve it instead"
            )

    def apply(self, target: AnyTarget, changes: Sequence[Weighted]) -> None:
        """Change one module by all that adapters want of it.

        Raises ToolFailed where the base has no parameter that could take it.
        """
        match target:
            case Target():
                self._linear(target, changes)
            case EmbeddingTarget():
                self._embedding(target, changes)
            case ModuleTarget():
                for weighted in changes:
                    for name, values in cast(ModuleChange, weighted.change).parameters.items():
                        self._write(f"{target.name}.{name}", values)
            case ExpertsTarget():
                for weighted in changes:
                    self._experts(target, cast(ExpertsChange, weighted.change), weighted.weight)

    def finish(self) -> Any:
        """The model, its head tied to its embedding again if it was and they are still the same."""
        if self._was_tied:
            embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
            if torch.equal(embedding.weight, head.weight):
                head.weight = embedding.weight
            else:
                self._model.config.tie_word_embeddings = False
        return self._model

    def _untie(self) -> bool:
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if head is None or head.weight is not embedding.weight:
            return False
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        return True

    def _linear(self, target: Target, changes: Sequence[Weighted]) -> None:
        name = f"{target.name}.weight"
        weight = self.read(name)
        bias = self.read(f"{target.name}.bias") if target.has_bias else None
        parts = [(cast(LinearChange, weighted.change), weighted.weight) for weighted in changes]
        grown = len(weight) > target.out_features
        weight = self._with_rows(target.name, weight, [part.rows for part, _ in parts], grown)
        for part, _ in parts:
            if bias is not None and part.rows is not None and part.rows.bias is not None:
                bias[_ids(part.rows)] = part.rows.bias
            if part.input_scale is not None:
                weight *= part.input_scale
            if part.scale is not None:
                weight[: len(part.scale)] *= part.scale[:, None]
                if bias is not None:
                    bias[: len(part.scale)] *= part.scale
        shift = np.zeros(len(weight), np.float32)
        for part, factor in parts:
            if part.a is not None and part.b is not None:
                weight[: len(part.b)] += np.float32(factor) * (part.b @ part.a)
            if part.shift is not None:
                shift[: len(part.shift)] += np.float32(factor) * part.shift
        self._write(name, weight)
        if bias is not None:
            self._write(f"{target.name}.bias", bias + shift)
        elif shift.any():
            raise ToolFailed(
                REFUSED,
                f"{target.name}: the adapter adds a bias, and the base has none there; serve it instead",
            )

    def _embedding(self, target: EmbeddingTarget, changes: Sequence[Weighted]) -> None:
        name = f"{target.name}.weight"
        weight = self.read(name)
        parts = [(cast(EmbeddingChange, weighted.change), weighted.weight) for weighted in changes]
        grown = len(weight) > target.vocab_size
        weight = self._with_rows(target.name, weight, [part.rows for part, _ in parts], grown)
        for part, _ in parts:
            if part.scale is not None:
                weight *= part.scale
        for part, factor in parts:
            if part.a is not None and part.b is not None:
                weight[: len(part.a)] += np.float32(factor) * (part.a @ part.b.T)
        self._write(name, weight)

    def _with_rows(
        self, module: str, weight: Float32, replaced: Sequence[Rows | None], grown: bool
    ) -> Float32:
        """`weight` with rows put in their places. Raises ToolFailed where a new token would get none."""
        missing = set(range(self._vocab_size, len(weight))) if grown else set()
        for rows in replaced:
            if rows is not None:
                if rows.ids is None and len(rows.weight) < len(weight):
                    raise ToolFailed(
                        REFUSED,
                        f"{module}: the adapter has {len(rows.weight)} token ids, the base {len(weight)}; "
                        "serve it instead, or merge it with PEFT into a base resized as in training",
                    )
                ids = _ids(rows)
                weight[ids] = rows.weight
                missing -= set(ids.tolist())
        if missing:
            raise ToolFailed(
                REFUSED,
                f"{module}: the adapter has more token ids than the base, but no weights for {min(missing)}",
            )
        return weight

    def _experts(self, target: ExpertsTarget, change: ExpertsChange, factor: float) -> None:
        transposed = {parameter.name: parameter.is_transposed for parameter in target.parameters}
        for name, lora in change.parameters.items():
            path = f"{target.name}.{name}"
            weight = self.read(path)
            for expert, (a, b) in enumerate(zip(lora.a, lora.b, strict=True)):
                delta = np.float32(factor) * (b @ a)
                weight[expert] += delta.T if transposed[name] else delta
            self._write(path, weight)

    def _write(self, name: str, values: Float32) -> None:
        parameter = self._model.get_parameter(name)
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        with torch.no_grad():
            parameter.copy_(tensor.t() if name in self._stored_transposed else tensor)


def _ids(rows: Rows) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(len(rows.weight)) if rows.ids is None else rows.ids
