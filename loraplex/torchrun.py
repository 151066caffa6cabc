"""A shard that torchrun has started: its place in the group, and its GPU, as torchrun's variables say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import lifeline
from .settings import SettingError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GIVEN = {"rank": 0, "world_size": 1, "master": ""}
"""Settings that come before the variables, and what they are where the user gives none."""
_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Placed:
    """A shard's settings by field, and what its environment must be before torch is imported."""

    values: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


def place(values: Mapping[str, Any], environ: Mapping[str, str]) -> Placed:
    """The settings of a shard with the place that torchrun gave it, its port as many above `port` as its
    machine has ranks before it. Unchanged without torchrun's variables, or where a user or a launcher has
    placed it.

    Raises:
        SettingError: a variable has a value that torchrun does not give.
    """
    if any(name not in environ for name in _VARIABLES) or lifeline.VARIABLE in environ:
        return Placed(values)
    if any(values[name] != default for name, default in _GIVEN.items()):
        return Placed(values)
    local = _number("LOCAL_RANK", environ)
    host = environ["MASTER_ADDR"]
    placed = {
        "rank": _number("RANK", environ),
        "world_size": _number("WORLD_SIZE", environ),
        "master": f"{f'[{host}]' if ':' in host else host}:{_number('MASTER_PORT', environ)}",
        "store_prefix": _store_prefix(environ),
        "port": values["port"] + local if values["port"] else 0,
    }
    gpu = {} if values["device"] == "cpu" else _own_gpu(local, environ.get(_GPUS))
    return Placed({**values, **placed}, gpu)


def _number(name: str, environ: Mapping[str, str]) -> int:
    text = environ[name]
    if not text.isdecimal():
        raise SettingError(f"{name}={text} in the environment is not a number; torchrun sets one")
    return int(text)


def _store_prefix(environ: Mapping[str, str]) -> str:
    """torchrun's agent keeps a store at MASTER_PORT, for all attempts to start the ranks."""
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    run, attempt = (environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return f"loraplex/{run}/{attempt}"


def _own_gpu(local: int, visible: str | None) -> dict[str, str]:
    """One GPU for each rank on a machine. One alone, or none, is what somebody chose for this process."""
    if visible is None:
        return {_GPUS: str(local)}
    devices = visible.split(",")
    if len(devices) == 1:
        return {}
    if local >= len(devices):
        raise SettingError(f"{_GPUS}={visible} has no GPU for local rank {local}")
    return {_GPUS: devices[local]}
