"""How a shard process refuses."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex.shard.config import ShardConfig
from loraplex.shard.main import EXIT_REFUSED, run


def test_a_refused_model_is_one_line_and_an_exit_code(
    tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ShardConfig(model=str(tiny_model("bloom")), device="cpu")) == EXIT_REFUSED
    assert "AttentionInterface" in capsys.readouterr().err.splitlines()[-1]


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
        assert run(config) == EXIT_REFUSED
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


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
