"""The model's own tensors as adapters' readers want them, in the process that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from .base_weights import WeightFile
from .floats import Float32

ReadTensor = Callable[[], torch.Tensor]
"""Answers a parameter as it is meant, however it is stored."""


class BaseTensors:
    """The model's parameters, by their path: a `BaseWeights` itself, and the source for other processes."""

    def __init__(
        self, parameters: Mapping[str, ReadTensor], held: Mapping[str, ReadTensor] = MappingProxyType({})
    ) -> None:
        """
        Args:
            parameters: linears as [out, in] whatever the base's own layout; see `BaseWeights.read`.
            held: what this process holds of a weight; those that are absent it holds whole.
        """
        self._parameters = parameters
        self._held = held

    def read(self, name: str) -> Float32:
        """As `BaseWeights.read`."""
        return _values(self._parameters[name]())

    def read_held(self, name: str) -> Float32:
        """As `BaseWeights.read_held`."""
        return _values(self._reader(name, held=True)())

    def write(self, name: str, path: Path, *, held: bool = False) -> WeightFile:
        """Write one parameter, or what is held of it, to a new file, in its own dtype."""
        tensor = self._reader(name, held=held)().detach().cpu().contiguous()
        with path.open("xb") as file:
            file.write(tensor.view(torch.uint8).numpy().data)
        return WeightFile(str(path), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def _reader(self, name: str, *, held: bool) -> ReadTensor:
        return (self._held.get(name) if held else None) or self._parameters[name]


def _values(tensor: torch.Tensor) -> Float32:
    values: Float32 = tensor.detach().float().cpu().contiguous().numpy()
    return values
