"""`loraplex demo`: serve the bundled model with its adapters and send them one mixed batch over REST."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from ..child import Child, Program, loraplex_command
from . import ADAPTERS, MODEL_DIR
from .tasks import TASKS, render

BASE = "base"
ADAPTERS_WANTED = 4
"""Fewer distinct adapters in the fullest step and the demo has failed."""
_MAX_TOKENS = 64
_STOP_PATIENCE = 20.0
_READY = re.compile(r"ready in [\d.]+ s: (http://\S+)")
_STEP_ADAPTERS = re.compile(r"^loraplex_step_adapters_max(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class DemoFailed(Exception):
    """The demo cannot show what it should; the message says why."""


@dataclass(frozen=True, slots=True)
class Question:
    model: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Answer:
    question: Question
    output: str
    seconds: float


def run(prompt: str | None) -> int:
    """Show the demo, with the bundled prompts or with the user's own; answers the exit code."""
    try:
        asyncio.run(_show(prompt))
    except DemoFailed as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    return 0


def questions(prompt: str | None) -> list[Question]:
    """The batch: every adapter with its own prompts, and the base with the first ones of the adapters;
    or the base and every adapter with the user's prompt."""
    if prompt is not None:
        return [Question(model, prompt) for model in (BASE, *ADAPTERS)]
    firsts = dict.fromkeys(TASKS[name].demo_prompts[0] for name in ADAPTERS)
    base = [Question(BASE, text) for text in firsts]
    return base + [Question(name, text) for name in ADAPTERS for text in TASKS[name].demo_prompts]


def table(answers: Sequence[Answer]) -> str:
    """Adapter, prompt, output and time as aligned text."""
    rows = [("adapter", "prompt", "output", "time")]
    rows += [
        (a.question.model, _shown(a.question.prompt), _shown(a.output), f"{a.seconds:.2f} s") for a in answers
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


async def _show(prompt: str | None) -> None:
    started = time.monotonic()
    server = _Server()
    try:
        url = await server.url()
        _say(f"ready after {time.monotonic() - started:.1f} s: {url}")
        # A session of aiohttp ignores the proxies that the environment names.
        async with aiohttp.ClientSession(url) as session:
            await _ask(session, Question(BASE, "hello"), max_tokens=1)
            _say(f"first token after {time.monotonic() - started:.1f} s")
            await _ask_all(session, [Question(name, "hello") for name in ADAPTERS], max_tokens=1)
            answers = await _ask_all(session, questions(prompt), _MAX_TOKENS)
            count = await _adapters_in_one_step(session)
    finally:
        await server.stop()
    print(table(answers))
    print(f"adapters in one step: {count}")
    if count < ADAPTERS_WANTED:
        raise DemoFailed(f"{count} adapters shared a step; at least {ADAPTERS_WANTED} should have")


class _Server:
    """`loraplex serve` in a process of its own, on free ports."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._url: asyncio.Future[str] = loop.create_future()
        self._lines: deque[str] = deque(maxlen=40)

        async def until_ready() -> None:
            await asyncio.shield(self._url)

        def log(line: str) -> None:
            self._lines.append(line)
            if match := _READY.search(line):
                loop.call_soon_threadsafe(self._url.set_result, match[1])

        adapters = [f"--adapter={name}={folder}" for name, folder in ADAPTERS.items()]
        ports = ("--port=0", "--grpc-port=0", f"--served-model-name={BASE}", "--drain-timeout=1")
        program = Program(
            label="serve",
            argv=loraplex_command("serve", *ports, *adapters, str(MODEL_DIR)),
            until_ready=until_ready,
        )
        self._child = Child(program, log)

    async def url(self) -> str:
        """The base URL, once the server is ready."""
        if not await self._child.until_ready():
            raise DemoFailed("\n".join(("the server did not start:", *self._lines)))
        return self._url.result()

    async def stop(self) -> None:
        await self._child.stop(_STOP_PATIENCE)


async def _ask_all(
    session: aiohttp.ClientSession, batch: Sequence[Question], max_tokens: int
) -> list[Answer]:
    return await asyncio.gather(*(_ask(session, question, max_tokens) for question in batch))


async def _ask(session: aiohttp.ClientSession, question: Question, max_tokens: int) -> Answer:
    body = {
        "model": question.model,
        "prompt": render(question.prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    started = time.monotonic()
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise DemoFailed(f"{question.model}: HTTP {response.status}: {await response.text()}")
        reply = await response.json()
    return Answer(question, reply["choices"][0]["text"], time.monotonic() - started)


async def _adapters_in_one_step(session: aiohttp.ClientSession) -> int:
    async with session.get("/metrics") as response:
        values = _STEP_ADAPTERS.findall(await response.text())
    if not values:
        raise DemoFailed("/metrics has no loraplex_step_adapters_max")
    return max(int(float(value)) for value in values)


def _shown(text: str, width: int = 44) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
