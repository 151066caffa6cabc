"""`loraplex serve` of the bundled model on a GPU, over REST."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest
import torch

from loraplex.demo import ADAPTERS, MODEL_DIR
from loraplex.demo.tasks import TASKS

from ..e2e.server import Server, serving
from ..e2e.test_demo import outputs
from .checkout import CHECKOUT

HELD_OUT = 20


@pytest.fixture(scope="module")
def server(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    for name in ("msgspec", "grpc_health", "grpc_reflection", "grpc_status"):
        pytest.importorskip(name)
    arguments = [str(MODEL_DIR), "--served-model-name", "base", "--device", device.type]
    for name, path in ADAPTERS.items():
        arguments += ["--adapter", f"{name}={path}"]
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(arguments, log, env=CHECKOUT) as server:
        yield server


def test_mixed_batches_of_every_adapter_and_the_base(server: Server) -> None:
    """All at once: each adapter right on its own task, and the base on none."""
    examples = {name: task.held_out(HELD_OUT) for name, task in TASKS.items()}
    asked = [(name, index) for index in range(HELD_OUT) for name in TASKS]
    adapted = [(name, examples[name][index]) for name, index in asked]
    base = [("base", examples[name][index]) for name, index in asked]
    texts = asyncio.run(outputs(server, [*adapted, *base]))
    right = {"adapters": 0, "base": 0}
    for (name, index), own, plain in zip(asked, texts[: len(asked)], texts[len(asked) :], strict=True):
        right["adapters"] += TASKS[name].is_right(examples[name][index], own)
        right["base"] += TASKS[name].is_right(examples[name][index], plain)
    assert right["adapters"] >= 0.95 * len(asked), right
    assert right["base"] <= 0.05 * len(asked), right
    assert server.metrics()["loraplex_step_adapters_max"] == len(ADAPTERS)


def test_steps_are_captured_and_fused(server: Server) -> None:
    log = server.log.read_text(errors="replace")
    assert re.search(r"captured \d+ decode steps", log), log[-4000:]
    assert "the forward pass is fused" in log, log[-4000:]
