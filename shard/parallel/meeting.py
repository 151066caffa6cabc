"""How the ranks of one model find each other, and see that they were started alike."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed has them undeclared

from ...proto.credentials import is_loopback
from ..errors import ModelRefused, RanksLost
from .ranks import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where and as whom a rank meets the others."""

    rank: int
    size: int
    master: str
    """host:port, where rank 0 listens."""
    patience: float
    """Seconds that the others get to arrive, and that one collective may take."""
    facts: Mapping[str, str]
    """What must be the same on every rank, by its name in a sentence."""
    store_prefix: str = ""
    """What keys begin with in a store that runs at `master` already; empty: rank 0 runs one there."""


def meet(meeting: Meeting, device: torch.device) -> ProcessGroup:
    """Wait for the other ranks, and form a group with them.

    Raises RanksLost where they do not come, ModelRefused where they were started with other settings.
    """
    host, _, port = meeting.master.rpartition(":")
    host, limit = host.strip("[]"), timedelta(seconds=meeting.patience)
    _prefer_interface_to(host)
    try:
        store = _open_store(meeting, host, int(port), limit)
        facts = _exchange(store, meeting)
    except RuntimeError as error:  # of torch.distributed: its DistError and what it wraps
        raise _not_met(meeting, error) from error
    _compare(facts)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=meeting.rank, world_size=meeting.size, timeout=limit
        )
        board = StoreBoard(_join_store(meeting, host, int(port), limit), meeting.rank)
        group = ProcessGroup(meeting.rank, meeting.size, board)
        group.least(meeting.rank)
    except RuntimeError as error:
        raise _not_met(meeting, error) from error
    return group


class StoreBoard:
    """`Board` in the store at which the ranks met, over a connection of its own."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = PrefixStore("board", store)
        self._rank = rank

    def post(self, key: str, value: bytes) -> None:
        with self._reached(key):
            self._store.set(key, b64encode(value).decode())

    def read(self, key: str) -> bytes:
        with self._reached(key):
            return b64decode(self._store.get(key))

    def remove(self, key: str) -> None:
        with self._reached(key):
            self._store.delete_key(key)

    @contextmanager
    def _reached(self, key: str) -> Iterator[None]:
        """Raises RanksLost where the store does not answer, or nobody posts."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RanksLost(f"rank {self._rank} does not get {key}: {reason}") from error


def _open_store(meeting: Meeting, host: str, port: int, limit: timedelta) -> Store:
    """Where the ranks leave messages for each other. Raises RanksLost where nobody can or does listen."""
    if meeting.rank == 0 and not meeting.store_prefix:
        listener = _listen(meeting, host, port).detach()
        return TCPStore(host, port, meeting.size, is_master=True, timeout=limit, master_listen_fd=listener)
    _await_listener(meeting, host, port)
    if meeting.store_prefix:
        return _join_store(meeting, host, port, limit)
    return TCPStore(host, port, meeting.size, is_master=False, timeout=limit)


def _join_store(meeting: Meeting, host: str, port: int, limit: timedelta) -> Store:
    """A store that runs and waits for nobody any more."""
    store = TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    return PrefixStore(meeting.store_prefix, store) if meeting.store_prefix else store


def _await_listener(meeting: Meeting, host: str, port: int) -> None:
    """torch would wait as long, but show each try that fails with its C++ stack."""
    deadline = time.monotonic() + meeting.patience
    while True:
        try:
            socket.create_connection((host, port), max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RanksLost(
                    f"rank {meeting.rank} of {meeting.size} found nobody at {meeting.master} within "
                    f"{meeting.patience:g} s: {_reason_of(error)}"
                ) from None
        time.sleep(0.2)


def _listen(meeting: Meeting, host: str, port: int) -> socket.socket:
    """On loopback alone where the others are on this machine: the store would listen on every address."""
    try:
        if is_loopback(host):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise RanksLost(
            f"rank 0 cannot listen for the others at {meeting.master}: {_reason_of(error)}"
        ) from None


def _reason_of(error: OSError) -> str:
    return (error.strerror or str(error)).partition(" (")[0]


def _not_met(meeting: Meeting, error: RuntimeError) -> RanksLost:
    reason = str(error).strip().partition("\n")[0]
    return RanksLost(
        f"rank {meeting.rank} of {meeting.size} did not meet the others at {meeting.master}: {reason}"
    )


def _exchange(store: Store, meeting: Meeting) -> list[Mapping[str, str]]:
    """Every rank's facts."""
    store.set(f"facts of {meeting.rank}", json.dumps(dict(meeting.facts)))
    return [json.loads(store.get(f"facts of {rank}")) for rank in range(meeting.size)]


def _compare(facts: Sequence[Mapping[str, str]]) -> None:
    for rank, own in enumerate(facts):
        for name, value in facts[0].items():
            if own.get(name) != value:
                raise ModelRefused(
                    f"rank {rank} and rank 0 differ in {name} ({own.get(name)} and {value}): "
                    "start every rank with the same model and settings"
                )


def _prefer_interface_to(host: str) -> None:
    """Have gloo talk over the interface that leads to rank 0, unless the environment names another one: by
    itself it takes the one that this machine's name stands for."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        mine = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _address_of(name, probe) == mine:
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return


_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address; see netdevice(7)."""


def _address_of(interface: str, probe: socket.socket) -> str:
    """IPv4; empty where it has none."""
    try:
        reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return ""
    return socket.inet_ntoa(reply[20:24])
