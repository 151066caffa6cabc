"""The supervisor with real processes: fake children that answer health checks, die or refuse as told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from loraplex.child import child_environment
from loraplex.keeper import LaunchFailed, RestartPolicy
from loraplex.launch import rank_programs, serve
from loraplex.ports import free_port
from loraplex.router.config import RouterConfig
from loraplex.shard.config import ShardConfig

HERE = Path(__file__).parent
PATIENCE = 30.0
"""Seconds after which a test gives up waiting."""


class Launcher:
    """A launcher in a process of its own, with fake shards and a fake router."""

    def __init__(
        self,
        folder: Path,
        shards: Sequence[tuple[str, ...]],
        router: tuple[str, ...],
        drain: float,
        replicas: bool,
    ) -> None:
        self.journal = folder / "journal"
        self.output = folder / "output"
        router_port, *shard_ports = (free_port() for _ in range(1 + len(shards)))
        plan = {
            "shards": [self._child("shard", *each) for each in zip(shard_ports, shards, strict=True)],
            "router": self._child("router", router_port, router),
            "shard_ports": shard_ports,
            "router_port": router_port,
            "drain_timeout": drain,
            "replicas": replicas,
        }
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "supervise.py"), json.dumps(plan)], stdout=output, stderr=output
            )

    def _child(self, role: str, port: int, flags: tuple[str, ...]) -> list[str]:
        script = str(HERE / "fake_child.py")
        return [sys.executable, script, role, f"--port={port}", f"--journal={self.journal}", *flags]

    @property
    def text(self) -> str:
        return self.output.read_text()

    def events(self, of: str = "") -> list[str]:
        """Journal lines without their pids, such as `shard start`."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event for event in (line.rpartition(" ")[0] for line in lines) if event.startswith(of)]

    def pids(self) -> set[int]:
        return {int(line.rpartition(" ")[2]) for line in self.journal.read_text().splitlines()}

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.text, f"{text!r} in the output:\n{self.text}")

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


Launch = Callable[..., Launcher]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launchers: list[Launcher] = []

    def start(
        *,
        shard: tuple[str, ...] = (),
        others: Sequence[tuple[str, ...]] = (),
        router: tuple[str, ...] = (),
        drain: float = 5.0,
        replicas: bool = False,
    ) -> Launcher:
        launchers.append(Launcher(tmp_path, (shard, *others), router, drain, replicas))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.process.kill()
        launcher.process.wait()
        until(lambda at=launcher: not any(map(alive, at.pids())), "the end of every child")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_starts_the_shard_then_the_router_and_stops_them_the_other_way_round(launch: Launch) -> None:
    launcher = launch(router=("--drain=0.3",))
    launcher.wait_for("\nready\n")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == 0
    assert launcher.events() == [
        *("shard start", "router start", "router term", "router exit", "shard term", "shard exit"),
    ]
    assert not any(map(alive, launcher.pids()))


def test_prefixes_the_lines_of_each_child(launch: Launch) -> None:
    launcher = launch()
    launcher.wait_for("[router] up")
    assert "[shard 0] up" in launcher.text


def test_a_second_signal_ends_the_children_at_once(launch: Launch) -> None:
    launcher = launch(router=("--drain=60",), drain=60.0)
    launcher.wait_for("\nready\n")
    launcher.process.send_signal(signal.SIGINT)
    until(lambda: "router term" in launcher.events(), "the router's SIGTERM")
    started = time.monotonic()
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait() == 0
    assert time.monotonic() - started < 5.0
    assert "router exit" not in launcher.events()
    assert not any(map(alive, launcher.pids()))


def test_a_signal_before_the_shard_is_ready_stops_the_launcher(launch: Launch) -> None:
    launcher = launch()
    until(lambda: "shard start" in launcher.events(), "the shard's start")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == 0
    assert not any(map(alive, launcher.pids()))


def test_restarts_a_dead_shard_under_a_living_router(launch: Launch) -> None:
    launcher = launch(shard=("--deaths=1",))
    launcher.wait_for("shard 0 is ready again")
    assert "shard 0 died (SIGKILL)" in launcher.text
    assert launcher.events("shard") == ["shard start"] * 2
    assert launcher.events("router") == ["router start"]
    assert launcher.process.poll() is None


def test_gives_up_on_a_shard_that_keeps_dying(launch: Launch) -> None:
    launcher = launch(shard=("--deaths=99", "--die-after=0.4"))
    assert launcher.wait() == 1
    assert launcher.events("shard") == ["shard start"] * 3
    assert "shard 0 died 3 times in a row, giving up; its last line: the disk is on fire" in launcher.text
    assert not any(map(alive, launcher.pids()))


def test_does_not_retry_a_shard_that_refuses(launch: Launch) -> None:
    launcher = launch(shard=("--refusals=1",))
    assert launcher.wait() == 2
    assert launcher.text.splitlines()[-1] == "failed: shard 0 refused to start: the model is too round"
    assert launcher.events() == ["shard start"]


def test_a_dead_router_ends_the_server(launch: Launch) -> None:
    launcher = launch(router=("--deaths=1",))
    assert launcher.wait() == 1
    assert launcher.text.splitlines()[-1] == "failed: router died (SIGKILL): the disk is on fire"
    assert "shard exit" in launcher.events()
    assert not any(map(alive, launcher.pids()))


def test_a_killed_launcher_leaves_no_child(launch: Launch) -> None:
    launcher = launch()
    launcher.wait_for("\nready\n")
    assert all(map(alive, launcher.pids()))
    launcher.process.kill()
    launcher.wait()
    until(lambda: not any(map(alive, launcher.pids())), "the end of both children")
    assert {"shard term", "router term"} <= set(launcher.events())


def test_what_a_dead_shard_had_started_is_ended_before_the_next_one(launch: Launch, tmp_path: Path) -> None:
    pid_file = tmp_path / "grandchild"
    launcher = launch(shard=("--deaths=1", f"--grandchild={pid_file}"))
    until(lambda: pid_file.exists() and pid_file.read_text() != "", "the grandchild")
    first = int(pid_file.read_text())
    launcher.wait_for("shard 0 is ready again")
    assert int(pid_file.read_text()) != first
    assert not alive(first)


def test_a_row_of_deaths_waits_longer_each_time_up_to_a_limit() -> None:
    policy = RestartPolicy(first_delay=0.5, max_delay=3.0)
    assert [policy.delay(deaths) for deaths in (1, 2, 3, 4, 9)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("flag", ["port", "grpc_port"])
def test_a_taken_port_is_refused_before_anything_starts(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"port": 0, "grpc_port": 0, flag: port}
        config = RouterConfig(served_model_name="m", groups=(("127.0.0.1:0",),), **ports)
        with pytest.raises(
            LaunchFailed, match=rf"port {port}: Address already in use; .*--{flag.replace('_', '-')}"
        ):
            serve(ShardConfig(model="m"), config)


def test_settings_in_the_environment_do_not_reach_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_PORT", "1")
    environment = child_environment()
    assert {name for name in environment if name.startswith("LORAPLEX_")} == {"LORAPLEX_LIFELINE"}


def test_children_of_an_uninstalled_checkout_find_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(HERE.parent.parent), str(tmp_path)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert child_environment()["PYTHONPATH"] == str(HERE.parent.parent)
    assert "PYTHONPATH" in child_environment()
    installed = tmp_path / "loraplex-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: loraplex\nVersion: 0.1.0\n")
    assert "PYTHONPATH" not in child_environment()
    assert os.environ.get("PYTHONPATH") is None


def test_the_ranks_of_all_groups_share_cores_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    groups = [[9001, 9002], [9003, 9004]]
    shard = ShardConfig(model="m", device="auto")
    programs = [rank_programs(shard, groups, index) for index in range(2)]
    labels = [program.label for group in programs for program in group]
    assert labels == ["group 0 shard 0", "group 0 shard 1", "group 1 shard 0", "group 1 shard 1"]
    devices = [program.environment["CUDA_VISIBLE_DEVICES"] for group in programs for program in group]
    assert devices == ["4", "5", "6", "7"]
    cores = [
        [flag for flag in program.argv if flag.startswith("--core=")]
        for group in programs
        for program in group
    ]
    assert cores == [[f"--core={2 * place}", f"--core={2 * place + 1}"] for place in range(4)]
    masters = [flag for group in programs for flag in group[0].argv if flag.startswith("--master=")]
    assert len(set(masters)) == 2


def test_replicas_of_one_rank_meet_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    programs = [
        rank_programs(ShardConfig(model="m", device="cpu"), [[1], [2]], index)[0] for index in range(2)
    ]
    assert [program.label for program in programs] == ["group 0 shard 0", "group 1 shard 0"]
    for index, program in enumerate(programs):
        assert {"--threads=1", f"--core={index}", f"--port={index + 1}"} <= set(program.argv)
        assert not any("--master" in flag or "--rank" in flag for flag in program.argv)
        assert not program.environment


def test_a_lone_shard_is_left_as_it_is() -> None:
    (program,) = rank_programs(ShardConfig(model="m"), [[5]], 0)
    assert program.label == "shard 0"
    assert not any(flag.startswith(("--core", "--threads")) for flag in program.argv)


def test_a_group_that_keeps_dying_is_not_given_up_while_another_serves(launch: Launch) -> None:
    launcher = launch(shard=("--deaths=99",), others=[()], replicas=True)
    launcher.wait_for("ready\n")
    until(lambda: launcher.text.count("group 0 shard 0 died") >= 4, "four deaths in a row")
    assert launcher.process.poll() is None
    assert launcher.events("router") == ["router start"]
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == 0
