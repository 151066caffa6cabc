"""Run a plan: every server in turn, the same requests for each, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from tqdm import tqdm

from ..adapter_tools.errors import REFUSED, ToolFailed
from .client import Client, Record, open_session
from .discovery import naming_of
from .load import drive
from .plan import Plan, Point, Target
from .workloads import Request, Trace, prompt

_WARM_UP = 0
"""Number of the run whose prompts the warm-up uses; measured runs count from 1."""
_WARM_UP_CONCURRENCY = 4
_WARM_UP_PROMPT, _WARM_UP_OUTPUT = 8, 4


@dataclass(slots=True)
class Run:
    """One point on one server, once. Grows while it runs, so that an interrupted one keeps what it has."""

    target: Target
    point: Point
    trace: Trace
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    """From `started` until the last answer had ended, or the interrupt."""
    started: float = 0.0
    """Of the monotonic clock, as the times in the records."""
    late: float = 0.0
    """How late the client sent, at worst; see `load.drive`."""


async def measure(plan: Plan, runs: list[Run]) -> None:
    """Fill `runs`, in the order of measuring. When cancelled, `runs` keeps what was measured until then.

    Raises ToolFailed where a server does not answer, or refuses the warm-up.
    """
    async with AsyncExitStack() as stack:
        pairs = []
        for target in plan.targets:
            session = await stack.enter_async_context(open_session(plan.timeouts, target.api_key))
            pairs.append((target, Client(session, target.url, await naming_of(session, target))))
        if plan.warm_up:
            for target, client in pairs:
                await _warm_up(plan, target, client)
        number = _WARM_UP
        for point in plan.sweep.points:
            for turn in range(plan.rounds):
                number += 1
                for target, client in pairs if turn % 2 == 0 else reversed(pairs):
                    run = Run(target, point, plan.trace(point))
                    runs.append(run)
                    label = " ".join(filter(None, (target.name, plan.sweep.label(point))))
                    await _fill(run, number, label, plan, client)


async def _fill(run: Run, number: int, label: str, plan: Plan, client: Client) -> None:
    """Send a run's trace; `number` tells its prompts from those of other runs."""
    with tqdm(total=len(run.trace.requests), desc=label, unit="req", disable=None, leave=False) as bar:

        async def send(index: int, request: Request) -> None:
            ids = prompt(plan.seed, number, index, request.prompt_tokens, plan.vocabulary)
            run.records.append(await client.complete(request, ids))
            bar.update()

        run.started = time.perf_counter()
        try:
            run.late = await drive(run.trace, send)
        finally:
            run.seconds = time.perf_counter() - run.started


async def _warm_up(plan: Plan, target: Target, client: Client) -> None:
    """One short request to the base and to each adapter that the plan names: nothing measured is a first."""
    named = {request.adapter for point in plan.sweep.points for request in plan.trace(point).requests}
    wanted = [None, *sorted(adapter for adapter in named if adapter is not None)]
    requests = tuple(Request(0.0, adapter, _WARM_UP_PROMPT, _WARM_UP_OUTPUT) for adapter in wanted)
    run = Run(target, plan.sweep.points[0], Trace(requests, _WARM_UP_CONCURRENCY))
    await _fill(run, _WARM_UP, f"{target.name} warm-up", plan, client)
    _check(target, run.records)


def _check(target: Target, records: Sequence[Record]) -> None:
    for record in records:
        if record.failure is not None:
            number = record.request.adapter
            subject = "the base" if number is None else target.adapters[number]
            hint = "; --vocabulary bounds the token ids" if record.failure.kind == "HTTP 400" else ""
            raise ToolFailed(
                REFUSED,
                f"{target.name}: the first request to {subject} failed, {record.failure.kind}: "
                f"{record.failure.message}{hint}",
            )
