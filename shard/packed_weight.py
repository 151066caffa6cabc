"""Base weights of bfloat16 on a CPU in the form that they are multiplied in: laid out once at start, not in
every step, and held in that form alone."""

from __future__ import annotations

import torch

from .linear import BaseWeight, DenseWeight

try:
    from ..kernels import native_linear
except ImportError:  # an install without a compiler
    native_linear = None  # type: ignore[assignment]


class PanelWeight:
    """`BaseWeight` for processors that multiply pairs of bfloat16, by the extension."""

    def __init__(self, dense: DenseWeight) -> None:
        self.bias = dense.bias
        self.out_features = dense.out_features
        self.panels = native_linear.to_panels(dense.weight)
        """As `native_linear.to_panels` makes them."""
        self.in_features = dense.weight.shape[1]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return native_linear.panel_linear(x, self.panels, self.bias, self.out_features)

    def dense(self) -> torch.Tensor:
        return native_linear.from_panels(self.panels, self.out_features)


class OneDnnWeight:
    """`BaseWeight` for processors that multiply tiles of bfloat16 (AMX), or have no extension, by oneDNN."""

    def __init__(self, dense: DenseWeight) -> None:
        self.bias = dense.bias
        self.out_features = dense.out_features
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(dense.weight)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return product

    def dense(self) -> torch.Tensor:
        return self._packed.to_dense()


def packed(weight: DenseWeight) -> BaseWeight:
    """A weight in the form that serves it fastest where it lies.

    By pairs a decode step reads its weights at the speed of memory; by tiles a prompt takes a third of the
    time.
    """
    dense = weight.weight
    if dense.device.type != "cpu" or dense.dtype != torch.bfloat16:
        return weight
    has_tiles: bool = torch.cpu._is_amx_tile_supported()
    if native_linear is not None and native_linear.IS_SERVED and not has_tiles and dense.shape[1] % 2 == 0:
        return PanelWeight(weight)
    return OneDnnWeight(weight) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else weight
