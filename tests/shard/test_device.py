"""What is said of a device, and small tensors on their way to it."""

from __future__ import annotations

import threading

import pytest
import torch

from loraplex.shard.device import DeviceThread, resolve, send

CPU = torch.device("cpu")


def test_auto_takes_a_gpu_where_torch_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve("auto").type == kind
        assert resolve("cpu").type == "cpu"


def test_tensors_are_sent_in_one_copy() -> None:
    tensors = [
        torch.arange(5),
        torch.arange(6, dtype=torch.int32).view(2, 3)[:, :2],
        torch.empty(0, dtype=torch.int64),
        torch.tensor([True]),
        torch.arange(3, dtype=torch.float32),
    ]
    sent = send(tensors, CPU)
    for one, other in zip(tensors, sent, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert len({each.untyped_storage().data_ptr() for each in sent}) == 1
    assert send([], CPU) == []


def test_work_can_be_waited_for_without_a_loop() -> None:
    thread = DeviceThread()
    thread.start()
    assert thread.run(lambda: threading.current_thread().name) == "device"
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)
    thread.stop()
