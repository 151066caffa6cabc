"""What the comparison needs of a peer, and the peers that there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..errors import BenchFailed
from ..server import Launch
from .environment import Environment
from .llama_cpp import LlamaCpp
from .vllm import Vllm

DEFAULT_ROOT = Path("~/.cache/loraplex/peers").expanduser()
PEFT = "peft"
"""transformers with PEFT: no server, nothing to install beside the tests' own tools."""
NAMES = (Vllm.name, LlamaCpp.name, PEFT)


class Servable(Protocol):
    """An engine that serves completions over HTTP."""

    @property
    def name(self) -> str: ...

    @property
    def style(self) -> str:
        """How a request names an adapter: `openai`, by model; `llama.cpp`, by index."""

    def launch(self, base: Path, adapters: Mapping[str, Path], port: int, threads: int) -> Launch:
        """How to serve the model `base`, and adapters by name. Raises BenchFailed."""


class Peer(Servable, Protocol):
    """A servable engine that has to be installed first."""

    @property
    def is_installed(self) -> bool: ...

    def install(self) -> None:
        """Nothing where it is installed; begins afresh where that was interrupted. Raises BenchFailed."""


def peers(root: Path) -> dict[str, Peer]:
    """Every peer that is a server, by name, in its environment below `root`."""
    made: tuple[Peer, ...] = (
        Vllm(Environment(root / "env" / Vllm.name)),
        LlamaCpp(Environment(root / "env" / LlamaCpp.name)),
    )
    return {peer.name: peer for peer in made}


def root_directory(path: Path) -> Path:
    """Absolute, and made where it is missing. Raises BenchFailed where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchFailed(f"--root {path} cannot be made: {error.strerror}") from None
    return path.absolute()


def parse_names(text: str) -> tuple[str, ...]:
    """`vllm,peft` as names. Raises BenchFailed for an unknown one."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in NAMES:
            raise BenchFailed(f"there is no peer {name!r}; there is {', '.join(NAMES)}")
    return names
