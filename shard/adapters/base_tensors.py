"""The model's own tensors as adapters' readers want them, in the process that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .base_weights import WeightFile
from .floats import Float32

ReadTensor = Callable[[], torch.Tensor]
"""Answers a parameter as it is meant, however it is stored."""


class BaseTensors:
    """The model's parameters, by their path: a `BaseWeights` itself, and the source for other processes."""

    def __init__(self, parameters: Mapping[str, ReadTensor]) -> None:
        """`parameters`: linears as [out, in] whatever the base's own layout; see `BaseWeights.read`."""
        self._parameters = parameters

    def read(self, name: str) -> Float32:
        """As `BaseWeights.read`."""
        values: Float32 = self._parameters[name]().detach().float().cpu().contiguous().numpy()
        return values

    def write(self, name: str, path: Path) -> WeightFile:
        """Write one parameter to a new file, in its own dtype."""
        tensor = self._parameters[name]().detach().cpu().contiguous()
        with path.open("xb") as file:
            file.write(tensor.view(torch.uint8).numpy().data)
        return WeightFile(str(path), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
