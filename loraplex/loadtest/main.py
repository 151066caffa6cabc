"""`loraplex bench` from a plan to its exit code: measure, print, write."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from .. import __version__
from ..adapter_tools.errors import REFUSED, UNUSABLE, ToolFailed
from .measure import Run, measure
from .plan import Plan
from .report import Report, requests_json

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def run(plan: Plan, *, json: Path | None, plots: Path | None) -> int:
    """Measure, print the tables, write the files; answers the exit code.

    0: every server completed something at every point; 1: one did not; 130: interrupted, after a report of
    what there is. Raises ToolFailed where a server does not answer at all or a file cannot be written.
    """
    runs: list[Run] = []
    interrupted = False
    try:
        asyncio.run(measure(plan, runs))
    except KeyboardInterrupt:
        interrupted = True
    report = Report.of(plan.sweep, runs, plan.first_token_limit)
    if interrupted:
        what = "this is what there is:" if report.points else "no request had ended"
        print(f"interrupted; {what}", file=sys.stderr)
    if report.points:
        print(report.text())
    try:
        if json is not None:
            json.write_bytes(_document(plan, report, runs, interrupted=interrupted))
        if plots is not None and report.points:
            from .plots import draw

            for path in draw(report, plots):
                print(f"wrote {path}")
    except OSError as error:
        raise ToolFailed(UNUSABLE, f"{error.filename} cannot be written: {error.strerror}") from error
    if interrupted:
        return INTERRUPTED
    return REFUSED if report.any_without_answer else 0


def _document(plan: Plan, report: Report, runs: Sequence[Run], *, interrupted: bool) -> bytes:
    content = {
        "loraplex": __version__,
        "interrupted": interrupted,
        "servers": [
            {"name": target.name, "url": target.url, "style": target.style, "adapters": target.adapters}
            for target in plan.targets
        ],
        "base_share": plan.base_share,
        "rounds": plan.rounds,
        "vocabulary": plan.vocabulary,
        "warm_up": plan.warm_up,
        "timeouts": asdict(plan.timeouts),
        "first_token_limit": plan.first_token_limit,
        "points": report.json(),
        "runs": requests_json(plan.sweep, runs),
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=1)
