"""From a whole change to the part of it that one rank holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .changes import AnyTarget, Change, EmbeddingChange, ExpertLora, ExpertsChange, LinearChange, Norm, Rows
from .floats import Float32
from .layout import EmbeddingTarget, ExpertsTarget, Target
from .share import Axis, Share


def cut(change: Change, target: AnyTarget) -> Change:
    """What of a change to `target` this rank stores."""
    match change, target:
        case LinearChange(), Target(share=Share() as share):
            return _linear(change, share)
        case EmbeddingChange(), EmbeddingTarget(share=Share() as share):
            rows = None if change.rows is None else _rows(change.rows, share)
            return replace(change, a=_along(change.a, 0, share.outputs), rows=rows)
        case ExpertsChange(), ExpertsTarget():
            return _experts(change, target)
        case _:
            return change


def height_with(rows: Rows, base: int) -> int:
    """Rows that a weight has with these in place of its own `base`."""
    return len(rows.weight) if rows.ids is None else max(base, int(rows.ids[-1]) + 1)


def _linear(change: LinearChange, share: Share) -> LinearChange:
    return LinearChange(
        a=_along(change.a, 1, share.inputs),
        b=_along(change.b, 0, share.outputs),
        scale=_along(change.scale, 0, share.outputs),
        shift=_along(change.shift, 0, share.outputs) if share.adds_bias else None,
        input_scale=_along(change.input_scale, 0, share.inputs),
        rows=None if change.rows is None else _rows(change.rows, share),
        norm=None if change.norm is None else _norm(change.norm, share),
    )


def _norm(norm: Norm, share: Share) -> Norm:
    """Norms are divided only where inputs are: every rank has all of the outputs."""
    assert share.outputs is None
    return norm if share.adds_bias else replace(norm, bias=None)


def _rows(rows: Rows, share: Share) -> Rows:
    """Rows that this rank does not hold are gone; ids are counted among those that it holds."""
    weight, bias, ids = _along(rows.weight, 1, share.inputs), rows.bias, rows.ids
    assert weight is not None
    if share.outputs is not None:
        held = share.outputs.positions(height_with(rows, share.outputs.size))
        own = np.arange(len(weight)) if ids is None else ids
        mine = np.isin(own, held)
        weight, bias = weight[mine], None if bias is None else bias[mine]
        ids = None if ids is None else np.searchsorted(held, own[mine])
    if bias is not None and not share.adds_bias:
        bias = np.zeros_like(bias)
    return Rows(ids, weight, bias)


def _experts(change: ExpertsChange, target: ExpertsTarget) -> ExpertsChange:
    shares = {parameter.name: parameter.share for parameter in target.parameters}
    shares |= {half: parameter.half_share for parameter in target.parameters for half in parameter.halves}
    return ExpertsChange({name: _expert(lora, shares[name]) for name, lora in change.parameters.items()})


def _expert(lora: ExpertLora, share: Share | None) -> ExpertLora:
    if share is None:
        return lora
    a, b = _along(lora.a, 2, share.inputs), _along(lora.b, 1, share.outputs)
    assert a is not None
    assert b is not None
    return ExpertLora(a, b)


def _along(values: Float32 | None, axis: int, held: Axis | None) -> Float32 | None:
    """The held positions of one axis."""
    if values is None or held is None:
        return values
    return values.take(held.positions(values.shape[axis]), axis)
