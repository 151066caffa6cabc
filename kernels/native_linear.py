"""Products with bfloat16 weights on a CPU by the C++ extension."""

from __future__ import annotations

import torch

from . import _native

IS_SERVED = _native.PANEL > 0
"""Whether this processor has the instructions."""


def to_panels(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] of bfloat16, `in` even, in the order in which `panel_linear` reads it: panels of
    outputs, zeros behind the last output."""
    outputs, inputs = weight.shape
    panels = -(-outputs // _native.PANEL)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, panels * _native.PANEL - outputs))
    return padded.view(panels, _native.PANEL, inputs // 2, 2).permute(0, 2, 1, 3).contiguous()


def from_panels(panels: torch.Tensor, outputs: int) -> torch.Tensor:
    """The weight [out, in] again, as a copy."""
    count, pairs, panel, _ = panels.shape
    return panels.permute(0, 2, 1, 3).reshape(count * panel, 2 * pairs)[:outputs]


def panel_linear(
    x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    """x [rows, in] -> [rows, outputs], all of bfloat16, summed in fp32. A row of x may not have gaps."""
    rows, inputs = x.shape
    y = torch.empty(rows, outputs, dtype=x.dtype)
    _native.gemm(
        y.data_ptr(),
        x.data_ptr(),
        panels.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        x.stride(0),
        rows,
        inputs,
        outputs,
    )
    return y
