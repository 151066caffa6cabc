"""The server starts and answers wherever it is started from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex.ports import free_port

from .server import OPENER, serving

ROOT = Path(__file__).resolve().parents[2]
DEAD = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(
    ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "grpc_proxy"), DEAD
)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with loraplex installed from a wheel, as `pip install --target` leaves it. The wheel is made
    of a copy, its extension without optimization, which takes a fifth of the time."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "loraplex"
    ignored = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "tests", "bench")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    compiler = wheels / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {sysconfig.get_config_var("CXX")} "$@" -O0\n')
    compiler.chmod(0o755)
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", str(wheels), str(source)],
        env=os.environ | {"CC": str(compiler), "CXX": str(compiler)},
        check=True,
        timeout=300,
    )
    [wheel] = wheels.glob("loraplex-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=300
    )
    return target


def one_request(arguments: list[str], log: Path, **options: object) -> None:
    with serving(arguments, log, **options) as server:
        for model in ("base", "alpha"):
            assert server.complete(model, "hello")["usage"]["completion_tokens"] == 8
        assert server.stop() == 0
    assert "ERROR" not in log.read_text(), "the router says farewell, so no part takes its end for a loss"


def test_from_the_root_of_the_checkout(arguments: list[str], tmp_path: Path) -> None:
    """With the checkout on the path, transformers finds our folder named `kernels`."""
    command = (sys.executable, "-m", "loraplex")
    one_request(arguments, tmp_path / "log", cwd=ROOT, command=command)


def test_by_the_console_script_from_another_folder(arguments: list[str], tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "loraplex"
    one_request(arguments, tmp_path / "log", cwd=tmp_path, command=(str(script),))


def test_from_a_wheel_installed_elsewhere(arguments: list[str], elsewhere: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(elsewhere)}
    found = subprocess.run(
        [sys.executable, "-P", "-c", "import loraplex; print(loraplex.__file__)"],
        env=dict(os.environ) | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith(str(elsewhere))
    one_request(arguments, tmp_path / "log", env=environment)


def test_with_a_dead_proxy_in_the_environment(arguments: list[str], tmp_path: Path) -> None:
    one_request(arguments, tmp_path / "log", env=PROXIES)


def test_parts_started_by_hand_and_another_router_behind_the_first(
    tiny_model: Callable[[str], Path], two_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """`loraplex shard` and `loraplex router` without a launcher; the shard outlives its routers."""
    shard_port, port = free_port(), free_port()
    command = [sys.executable, "-P", "-m", "loraplex"]
    model = [
        "shard",
        str(tiny_model("llama")),
        "--dtype",
        "float32",
        "--port",
        str(shard_port),
        "--max-adapters",
        "1",
    ]
    front = ["router", "--served-model-name", "base", "--group", f"127.0.0.1:{shard_port}"]
    front += ["--port", str(port), "--grpc-port", str(free_port())]
    front += [f"--adapter={name}={path}" for name, path in two_adapters.items()]
    with (tmp_path / "log").open("wb") as log:
        shard = subprocess.Popen([*command, *model], stderr=log)
        try:
            answers = []
            for adapter in ("alpha", "beta"):
                router = subprocess.Popen([*command, *front], stderr=log)
                answers.append(one_completion(port, adapter))
                router.terminate()
                assert router.wait(20) == 0
            assert shard.poll() is None, (tmp_path / "log").read_text()
            assert len(set(answers)) == 2
        finally:
            shard.terminate()
            assert shard.wait(20) == 0


def one_completion(port: int, model: str) -> str:
    """The text of one completion, from a server that may still be starting."""
    body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            with OPENER.open(request, timeout=30) as response:
                return str(json.load(response)["choices"][0]["text"])
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
