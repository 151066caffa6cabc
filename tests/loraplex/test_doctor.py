from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from loraplex import doctor


def test_says_what_is_here_and_that_it_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    lines = capsys.readouterr().out.splitlines()
    topics = [line.split(":")[0] for line in lines]
    assert topics[:3] == ["python", "torch", "transformers"]
    assert {"threads", "device"} <= set(topics)
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


def test_is_silent_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert list(doctor.cpu(tmp_path / "none")) == list(doctor.memory(tmp_path / "none")) == []
