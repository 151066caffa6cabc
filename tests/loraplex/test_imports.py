"""Who may import whom. Walks the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("router", "shard", "kernels", "proto")
ALLOWED = {
    "router": {"router", "proto"},
    "shard": {"shard", "proto", "kernels"},
    "kernels": {"kernels"},
    "proto": {"proto"},
}
"""The rooms that a room may import; beside them everyone may read the version in `loraplex`."""
HEAVY = {"torch", "numpy", "cupy", "transformers", "peft", "accelerate", "safetensors"}
"""What the router and the contract do without."""


def imports_of(path: Path, package: str) -> Iterator[str]:
    """Absolute dotted names of everything a file imports; `package` is the one it belongs to."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of_room(room: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / room).rglob("*.py")):
        package = ".".join(("loraplex", *path.relative_to(ROOT).parent.parts))
        yield from ((path, name) for name in imports_of(path, package))


def room_of(name: str) -> str | None:
    """The room that an imported name lies in; None for what is not ours, and for the version."""
    parts = name.split(".")
    if parts[0] != "loraplex" or parts[1:] == ["__version__"]:
        return None
    return parts[1] if len(parts) > 1 else "loraplex"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_it_may(room: str) -> None:
    found = [(path, name) for path, name in imports_of_room(room) if room_of(name) is not None]
    wrong = [
        f"{path.relative_to(ROOT)}: {name}" for path, name in found if room_of(name) not in ALLOWED[room]
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["router", "proto"])
def test_the_router_does_without_numerics(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, name in imports_of_room(room)
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_nobody_imports_a_room_as_a_top_level_package(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, name in imports_of_room(room)
        if name.split(".")[0] in ROOMS
    ]
    assert wrong == []


def test_the_kernels_package_imports_nothing_on_its_own() -> None:
    assert list(imports_of(ROOT / "kernels" / "__init__.py", "loraplex.kernels")) == []


def test_the_walk_sees_relative_and_nested_imports(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "from . import a\nfrom ..proto import b\ndef f():\n    import torch.nn\n    from ... import c\n"
    )
    assert list(imports_of(path, "loraplex.router.rest")) == [
        *("loraplex.router.rest.a", "loraplex.router.proto.b", "torch.nn", "loraplex.c"),
    ]


def test_the_walk_covers_every_room() -> None:
    assert {room: any(True for _ in imports_of_room(room)) for room in ROOMS} == dict.fromkeys(ROOMS, True)


def test_the_running_router_loads_no_numerics_by_detour() -> None:
    code = """
import importlib, pkgutil, sys
import loraplex.router
for module in pkgutil.walk_packages(loraplex.router.__path__, "loraplex.router."):
    importlib.import_module(module.name)
print(*sorted(set(sys.argv[1:]) & set(sys.modules)), "end")
"""
    answer = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "end"
