"""From a configuration to a device and its memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraplex.kernels.load import Backend, BackendMissing
from loraplex.kernels.load import load as load_backend
from loraplex.shard import load
from loraplex.shard.config import ShardConfig
from loraplex.shard.errors import ModelRefused


def test_the_kv_budget_of_a_gpu_follows_from_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.devices, "free_memory", lambda device: 1000)
    plain, gpu = ShardConfig(model="m", adapter_memory=400), torch.device("cuda")
    assert load.kv_memory(plain, gpu) == 480
    assert load.kv_memory(ShardConfig(model="m", adapter_memory=2000), gpu) == 0
    assert load.kv_memory(plain, torch.device("cpu")) == 512 * 1024**2
    for device in (gpu, torch.device("cpu")):
        assert load.kv_memory(ShardConfig(model="m", kv_memory=7), device) == 7


def test_auto_serves_on_the_cpu_where_nothing_serves_the_gpu(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without_cupy(device: torch.device) -> Backend:
        if device.type == "cuda":
            raise BackendMissing("CuPy cannot be imported")
        return load_backend(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load, "load_backend", without_cupy)
    loaded = load.load_model(ShardConfig(model=str(tiny_model("llama")), kv_memory=1 << 20))
    assert loaded.device.type == "cpu"
    assert "serving on the CPU: CuPy cannot be imported" in caplog.text
    with pytest.raises(ModelRefused, match="CuPy"):
        load.load_model(ShardConfig(model=str(tiny_model("llama")), device="cuda"))
