"""What the records of a benchmark amount to: figures, tables, JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..adapter_tools.text import table
from .client import Record
from .measure import Run
from .plan import Point, Sweep

LATE_SECONDS = 0.1
"""A client that sends so much too late measures itself."""
_PERCENTILES = "p50 p90 p99, ms"


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Percentiles by linear interpolation between order statistics, in seconds; None without values."""

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Quantiles:
        known = [value for value in values if value is not None]
        return cls(*np.percentile(known, (50, 90, 99)).tolist()) if known else cls(None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One server at one point, all rounds together. Latencies are of complete answers only."""

    finished: int
    failed: int
    unsent: int
    """Wanted, but cut off by an interrupt."""
    seconds: float
    """Sum over the rounds of the time from the first request to the end of the last answer."""
    adapters: int
    """Different adapters that were asked for."""
    requests_per_second: float
    tokens_per_second: float
    tokens_per_second_by_round: tuple[float, ...]
    first_token: Quantiles
    per_token: Quantiles
    longest_gap: Quantiles
    seconds_per_request: Quantiles
    attained: float
    """Share of all requests that were sent whose first token came within the limit; a failed one did not."""
    satisfaction: float
    """Mean over the same of max(0, 1 - (t / limit)²), t the time to the first token; 0 for a failed one."""
    late: float
    errors: Mapping[str, int]
    """Failures by kind, the most frequent first."""
    first_messages: Mapping[str, str]
    """The first message of each kind."""


def summary(runs: Sequence[Run], limit: float) -> Summary:
    """The figures of the runs of one server at one point, with `limit` seconds for the first token.

    Attainment and satisfaction as in S-LoRA (arXiv 2311.03285), slora/utils/metric.py in its repository.
    """
    records = [record for run in runs for record in run.records]
    complete = [record for record in records if record.failure is None]
    failures = [record.failure for record in records if record.failure is not None]
    seconds = sum(run.seconds for run in runs)
    firsts = np.array([record.first_token for record in complete], dtype=np.float64)
    sent = max(len(records), 1)
    return Summary(
        finished=len(complete),
        failed=len(failures),
        unsent=sum(len(run.trace.requests) for run in runs) - len(records),
        seconds=seconds,
        adapters=len({record.request.adapter for record in records} - {None}),
        requests_per_second=_rate(len(complete), seconds),
        tokens_per_second=_rate(_tokens(complete), seconds),
        tokens_per_second_by_round=tuple(_rate(_tokens(run.records), run.seconds) for run in runs),
        first_token=Quantiles.of(record.first_token for record in complete),
        per_token=Quantiles.of(record.per_token for record in complete),
        longest_gap=Quantiles.of(record.longest_gap for record in complete),
        seconds_per_request=Quantiles.of(record.seconds for record in complete),
        attained=float((firsts < limit).sum()) / sent,
        satisfaction=float(np.maximum(0.0, 1 - (firsts / limit) ** 2).sum()) / sent,
        late=max((run.late for run in runs), default=0.0),
        errors=dict(Counter(failure.kind for failure in failures).most_common()),
        first_messages={failure.kind: failure.message for failure in reversed(failures)},
    )


@dataclass(frozen=True, slots=True)
class Report:
    """Summaries by point, and by the name of the server."""

    sweep: Sweep
    points: tuple[tuple[Point, Mapping[str, Summary]], ...]
    limit: float

    @classmethod
    def of(cls, sweep: Sweep, runs: Sequence[Run], limit: float) -> Report:
        """What has been measured of each point; points without any request are left out."""
        points = []
        for point in sweep.points:
            names = dict.fromkeys(run.target.name for run in runs if run.point == point and run.records)
            summaries = {name: summary(_of(runs, point, name), limit) for name in names}
            if summaries:
                points.append((point, summaries))
        return cls(sweep, tuple(points), limit)

    @property
    def any_without_answer(self) -> bool:
        """Some server completed nothing at some point, or nothing was measured at all."""
        return not self.points or any(
            not made.finished for _, summaries in self.points for made in summaries.values()
        )

    def text(self) -> str:
        """Tables for people: one for each point, then the ratios where there are several servers."""
        parts = [self._point(point, summaries) for point, summaries in self.points]
        ratios = [row for point, summaries in self.points for row in self._ratios(point, summaries)]
        if ratios:
            head = (self.sweep.axis or "", "server", "tokens/s", "TTFT p50", "TPOT p50")
            first = 0 if self.sweep.axis else 1
            parts.append("ratios to the first server (tokens/s: more is better; times: less is better)")
            parts.append(table(head[first:], [row[first:] for row in ratios]))
        return "\n\n".join(parts)

    def json(self) -> list[dict[str, Any]]:
        """The figures by point, for a file. Times are in seconds."""
        return [
            {
                "spec": asdict(point.spec),
                "adapters": point.adapters,
                "axis": self.sweep.axis,
                "value": self.sweep.value(point) if self.sweep.axis else None,
                "servers": {name: asdict(made) for name, made in summaries.items()},
            }
            for point, summaries in self.points
        ]

    def _point(self, point: Point, summaries: Mapping[str, Summary]) -> str:
        columns = [_figures(made, self.limit) for made in summaries.values()]
        rows = [(label, *(column[label] for column in columns)) for label in columns[0]]
        parts = [table((self.sweep.label(point), *summaries), [row for row in rows if any(row[1:])])]
        for name, made in summaries.items():
            parts += [
                f"{name}: {count} × {kind}, the first: {made.first_messages[kind]}"
                for kind, count in made.errors.items()
            ]
            if made.late > LATE_SECONDS:
                parts.append(f"{name}: the client sent up to {made.late:.2f} s late; it measures itself too")
        return "\n".join(parts)

    def _ratios(self, point: Point, summaries: Mapping[str, Summary]) -> list[tuple[str, ...]]:
        if len(summaries) < 2:
            return []
        first = next(iter(summaries.values()))
        value = f"{self.sweep.value(point):g}" if self.sweep.axis else ""
        return [
            (
                value,
                name,
                _ratio(made.tokens_per_second, first.tokens_per_second),
                _ratio(made.first_token.p50, first.first_token.p50),
                _ratio(made.per_token.p50, first.per_token.p50),
            )
            for name, made in summaries.items()
        ]


def requests_json(sweep: Sweep, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every request of every run, for a file; times in seconds from the start of its run."""
    return [
        {
            "server": run.target.name,
            "point": sweep.points.index(run.point),
            "seconds": run.seconds,
            "requests": [_request_json(record, run.started) for record in run.records],
        }
        for run in runs
    ]


def _request_json(record: Record, started: float) -> dict[str, Any]:
    return {
        **asdict(record.request),
        "sent": record.sent - started,
        "ended": record.ended - started,
        "first_token": record.first_token,
        "per_token": record.per_token,
        "chunks": len(record.arrivals),
        "tokens": record.tokens,
        "finish": record.finish,
        "failure": asdict(record.failure) if record.failure else None,
    }


def _figures(made: Summary, limit: float) -> dict[str, str]:
    """Label and text of each figure; the text is empty where there is nothing to say."""
    rounds = made.tokens_per_second_by_round
    return {
        "requests finished": str(made.finished),
        "requests failed": str(made.failed),
        "cut off": str(made.unsent) if made.unsent else "",
        "adapters asked for": str(made.adapters) if made.adapters else "",
        "seconds": f"{made.seconds:.2f}",
        "requests/s": f"{made.requests_per_second:.2f}",
        "output tokens/s": f"{made.tokens_per_second:.1f}",
        "  by round": " ".join(f"{rate:.1f}" for rate in rounds) if len(rounds) > 1 else "",
        f"first token (TTFT) {_PERCENTILES}": _times(made.first_token),
        f"per token (TPOT) {_PERCENTILES}": _times(made.per_token),
        f"longest gap {_PERCENTILES}": _times(made.longest_gap),
        f"whole request {_PERCENTILES}": _times(made.seconds_per_request),
        f"first token within {limit:g} s": f"{100 * made.attained:.1f}%",
        "satisfaction": f"{made.satisfaction:.3f}",
    }


def _times(quantiles: Quantiles) -> str:
    values = (quantiles.p50, quantiles.p90, quantiles.p99)
    return "  ".join(f"{1000 * value:.1f}" for value in values if value is not None)


def _of(runs: Sequence[Run], point: Point, name: str) -> list[Run]:
    return [run for run in runs if run.point == point and run.target.name == name]


def _tokens(records: Sequence[Record]) -> int:
    """Output tokens of complete answers."""
    return sum(record.tokens or 0 for record in records if record.failure is None)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def _ratio(value: float | None, first: float | None) -> str:
    return "" if value is None or not first else f"{value / first:.2f}"
