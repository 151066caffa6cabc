"""Routers and shards that are started one by one: what ends them, and torchrun as the launcher of ranks."""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from loraplex.demo import MODEL_DIR
from loraplex.ports import free_port

from ..fakes.shard import make_info
from ..fakes.shard_server import FakeServicer, fake_server
from .parts import LORAPLEX, complete, gone, running

TORCHRUN = (sys.executable, "-P", "-m", "torch.distributed.run")


def front(*addresses: str, port: int = 0) -> list[str]:
    """The command line of a router."""
    words = [*LORAPLEX, "router", "--served-model-name", "base", "--port", str(port), "--grpc-port", "0"]
    return [*words, "--group", ",".join(addresses)]


def test_a_router_before_nobody_gives_up(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with running([*front(address), "--connect-timeout", "1"], tmp_path / "log") as router:
        assert router.wait() == 1
        assert router.last_line.startswith(
            f"loraplex router: no shard answers at {address} after 1 s (last error: UNAVAILABLE: "
        )
        assert "refused" in router.last_line


async def test_a_router_refuses_ranks_that_differ(tmp_path: Path) -> None:
    infos = [make_info(), make_info()]
    for rank, info in enumerate(infos):
        info.rank, info.world_size = rank, 2
    infos[1].dtype = "float16"
    async with fake_server(FakeServicer(infos[0])) as first, fake_server(FakeServicer(infos[1])) as second:
        with running(front(first.address, second.address), tmp_path / "log") as router:
            assert await asyncio.to_thread(router.wait) == 2
    line = f"loraplex router: rank 1 and rank 0 differ in dtype: float16 and {infos[0].dtype}"
    assert router.last_line == line


@pytest.mark.parametrize("rendezvous", ["static", "standalone"])
def test_torchrun_starts_ranks_for_a_router(tmp_path: Path, rendezvous: str) -> None:
    """torchrun's own store is at MASTER_PORT: the ranks meet in it."""
    base, port = free_ports_in_a_row(2), free_port()
    where = ["--standalone"] if rendezvous == "standalone" else ["--master-port", str(free_port())]
    shard = ["shard", str(MODEL_DIR), "--device", "cpu", "--dtype", "float32", "--kv-memory", "32MiB"]
    command = [*TORCHRUN, *where, "--nproc-per-node", "2", "-m", "loraplex", *shard, "--port", str(base)]
    with (
        running(command, tmp_path / "shards") as ranks,
        running(
            front(f"127.0.0.1:{base}", f"127.0.0.1:{base + 1}", port=port), tmp_path / "router"
        ) as router,
    ):
        assert complete(f"http://127.0.0.1:{port}", "base", router), ranks.text
        pids = ranks.tree()
        assert router.stop() == 0
        ranks.stop()
        assert gone(pids)


def free_ports_in_a_row(count: int) -> int:
    """The first of some ports that are free now."""
    while True:
        first = free_port()
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
