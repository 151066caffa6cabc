"""Draw a sweep: throughput and latency against what changed in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Report, Summary

_AXES = {"adapters": "adapters", "rate": "requests sent per second"}
_LATENCIES: Mapping[str, Callable[[Summary], float | None]] = {
    "first token p50": lambda made: made.first_token.p50,
    "first token p99": lambda made: made.first_token.p99,
    "per output token p50": lambda made: made.per_token.p50,
}
_SIZE = (7.0, 4.5)


def draw(report: Report, folder: Path) -> list[Path]:
    """Write throughput.png and latency.png into `folder`, one line for each server; answers their paths.

    Raises OSError where they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_throughput(report, folder / "throughput.png"), _latency(report, folder / "latency.png")]


def _throughput(report: Report, path: Path) -> Path:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    _lines(axes, report, lambda made: made.tokens_per_second)
    axes.set_ylabel("output tokens/s")
    return _save(figure, path)


def _latency(report: Report, path: Path) -> Path:
    figure = Figure(figsize=(_SIZE[0], 1.6 * _SIZE[1]), layout="constrained")
    for axes, (label, value) in zip(
        figure.subplots(len(_LATENCIES), sharex=True), _LATENCIES.items(), strict=True
    ):
        _lines(axes, report, value)
        axes.set_ylabel(f"{label}, ms")
        axes.yaxis.set_major_formatter(lambda seconds, _: f"{1000 * seconds:g}")
        axes.label_outer()
    return _save(figure, path)


def _lines(axes: Axes, report: Report, value: Callable[[Summary], float | None]) -> None:
    """One line for each server; points where it has no value are left out."""
    names = dict.fromkeys(name for _, summaries in report.points for name in summaries)
    for name in names:
        drawn = [
            (report.sweep.value(point), found)
            for point, summaries in report.points
            if name in summaries and (found := value(summaries[name])) is not None
        ]
        axes.plot([x for x, _ in drawn], [y for _, y in drawn], marker="o", label=name)
    if report.sweep.axis == "adapters":
        axes.set_xscale("symlog", base=2, linthresh=1)
    marks = [report.sweep.value(point) for point, _ in report.points]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_AXES[report.sweep.axis or "adapters"])
    axes.grid(alpha=0.3)
    axes.legend()


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
