"""One engine's turn: a load from its first request to the end of its last answer."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from loraplex.adapter_tools.errors import ToolFailed
from loraplex.loadtest.measure import Run, measure
from loraplex.loadtest.plan import Plan, Point, Sweep, Target
from loraplex.loadtest.report import summary
from loraplex.loadtest.specs import Closed, Popularity

from ..errors import BenchFailed
from . import transformers_peft
from .load import Load
from .peer import PEFT

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn came to. Times are medians over its requests, in seconds; None where none can be told."""

    tokens_per_second: float
    first_token: float | None = None
    per_token: float | None = None


class Runner(Protocol):
    """An engine that is ready for turns."""

    @property
    def name(self) -> str: ...

    def turn(self, load: Load, *, warm_up: bool) -> Turn:
        """With `warm_up`, after a short request to the base and to each adapter. Raises BenchFailed."""


class ServerTurns:
    """Turns of a server, by the load client of `loraplex bench`."""

    def __init__(self, target: Target) -> None:
        self.name = target.name
        self._target = target

    def turn(self, load: Load, *, warm_up: bool) -> Turn:
        """Raises BenchFailed where any answer is not complete."""
        plan = self._plan(load, warm_up=warm_up)
        runs: list[Run] = []
        try:
            asyncio.run(measure(plan, runs))
        except ToolFailed as error:
            raise BenchFailed(f"{self.name}: {error}") from error
        made = summary(runs, plan.first_token_limit)
        if made.failed:
            kind, message = next(iter(made.first_messages.items()))
            raise BenchFailed(f"{self.name}: {made.failed} requests failed, {kind}: {message}")
        return Turn(made.tokens_per_second, made.first_token.p50, made.per_token.p50)

    def _plan(self, load: Load, *, warm_up: bool) -> Plan:
        spec = Closed(
            requests=load.requests,
            concurrency=load.concurrency,
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            spread=Popularity("round-robin"),
            seed=load.seed,
        )
        sweep = Sweep(None, (Point(spec, len(self._target.adapters)),))
        return Plan(targets=(self._target,), sweep=sweep, vocabulary=load.vocabulary, warm_up=warm_up)


class PeftTurns:
    """Turns of a process of `transformers_peft`."""

    name = PEFT

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def wait_until_ready(self) -> None:
        """Its model is loaded then. Raises BenchFailed where it ends instead."""
        self._answer()

    def turn(self, load: Load, *, warm_up: bool) -> Turn:
        """The warm-up is one short batch."""
        if warm_up:
            self._run(replace(load, requests=load.concurrency, output_tokens=WARM_UP_TOKENS, seed=0))
        done = self._run(load)
        return Turn(done.tokens / done.seconds)

    def _run(self, load: Load) -> transformers_peft.Done:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(load)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return transformers_peft.Done(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> BenchFailed:
        return BenchFailed(f"{self.name}: the process ended; see {self._log}")


@contextmanager
def peft_turns(base: Path, adapters: Mapping[str, Path], threads: int, log: Path) -> Iterator[PeftTurns]:
    """Run such a process, its warnings in `log`: yields it once its model is loaded, and ends it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = transformers_peft.command(base, adapters, threads)
    pipe = subprocess.PIPE
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=output, text=True) as process,
    ):
        try:
            turns = PeftTurns(process, log)
            turns.wait_until_ready()
            yield turns
        finally:
            process.kill()
