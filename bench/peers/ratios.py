"""From turns to ratios. Rates drift with the machine, so only turns of one round are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .turns import Turn

HEAD = (
    "| setting | engine | tokens/s (by round) | first token, ms | per token, ms | ours is … times as fast |\n"
    "|---|---|---|---:|---:|---|"
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast one engine is as another: over rounds, the median and both ends."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Sequence[Turn], other: Sequence[Turn]) -> Ratio:
        """Turn by turn. Rounds that only one of them finished do not count; one at least must."""
        values = [
            mine.tokens_per_second / theirs.tokens_per_second
            for mine, theirs in zip(first, other, strict=False)
        ]
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One setting: every engine's turns by round. The others are measured against the first engine."""

    setting: str
    turns: Mapping[str, Sequence[Turn]]

    def ratio(self, name: str) -> Ratio | None:
        """The first engine's rate over that of `name`; None for itself, or where either has no turn."""
        first = next(iter(self.turns))
        if name == first or not self.turns[first] or not self.turns[name]:
            return None
        return Ratio.of(self.turns[first], self.turns[name])

    def rows(self) -> list[str]:
        """Markdown, one row an engine; an engine without a turn has none."""
        return [self._row(name, turns) for name, turns in self.turns.items() if turns]

    def json(self) -> dict[str, Any]:
        """For a file. Times are in seconds."""
        engines = {}
        for name, turns in self.turns.items():
            ratio = self.ratio(name)
            engines[name] = {
                "turns": [asdict(turn) for turn in turns],
                "ratio": asdict(ratio) if ratio else None,
            }
        return {"setting": self.setting, "engines": engines}

    def _row(self, name: str, turns: Sequence[Turn]) -> str:
        rates = [turn.tokens_per_second for turn in turns]
        by_round = ", ".join(f"{rate:.0f}" for rate in rates)
        cells = (
            self.setting,
            name,
            f"{median(rates):.1f} ({by_round})",
            _milliseconds([turn.first_token for turn in turns]),
            _milliseconds([turn.per_token for turn in turns]),
            str(self.ratio(name) or ""),
        )
        return "| " + " | ".join(cells) + " |"


def table(comparisons: Sequence[Comparison]) -> str:
    """All settings in one Markdown table."""
    return "\n".join([HEAD, *(row for comparison in comparisons for row in comparison.rows())])


def _milliseconds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{1000 * median(known):.1f}" if known else ""
