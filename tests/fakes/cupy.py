"""A stand-in for CuPy: notes what is compiled and launched. Needs no GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

LAUNCHER = "loraplex.kernels.cupy_launcher"
MODERN, CLASSIC = "14.2.0", "13.6.0"


class CompileException(Exception):
    """CuPy's."""


class FakeCupy(ModuleType):
    """The module, with what was asked of it."""

    def __init__(self, version: str, broken: dict[str, str]) -> None:
        super().__init__("cupy")
        self.__version__ = version
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        """Text and options of each module."""
        self.launches: list[dict[str, Any]] = []
        self.streams: list[SimpleNamespace] = []
        self.devices: list[int] = []
        self._broken = broken
        stream = SimpleNamespace()
        self.cuda = SimpleNamespace(
            Device=self._device,
            Stream=stream,
            compiler=SimpleNamespace(CompileException=CompileException),
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
            runtime=SimpleNamespace(runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13020),
        )
        if version == MODERN:
            stream.from_external = lambda foreign: self._stream(*foreign.__cuda_stream__())
        else:
            self.cuda.ExternalStream = lambda pointer, index: self._stream(index, pointer)

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> SimpleNamespace:
        """Compiled when a function is asked for."""
        self.compiled.append((code, options))
        return SimpleNamespace(get_function=self._function)

    def _function(self, name: str) -> SimpleNamespace:
        if name in self._broken:
            raise CompileException(self._broken[name])

        def launch(
            grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], *, stream: Any
        ) -> None:
            self.launches.append({"name": name, "grid": grid, "block": block, "args": args, "stream": stream})

        return SimpleNamespace(kernel=launch)

    def _device(self, index: int) -> AbstractContextManager[None]:
        self.devices.append(index)
        return nullcontext()

    def _stream(self, index: int, pointer: int) -> SimpleNamespace:
        self.streams.append(SimpleNamespace(ptr=pointer, device_id=index))
        return self.streams[-1]


def install(
    monkeypatch: pytest.MonkeyPatch, version: str = MODERN, broken: dict[str, str] | None = None
) -> FakeCupy:
    """Put it, and a GPU of torch's, in the place of the real ones. `broken`: compilers' logs by function."""
    fake = FakeCupy(version, broken or {})
    monkeypatch.setitem(sys.modules, "cupy", fake)
    # The launcher is imported anew, and forgotten afterwards.
    monkeypatch.setitem(sys.modules, LAUNCHER, fake)
    del sys.modules[LAUNCHER]
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": gpu,
        "mem_get_info": (100 * 2**30, 140 * 2**30),
        "current_stream": SimpleNamespace(cuda_stream=7),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return fake
