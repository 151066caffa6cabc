"""The commands as typed: where a value comes from, and what a mistake looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import loraplex
from loraplex import cli
from loraplex.keeper import LaunchFailed
from loraplex.router.config import AdapterSpec, RouterConfig
from loraplex.settings import to_flags
from loraplex.shard.config import ShardConfig

Served = list[tuple[ShardConfig, RouterConfig]]
DEGREES: list[dict[str, int]] = []


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORAPLEX_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """What `loraplex serve` would start."""
    calls: Served = []
    DEGREES.clear()

    def serve(shard: ShardConfig, router: RouterConfig, **degrees: int) -> int:
        calls.append((shard, router))
        DEGREES.append(degrees)
        return 0

    monkeypatch.setattr(cli, "serve", serve)
    return calls


@pytest.fixture
def run_part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], RouterConfig | ShardConfig]:
    """Runs `loraplex router` or `loraplex shard` up to the point where the process would serve."""

    def run(name: str, flags: list[str]) -> RouterConfig | ShardConfig:
        seen: list[RouterConfig | ShardConfig] = []
        main = ModuleType(f"loraplex.{name}.main")
        main.run = lambda config: seen.append(config) or 0  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, main.__name__, main)
        assert cli.run([name, *flags]) == 0
        return seen[0]

    return run


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loraplex.toml"
    path.write_text('model = "of-file"\nport = 1\nmax-rank = 1\nkv-memory = "1MiB"\nadapter = ["a=b"]\n')
    monkeypatch.setenv("LORAPLEX_CONFIG", str(path))
    monkeypatch.setenv("LORAPLEX_PORT", "2")
    monkeypatch.setenv("LORAPLEX_MAX_RANK", "2")
    assert cli.run(["serve", "--port=3"]) == 0
    [(shard, router)] = served
    assert router.port == 3
    assert shard.max_rank == 2
    assert shard.kv_memory == 1024**2
    assert shard.model == "of-file"
    assert router.adapters == (AdapterSpec("a", "b"),)
    assert router.grpc_port == 8081


def test_serve_takes_everything_from_flags(served: Served, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret tenant\n")
    flags = f"""serve org/m --served-model-name m --device cpu --dtype bfloat16 --host 0.0.0.0 --port 1
        --grpc-port 2 --tp 2 --replicas 3 --adapter a=x --adapter b=y --adapter-root {tmp_path}
        --adapter-memory 1MiB --host-adapter-memory 2MiB --max-adapters 3 --kv-memory 4MiB --max-model-len 5
        --max-rank 6 --api-key-file {keys} --drain-timeout 7.5 --max-num-seqs 8 --max-queued-requests 9
        --max-queued-tokens 10 --revision main --allow-source hub:my-org/* --allow-source hub:other/*"""
    assert cli.run(flags.split()) == 0
    mib = 1024**2
    [(shard, router)] = served
    assert shard == ShardConfig(
        model="org/m",
        revision="main",
        device="cpu",
        dtype="bfloat16",
        kv_memory=4 * mib,
        adapter_memory=mib,
        host_adapter_memory=2 * mib,
        max_adapters=3,
        max_model_len=5,
        max_num_seqs=8,
        max_rank=6,
        drain_timeout=7.5,
    )
    assert router == RouterConfig(
        served_model_name="m",
        groups=router.groups,
        host="0.0.0.0",
        port=1,
        grpc_port=2,
        adapters=(AdapterSpec("a", "x"), AdapterSpec("b", "y")),
        adapter_roots=(str(tmp_path),),
        allow_sources=("hub:my-org/*", "hub:other/*"),
        api_key_file=str(keys),
        drain_timeout=7.5,
        max_queued_requests=9,
        max_queued_tokens=10,
    )
    assert DEGREES == [{"tp": 2, "replicas": 3}]


def test_the_base_is_named_as_typed(served: Served) -> None:
    assert cli.run(["serve", "./models/tiny"]) == 0
    assert served[0][1].served_model_name == "./models/tiny"


def test_a_list_in_the_environment_is_split_at_spaces(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_ADAPTER", "a=x b=y")
    assert cli.run(["serve", "m"]) == 0
    assert served[0][1].adapters == (AdapterSpec("a", "x"), AdapterSpec("b", "y"))


def test_an_empty_list_of_sources_stays_empty(
    served: Served, tmp_path: Path, run_part: Callable[[str, list[str]], RouterConfig | ShardConfig]
) -> None:
    path = tmp_path / "loraplex.toml"
    path.write_text("allow-source = []\n")
    assert cli.run(["serve", "m", "--config", str(path)]) == 0
    router = served[0][1]
    assert router.allow_sources == ()
    assert run_part("router", to_flags(router)) == router


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("shard", ShardConfig(model="-odd name", dtype="bfloat16", kv_memory=5, threads=2)),
        ("shard", ShardConfig(model="m", host="0.0.0.0", plaintext=True, store_prefix="a/b")),
        (
            "router",
            RouterConfig(
                served_model_name="m",
                groups=(("localhost:1", "127.0.0.1:2"), ("[::1]:3",)),
                adapters=(AdapterSpec("x", "--y=z"),),
                adapter_roots=("/a b",),
                drain_timeout=0.5,
            ),
        ),
    ],
)
def test_the_flags_of_a_child_give_its_configuration_again(
    name: str,
    config: RouterConfig | ShardConfig,
    run_part: Callable[[str, list[str]], RouterConfig | ShardConfig],
) -> None:
    assert run_part(name, to_flags(config)) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("serve", "Missing argument 'MODEL'."),
        ("serve m --port x", "'--port': 'x' is not a whole number"),
        ("serve m --port 99999", "port must lie between 0 and 65535"),
        (
            "serve m --kv-memory 12foo",
            "'12foo' is not a size; write bytes or a suffix, such as 512MiB or 2GB",
        ),
        ("serve m --adapter sql", "'sql' is not an adapter; write NAME=SOURCE"),
        ("serve m --adapter m=x", "an adapter must not have the base model's name"),
        ("serve m --tp 0", "--tp 0: at least one process must hold the model"),
        ("serve m --replicas 0", "--replicas 0: at least one copy of the model is needed"),
        ("serve m --device tpu", "device must be auto, cpu or cuda"),
        ("serve m --api-key-file /nowhere", "/nowhere cannot be read: No such file or directory"),
        ("serve m --config /nowhere", "/nowhere cannot be read: No such file or directory"),
        ("serve m --prot 1", "No such option: --prot"),
        ("router --group a:1", "Missing option '--served-model-name'."),
        ("router --served-model-name m", "Missing option '--group'."),
        ("router --served-model-name m --group a:1,", "'a:1,' is not a shard group; write HOST:PORT"),
        ("router --served-model-name m --group a:1 --group a:1", "a shard address is given twice"),
        ("router --group a:1 --served-model-name m", "a is not a loopback address: protect the connection"),
        ("router --group localhost:1 --served-model-name m --connect-timeout 0", "must be above 0"),
        ("router --group localhost:1 --served-model-name m --tls-name x", "of no use without --tls-cert"),
        ("shard m --host 0.0.0.0", "with --tls-cert, --tls-key and --tls-ca, or let it go unprotected"),
        ("shard m --host 0.0.0.0 --plaintext off", "with --plaintext on"),
        ("shard m --tls-cert /dev/null", "belong together: give all three or none"),
        ("serve m --tls-cert /dev/null", "belong together: give all three or none"),
        ("shard m --tls-key /nowhere", "/nowhere cannot be read: No such file or directory"),
        ("shard", "Missing argument 'MODEL'."),
        ("swerve", "No such command 'swerve'."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, message: str, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("loraplex: ")
    assert error.count("\n") == 1
    assert message in error
    assert served == []


def test_a_mistake_in_the_environment_is_found_too(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAPLEX_MAX_RANK", "big")
    assert cli.run(["serve", "m"]) == 2
    assert "'--max-rank': 'big' is not a whole number" in capsys.readouterr().err


def test_a_failed_launch_is_one_line_with_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(shard: ShardConfig, router: RouterConfig, **degrees: int) -> int:
        raise LaunchFailed(7, "the model\nis too round")

    monkeypatch.setattr(cli, "serve", serve)
    assert cli.run(["serve", "m"]) == 7
    assert capsys.readouterr().err == "loraplex: the model is too round\n"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"loraplex {loraplex.__version__}\n"
    for line in ([], ["--help"], ["serve", "--help"], ["shard", "--help"], ["router", "--help"]):
        assert cli.run(line) == 0
        assert capsys.readouterr().out.startswith("Usage: loraplex")


def test_help_shows_defaults_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "For adapters resident on the device. [default: 512MiB]" in text
    assert "[default: 8080]" in text


def test_the_front_door_opens_without_heavy_imports() -> None:
    code = (
        "import sys; from loraplex import cli; cli.run(['--help']); "
        "print(*sorted({'torch', 'numpy', 'transformers', 'grpc', 'aiohttp'} & set(sys.modules)), 'end')"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1].strip() == "end"
