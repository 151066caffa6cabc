"""One case of the matrix as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bench import Maker


@dataclass(frozen=True, kw_only=True)
class Case:
    """Adapters that must be served as PEFT computes them, or one that must be refused.

    Each of `makes` is served alone, and all of them in one batch with the base and another adapter.
    """

    row: int
    name: str
    makes: tuple[Maker, ...]
    base: str = "llama"
    moves: bool = True
    """Its logprobs differ from the base's; else they are the base's."""
    exact: bool = False
    """Alone it is the base, bit for bit."""
    warns: str = ""
    """A pattern that some warning of it matches; without one there are no warnings."""
    kind: str = ""
    """A pattern of what it calls itself."""
    refused: tuple[str, ...] = ()
    """Patterns that the message matches: what is wrong, and what to do. None: it is served."""
    max_rank: int | None = None
    """The server's limit, where it is not the usual one."""

    @property
    def id(self) -> str:
        said = "-refused" if self.refused and "refused" not in self.name else ""
        return f"{self.row:02}-{self.name}{said}"


def served(row: int, name: str, *makes: Maker, **more: object) -> Case:
    """A case whose adapters are served. `more`: other fields of Case."""
    return Case(row=row, name=name, makes=makes, **more)  # type: ignore[arg-type]


def refused(row: int, name: str, make: Maker, *patterns: str, **more: object) -> Case:
    """A case whose adapter is refused, in words that all patterns match. `more`: other fields of Case."""
    assert patterns
    return Case(row=row, name=name, makes=(make,), refused=patterns, **more)  # type: ignore[arg-type]


def ids(cases: Sequence[Case]) -> list[str]:
    return [case.id for case in cases]
