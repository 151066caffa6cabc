from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loraplex import doctor, doctor_cuda
from loraplex.kernels.catalogue import every_kernel
from tests.fakes import cupy as fake_cupy


def test_says_what_is_here_and_that_it_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    lines = capsys.readouterr().out.splitlines()
    topics = [line.split(":")[0] for line in lines]
    assert topics[:3] == ["python", "torch", "transformers"]
    assert {"threads", "device"} <= set(topics)
    count = len(
        [path for path in Path(doctor_cuda.__file__).with_name("kernels").iterdir() if ".cu" in path.name]
    )
    assert f"kernels: all {count} source files for GPUs are here" in lines
    assert lines[-1] == "this machine can serve"


def test_fails_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.run() == 1
    text = capsys.readouterr().out
    assert "FAIL torch: cannot be imported: " in text
    assert text.endswith("this machine cannot serve yet\n")


@pytest.mark.parametrize(
    ("version", "fatal"),
    [("2.10.1", True), ("2.11.0", False), ("2.13.0+cpu", False), ("3.0", False), (None, True)],
)
def test_versions_are_compared_as_numbers(
    version: str | None, fatal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    assert doctor.version_of("torch", (2, 11)).fatal is fatal


@pytest.mark.parametrize(
    ("line", "told", "slow"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "avx2, avx512f, avx512_bf16", 0),
        ("flags\t\t: fpu avx2", "avx2", 2),
        ("Features\t: fp asimd bf16", "asimd, bf16", 0),
        ("flags\t\t: fpu", "none that help", 2),
    ],
)
def test_tells_what_a_cpu_lacks(line: str, told: str, slow: int, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{line}\n")
    flags, *rest = doctor.cpu(path)
    assert flags.text == told
    assert [finding.topic for finding in rest] == ["slow"] * slow


def test_tells_memory_in_gibibytes(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n")
    assert [finding.text for finding in doctor.memory(path)] == ["8.0 GiB free of 16.0 GiB"]


def test_tells_by_what_a_cpu_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    native = SimpleNamespace(levels=lambda: ("avx2", "plain"))
    monkeypatch.setattr("loraplex.kernels._native", native, raising=False)
    monkeypatch.setitem(sys.modules, "loraplex.kernels._native", native)
    assert [finding.text for finding in doctor.extension()] == ["the C++ extension's, with avx2"]
    monkeypatch.delattr("loraplex.kernels._native")
    monkeypatch.setitem(sys.modules, "loraplex.kernels._native", None)
    told, slow = doctor.extension()
    assert told.text.startswith("torch's alone; the C++ extension is not here (")
    assert slow.topic == "slow"
    assert "install a C++ compiler" in slow.text


def test_is_silent_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert list(doctor.cpu(tmp_path / "none")) == list(doctor.memory(tmp_path / "none")) == []


ON_CPU = "this machine can serve with --device cpu only"


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def report(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert doctor.run() == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("flash")
def test_tells_of_a_gpu_and_compiles_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = fake_cupy.install(monkeypatch)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"cupy": ["cupy-cuda13x"] * 2})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    lines = report(capsys)
    device = "cuda:0, NVIDIA H200 (compute capability 9.0, 132 multiprocessors), 100.0 GiB free of 140.0 GiB"
    assert f"device: {device}" in lines
    assert "cuda: torch is built for 13.0" in lines
    assert "cupy: 14.2.0 (cupy-cuda13x), CUDA 13.0, NVRTC 13.0, driver for CUDA 13.2" in lines
    told = [line for line in lines if line.startswith("kernels: ")]
    assert len(told) == len({kernel.source for kernel in every_kernel()})
    assert sum(int(line.split(": ")[2].split()[0]) for line in told) == len(every_kernel())
    assert len(fake.compiled) == len({(kernel.source, kernel.defines) for kernel in every_kernel()})
    assert lines[-1] == "this machine can serve"


@pytest.mark.usefixtures("flash")
def test_names_a_kernel_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cupy.install(monkeypatch, broken={"silu_mul": "silu_mul.cu(9): error: wrong\nmore"})
    lines = report(capsys)
    count = len([kernel for kernel in every_kernel() if kernel.name == "silu_mul"])
    error = "silu_mul of silu_mul.cu: silu_mul.cu(9): error: wrong"
    assert f"FAIL kernels: silu_mul.cu: {count} unusable, the first: {error}" in lines
    assert not any("more" in line for line in lines)
    assert any(line.startswith("kernels: rope_kv.cu: ") for line in lines)
    assert lines[-1] == ON_CPU


@pytest.mark.usefixtures("flash")
def test_without_cupy_only_the_cpu_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cupy.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", None)
    lines = report(capsys)
    [line] = [line for line in lines if line.startswith("FAIL")]
    assert line.startswith("FAIL cupy: not usable (import of cupy halted")
    assert line.endswith("install it: pip install 'loraplex[cuda]'")
    assert lines[-1] == ON_CPU


@pytest.mark.usefixtures("flash")
def test_tells_of_a_compiler_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> tuple[int, int]:
        raise RuntimeError("CuPy failed to load libnvrtc.so.13\nmore")

    fake = fake_cupy.install(monkeypatch)
    monkeypatch.setattr(fake.cuda.nvrtc, "getVersion", missing)
    lines = report(capsys)
    failed = [line for line in lines if line.startswith("FAIL")]
    assert failed == ["FAIL cupy: 14.2.0 finds no NVRTC: CuPy failed to load libnvrtc.so.13"]
    assert fake.compiled == []
    assert lines[-1] == ON_CPU


@pytest.mark.usefixtures("flash")
def test_two_cupys_are_one_too_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cupy.install(monkeypatch)
    both = ["cupy-cuda13x", "cupy-cuda12x"]
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"cupy": both})
    wanted = "cupy: cupy-cuda12x and cupy-cuda13x overwrite each other: keep the one that fits the driver"
    assert wanted in report(capsys)


@pytest.mark.usefixtures("flash")
def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_cupy.install(monkeypatch)
    old = SimpleNamespace(name="Tesla T4", major=7, minor=5, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: old)
    lines = report(capsys)
    assert "FAIL device: cuda:0, Tesla T4 (compute capability 7.5); 8.0 or later is needed" in lines
    assert lines[-1] == ON_CPU


def test_a_torch_without_flash_attention_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cupy.install(monkeypatch)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    lines = report(capsys)
    assert "FAIL cuda: this torch has no FlashAttention; install its default build" in lines
    assert lines[-1] == ON_CPU


def test_tells_the_drivers_version(tmp_path: Path) -> None:
    path = tmp_path / "version"
    path.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:00:00 UTC 2025\n"
    )
    assert [finding.text for finding in doctor_cuda.driver(path)] == ["580.65.06"]
    assert list(doctor_cuda.driver(tmp_path / "none")) == []


def test_a_kernel_file_that_is_missing_bars_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise FileNotFoundError(f"there is no {name} among the kernels")

    monkeypatch.setattr(doctor_cuda, "read_source", missing)
    finding = doctor_cuda.sources()
    assert finding.bars_cuda
    assert finding.text.endswith("among the kernels; install loraplex again")
