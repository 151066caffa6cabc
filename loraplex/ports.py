"""Ports that nobody takes between the moment they are chosen and the moment somebody listens."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
"""Well above what services have by custom."""
_HIGHEST = 65_535
_TRIES = 200


def hold_port(host: str) -> socket.socket:
    """Listen at a free port of `host`, until the socket is closed.

    The port is outside the range from which the system numbers outgoing connections, where there is room: one
    from within may be taken by a connection of anybody's once the socket is closed. Raises OSError.
    """
    for port in chain(_outside(), [0]):
        try:
            return listen(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, "no port is free")


def listen(host: str, port: int) -> socket.socket:
    """Listen at one port. Raises OSError."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def free_port(host: str = "127.0.0.1") -> int:
    """The number of a port that can be listened at."""
    with hold_port(host) as held:
        return int(held.getsockname()[1])


def _outside() -> Iterator[int]:
    """Some ports, drawn, that no outgoing connection is given."""
    first, last = map(int, _RANGE.read_text().split()) if _RANGE.exists() else (_LOWEST, _HIGHEST)
    ports = [*range(_LOWEST, first), *range(last + 1, _HIGHEST + 1)]
    return iter(random.sample(ports, min(_TRIES, len(ports))))
