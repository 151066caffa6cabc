"""The base's own weights, for adapters whose meaning depends on them (DoRA, PiSSA, resized vocabularies).

The worker that converts adapters does not hold the model. It asks its parent for one weight at a time; the
parent writes that weight to a file in the spool, and the worker reads and deletes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .files import read_regular
from .floats import Float32, read_float32

FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of dtypes as safetensors has them, by the base's."""


class BaseWeights(Protocol):
    """Reads the weights that are really served, whatever the checkpoint calls or stores them."""

    def read(self, name: str) -> Float32:
        """A parameter by its path in the model, such as `model.layers.0.self_attn.q_proj.weight`.

        A linear's weight is [out, in] also where the base stores it transposed, an embedding's [vocabulary,
        hidden], an experts' parameter as the model has it. `NAME.bias` is there where the layout's target
        has a bias.
        """
        ...

    def read_held(self, name: str) -> Float32:
        """Of a linear's or an embedding's weight what this rank holds: [held outputs, held inputs] or [held
        tokens, hidden]."""
        ...


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A base weight in a file. Whoever receives it deletes it."""

    path: str
    shape: tuple[int, ...]
    dtype: str

    def take(self) -> Float32:
        """Read the weight and delete its file."""
        path = Path(self.path)
        try:
            data = read_regular(path, path.stat().st_size)
        finally:
            path.unlink(missing_ok=True)
        return read_float32(data, FILE_DTYPES[self.dtype]).reshape(self.shape)


class WeightRequests:
    """The worker's side: jobs on several threads that wait for weights from the parent."""

    def __init__(self, ask: Callable[[int, str, bool], None]) -> None:
        """`ask`: send the parent a request for a weight: its number, the name, and whether what this rank
        holds will do."""
        self._ask = ask
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[WeightFile]] = {}
        self._last = 0

    def read(self, name: str) -> Float32:
        """As `BaseWeights.read`; blocks until the parent has answered."""
        return self._read(name, held=False)

    def read_held(self, name: str) -> Float32:
        """As `BaseWeights.read_held`; blocks like `read`."""
        return self._read(name, held=True)

    def _read(self, name: str, *, held: bool) -> Float32:
        answer: Future[WeightFile] = Future()
        with self._lock:
            self._last += 1
            number = self._last
            self._waiting[number] = answer
        self._ask(number, name, held)
        return answer.result().take()

    def provide(self, number: int, file: WeightFile) -> None:
        """The parent's answer to a request."""
        with self._lock:
            answer = self._waiting.pop(number)
        answer.set_result(file)
