"""What every engine is asked for, and the settings that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BenchFailed
from .model import RANKS

ADAPTERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`requests` requests, `concurrency` at a time, greedy, whatever the model would end with.

    Prompts are random ids below `vocabulary`, drawn from `seed`; adapters come in turn.
    """

    requests: int = 32
    concurrency: int = 16
    prompt_tokens: int = 64
    output_tokens: int = 64
    vocabulary: int = 8000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the comparison: a load on the base or, with ranks, on adapters of these ranks in turn."""

    name: str
    directory: str
    """Where model and adapters are, below the root."""
    ranks: tuple[int, ...]
    load: Load

    @property
    def adapters(self) -> int:
        return ADAPTERS if self.ranks else 0


SETTINGS = (
    Setting("base", "model", (), Load()),
    Setting("mixed", "model", RANKS, Load()),
    Setting("rank8", "model8", (8,), Load()),
    Setting("single", "model", (), Load(requests=4, concurrency=1)),
)


def parse_settings(text: str) -> tuple[Setting, ...]:
    """`base,mixed` as settings. Raises BenchFailed for an unknown one."""
    known = {setting.name: setting for setting in SETTINGS}
    return tuple(_named(name, known) for name in dict.fromkeys(text.split(",")))


def _named(name: str, known: dict[str, Setting]) -> Setting:
    if name not in known:
        raise BenchFailed(f"there is no setting {name!r}; there is {', '.join(known)}")
    return known[name]


def seeds(setting: Setting, rounds: int) -> Sequence[int]:
    """One for each round, and others for every setting: no server finds a prompt in its cache."""
    first = 1 + rounds * next(index for index, known in enumerate(SETTINGS) if known == setting)
    return range(first, first + rounds)
