"""How a shard process refuses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraplex.shard.config import ShardConfig
from loraplex.shard.errors import ModelRefused
from loraplex.shard.load import LoadedModel
from loraplex.shard.main import EXIT_FATAL, EXIT_REFUSED, run

from ..fakes.certificates import Identity


def test_a_refused_model_is_one_line_and_an_exit_code(
    tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ShardConfig(model=str(tiny_model("bloom")), device="cpu")) == EXIT_REFUSED
    assert "AttentionInterface" in capsys.readouterr().err.splitlines()[-1]


def test_the_model_is_loaded_by_the_thread_that_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A second thread that has computed in parallel slows every step."""
    seen = []

    def load(config: ShardConfig) -> LoadedModel:
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        raise ModelRefused("as agreed")

    before = torch.get_num_threads()
    assert run(ShardConfig(model="m", threads=3), load) == EXIT_REFUSED
    torch.set_num_threads(before)
    assert seen == [("device", 3)]
    assert capsys.readouterr().err == "loraplex shard: as agreed\n"


def test_a_device_without_a_backend_is_refused_by_name(
    tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ShardConfig(model=str(tiny_model("llama")), device="cuda")) == EXIT_REFUSED
    assert "cuda" in capsys.readouterr().err


def test_a_taken_port_is_one_line_and_an_exit_code(
    tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ShardConfig(model=str(tiny_model("llama")), device="cpu", port=port, kv_memory=1 << 20)
        assert run(config) == EXIT_FATAL, "another try may find it free"
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_certificates_are_read_before_the_model(
    identity: Identity, stranger: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(config: ShardConfig) -> LoadedModel:
        raise AssertionError("it is too early to load a model")

    files = {"tls_cert": identity.tls_cert, "tls_key": stranger.tls_key, "tls_ca": identity.tls_ca}
    assert run(ShardConfig(model="m", **files), load) == EXIT_REFUSED
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"loraplex shard: --tls-key {stranger.tls_key} does not belong to")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"),
        ("dtype", "int8"),
        ("port", 70000),
        ("kv_memory", 0),
        ("max_model_len", 0),
        ("model", ""),
    ],
)
def test_the_configuration_is_checked_where_it_is_declared(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field.replace("_", ".")):
        ShardConfig(**({"model": "m"} | {field: value}))  # type: ignore[arg-type]
