"""What the CUDA launcher asks of CuPy, which a fake notes."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from loraplex.kernels.launch import Kernel, Launcher
from loraplex.kernels.source import read_source
from tests.fakes import cupy as fake_cupy
from tests.fakes.cupy import CLASSIC, MODERN, FakeCupy

if TYPE_CHECKING:
    from loraplex.kernels.cupy_launcher import CupyLauncher

GPU = torch.device("cuda", 1)
SHRINK = Kernel("lora_plain.cu", "lora_shrink_plain", (("ELEMENT", "Bf16"), ("ROWS", "16")))
EMBED = Kernel("lora_plain.cu", "lora_embed", SHRINK.defines)
WIDE = Kernel("lora_plain.cu", "lora_embed", (("ELEMENT", "float"), ("ROWS", "16")))


def launcher_of(device: torch.device = GPU) -> CupyLauncher:
    launcher: CupyLauncher = importlib.import_module(fake_cupy.LAUNCHER).CupyLauncher(device)
    return launcher


@pytest.fixture(params=[MODERN, CLASSIC])
def cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    return fake_cupy.install(monkeypatch, request.param)


def test_is_a_launcher_of_the_devices_size(cupy: FakeCupy) -> None:
    launcher: Launcher = launcher_of()
    assert launcher.processors == 132


def test_compiles_each_file_once_for_its_constants(cupy: FakeCupy) -> None:
    launcher = launcher_of()
    for kernel in (SHRINK, EMBED, WIDE, SHRINK, WIDE):
        launcher.prepare(kernel)
    text = read_source("lora_plain.cu")
    assert cupy.compiled == [
        (text, ("--std=c++17", "-DELEMENT=Bf16", "-DROWS=16")),
        (text, ("--std=c++17", "-DELEMENT=float", "-DROWS=16")),
    ]
    assert set(cupy.devices) == {1}
    assert [kernel for kernel, _ in launcher.compiled] == [SHRINK, EMBED, WIDE]
    assert all(seconds >= 0 for _, seconds in launcher.compiled)


def test_launches_on_torchs_stream_with_arguments_as_they_are(cupy: FakeCupy) -> None:
    launcher = launcher_of()
    arguments = (2**40, np.int32(3), np.float32(0.5))
    launcher.launch(SHRINK, (4, 5, 6), 128, arguments)
    [launch] = cupy.launches
    assert launch["name"] == "lora_shrink_plain"
    assert (launch["grid"], launch["block"]) == ((4, 5, 6), (128, 1, 1))
    assert [type(value) for value in launch["args"]] == [int, np.int32, np.float32]
    assert tuple(launch["args"]) == arguments
    assert launch["stream"].ptr == 7


def test_an_empty_grid_is_no_launch(cupy: FakeCupy) -> None:
    launcher_of().launch(SHRINK, (0, 4, 1), 128, (1,))
    assert cupy.launches == []


def test_follows_the_current_stream_with_one_object_for_each(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = launcher_of()
    for pointer in (7, 8, 7, 0):
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda _, pointer=pointer: SimpleNamespace(cuda_stream=pointer)
        )
        launcher.launch(SHRINK, (1, 1, 1), 32, ())
    assert [launch["stream"].ptr for launch in cupy.launches] == [7, 8, 7, 0]
    assert [stream.ptr for stream in cupy.streams] == [7, 8, 0]


def test_a_launch_of_what_is_prepared_compiles_nothing(cupy: FakeCupy) -> None:
    launcher = launcher_of()
    launcher.prepare(SHRINK)
    before = list(cupy.compiled)
    launcher.launch(SHRINK, (1, 1, 1), 32, ())
    assert cupy.compiled == before
    assert len(launcher.compiled) == 1


def test_a_device_without_a_number_is_the_current_one(cupy: FakeCupy) -> None:
    launcher_of(torch.device("cuda")).prepare(SHRINK)
    assert cupy.devices == [0]


@pytest.mark.parametrize(
    ("log", "told"),
    [("\n lora_plain.cu(9): error: no\nmore\n", "lora_plain.cu(9): error: no"), ("", "CompileException")],
)
def test_a_kernel_that_does_not_compile_is_named(
    log: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cupy.install(monkeypatch, broken={"lora_embed": log})
    launcher = launcher_of()
    unusable = importlib.import_module(fake_cupy.LAUNCHER).KernelUnusable
    with pytest.raises(unusable, match=re.escape(f"lora_embed of lora_plain.cu: {told}") + "$"):
        launcher.prepare(EMBED)
    assert launcher.compiled == []
