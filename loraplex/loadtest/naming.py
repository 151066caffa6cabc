"""How a request tells a server which adapter it wants: the fields that it adds to a body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Naming(Protocol):
    """One server's way to name adapters."""

    def fields(self, adapter: int | None) -> dict[str, Any]:
        """For adapter number `adapter`, or for the base."""


@dataclass(frozen=True, slots=True)
class ByModel:
    """`model` is the adapter's name, or the base's: loraplex, vLLM, SGLang."""

    base: str
    adapters: Sequence[str]

    def fields(self, adapter: int | None) -> dict[str, Any]:
        return {"model": self.base if adapter is None else self.adapters[adapter]}


@dataclass(frozen=True, slots=True)
class ByScale:
    """`lora` gives scales by the index under which llama.cpp's server was started with an adapter.

    Whatever it does not mention has the scale 0; for the base every adapter is mentioned with 0.
    """

    base: str
    count: int

    def fields(self, adapter: int | None) -> dict[str, Any]:
        scales = [(adapter, 1.0)] if adapter is not None else [(index, 0.0) for index in range(self.count)]
        return {"model": self.base, "lora": [{"id": index, "scale": scale} for index, scale in scales]}
