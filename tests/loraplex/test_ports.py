"""Chosen ports are free, and stay so."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from loraplex import ports
from loraplex.ports import free_port, hold_port, listen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_held_port_is_nobody_elses(host: str) -> None:
    try:
        held = hold_port(host)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    with held, pytest.raises(OSError, match="in use") as caught:
        listen(host, held.getsockname()[1])
    assert caught.value.errno == errno.EADDRINUSE


def test_no_outgoing_connection_gets_a_chosen_port() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(not first <= free_port() <= last for _ in range(50))


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_port("127.0.0.1") as taken:
        other = free_port()
        monkeypatch.setattr(ports, "_outside", lambda: iter([taken.getsockname()[1], other]))
        assert free_port() == other


def test_where_nothing_is_left_outside_the_system_chooses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "_RANGE", everything)
    with hold_port("127.0.0.1") as held:
        assert held.getsockname()[1] > 0


def test_another_fault_is_told() -> None:
    with pytest.raises(OSError, match="assign requested address") as caught:
        hold_port("192.0.2.1")
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_listener_is_reached_at_its_port() -> None:
    with hold_port("127.0.0.1") as held, socket.create_connection(held.getsockname(), 5) as client:
        assert client.getpeername() == held.getsockname()
