"""Fixtures shared by a whole session of tests: tiny models and adapters are built once."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from . import tiny
from .fakes.certificates import Authority, Identity


def pytest_report_header() -> str:
    return "oracles: " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny random fp32 model by kind, see tiny.CONFIGS."""
    root = tmp_path_factory.mktemp("models")

    def build(kind: str) -> Path:
        directory = root / kind
        if not directory.exists():
            tiny.build_model(kind, directory)
        return directory

    return build


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def identity(authority: Authority) -> Identity:
    """A certificate for this machine by address."""
    return authority.issue("DNS:localhost,IP:127.0.0.1")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """The same certificate, but of another authority."""
    return Authority(tmp_path_factory.mktemp("stranger")).issue("DNS:localhost,IP:127.0.0.1")
