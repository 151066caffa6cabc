"""What a wheel holds, and that the container is built as it should be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("router", "shard", "kernels", "proto")
PACKAGED = (".py", ".pyi", ".proto", ".cu", ".cuh", ".json", ".safetensors", ".jinja", ".typed")

NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the checkout, on a machine without a compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", "*.so"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    built = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--wheel-dir", str(folder), str(copy)),
        ],
        env=os.environ | NO_COMPILER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("room", ROOMS)
def test_the_wheel_holds_every_module_of_a_room(wheel: set[str], room: str) -> None:
    sources = [path for path in (ROOT / room).rglob("*") if path.suffix in PACKAGED and path.is_file()]
    assert sources
    assert {f"loraplex/{path.relative_to(ROOT)}" for path in sources} <= wheel


def test_the_wheel_holds_the_front_door_and_the_bundled_model(wheel: set[str]) -> None:
    front = [
        *(ROOT / "loraplex").glob("*.py"),
        *(ROOT / "loraplex/adapter_tools").glob("*.py"),
        *(ROOT / "loraplex/loadtest").glob("*.py"),
        ROOT / "loraplex/py.typed",
    ]
    demo = [
        path for path in (ROOT / "loraplex/demo").rglob("*") if path.suffix in PACKAGED and path.is_file()
    ]
    assert {str(path.relative_to(ROOT)) for path in front + demo} <= wheel
    assert "loraplex/demo/model/model.safetensors" in wheel
    adapters = {name.split("/")[3] for name in wheel if name.startswith("loraplex/demo/adapters/")}
    assert len(adapters) >= 4
    for adapter in adapters:
        assert f"loraplex/demo/adapters/{adapter}/adapter_config.json" in wheel
        assert f"loraplex/demo/adapters/{adapter}/adapter_model.safetensors" in wheel


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"loraplex"}


def test_an_install_without_a_compiler_lacks_the_extension_alone(wheel: set[str]) -> None:
    assert not [name for name in wheel if name.endswith((".so", ".pyd"))]


def test_the_extension_is_rebuilt_after_any_of_its_sources() -> None:
    import tomllib

    [extension] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels/native").iterdir()}
    assert {*extension["sources"], *extension["depends"]} == sources | {"kernels/lora_tables.cuh"}
    assert extension["optional"]


def test_every_package_is_declared() -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"loraplex", "loraplex.adapter_tools", "loraplex.demo", "loraplex.loadtest"}
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            found.add(".".join(("loraplex", *init.parent.relative_to(ROOT).parts)))
    assert set(declared) == found


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def stages() -> dict[str, list[list[str]]]:
    """The container file's stages by name, each a list of instructions split at spaces."""
    text = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] == "FROM":
            found[words[-1]] = []
        if found:
            list(found.values())[-1].append(words)
    return found


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_container_runs_as_nobody_in_particular_and_gets_signals(target: str) -> None:
    instructions = stages()[target]
    users = [words[1] for words in instructions if words[0] == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    [entry] = [words for words in instructions if words[0] == "ENTRYPOINT"]
    assert " ".join(entry[1:]).startswith('["')


def test_the_container_file_is_without_findings() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join((str(Path(sys.executable).parent), os.defpath)))
    if hadolint is None:
        pytest.skip("hadolint has no build for this platform")
    checked = subprocess.run(
        [hadolint, str(ROOT / "deploy/Dockerfile")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
