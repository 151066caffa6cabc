"""The tensors of one weights file: their shapes at once, their values when they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..errors import AdapterRejected
from .floats import Float32, all_finite, read_float32
from .safetensors_header import TensorInfo, read_header


class Tensors(Mapping[str, TensorInfo]):
    """A safetensors file in memory, by key. Raises AdapterRejected where its header is not sound."""

    def __init__(self, file: memoryview) -> None:
        self._file = file
        self._header = read_header(file)

    def __getitem__(self, key: str) -> TensorInfo:
        return self._header[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def read(self, key: str) -> Float32:
        """The values of one tensor in its shape. Raises AdapterRejected unless all are finite."""
        tensor = self._header[key]
        values = read_float32(self._file[tensor.begin : tensor.end], tensor.dtype)
        if not all_finite(values):
            raise AdapterRejected(
                f"{key} holds NaN or infinity; the training diverged or the file is damaged"
            )
        return values.reshape(tensor.shape)
