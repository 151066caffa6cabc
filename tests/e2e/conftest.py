"""One server for the tests that only talk to it: a tiny model, two adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..tiny import AdapterRecipe, build_adapter
from .server import Server, serving


@pytest.fixture(scope="session")
def two_adapters(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("two")
    return {
        name: build_adapter(tiny_model("llama"), root / name, AdapterRecipe(rank), seed=rank)
        for name, rank in (("alpha", 4), ("beta", 8))
    }


@pytest.fixture(scope="session")
def arguments(tiny_model: Callable[[str], Path], two_adapters: dict[str, Path]) -> list[str]:
    """What `serve` is told: model, names, and room for tests."""
    words = [
        str(tiny_model("llama")),
        "--served-model-name",
        "base",
        "--dtype",
        "float32",
        "--kv-memory",
        "32MiB",
    ]
    for name, path in two_adapters.items():
        words += ["--adapter", f"{name}={path}"]
    return [*words, "--adapter-root", str(next(iter(two_adapters.values())).parent)]


@pytest.fixture(scope="session")
def server(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(arguments, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
