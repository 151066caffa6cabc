"""Chat templates that adapters bring, rendered in a process of their own: an adapter may come from anywhere,
and what a template costs can be bounded only from outside."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from .errors import InternalError, InvalidRequest, Overloaded
from .template_worker import Conversation, Rendered

_COMMAND: Final = (sys.executable, "-m", "loraplex.router.template_worker")
_LINE_BYTES: Final = 64 * 1024 * 1024
_START_SECONDS: Final = 30.0
_SECONDS: Final = 5.0
_TURN_SECONDS: Final = 10.0
"""How long a conversation waits for those before it."""
_GRACE: Final = 1.0
"""Seconds beyond what the worker gives itself."""


class TemplateProcess:
    """One worker, started when it is first needed; conversations are rendered one after the other.

    Args:
        seconds: that one conversation may take.
    """

    def __init__(self, *, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._turn = asyncio.Lock()
        self._process: Process | None = None

    async def render(
        self, template: str, special_tokens: Mapping[str, str], messages: Sequence[Mapping[str, Any]]
    ) -> str:
        """Raises InvalidRequest if the template refuses the conversation or costs too much, Overloaded if
        too many wait."""
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await self._turn.acquire()
        except TimeoutError as error:
            raise Overloaded("Too many chat templates are being rendered.", retry_after=5.0) from error
        try:
            conversation = Conversation(
                template, dict(special_tokens), [dict(message) for message in messages], self._seconds
            )
            rendered = await self._exchange(await self._running(), conversation)
        finally:
            self._turn.release()
        if rendered.refusal:
            raise InvalidRequest(rendered.refusal)
        return rendered.text

    async def aclose(self) -> None:
        """End the worker, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def _running(self) -> Process:
        if self._process is not None and self._process.returncode is not None:
            await self.aclose()
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *_COMMAND, stdin=PIPE, stdout=PIPE, limit=_LINE_BYTES
            )
            if await self._answer(self._process, _START_SECONDS) is None:
                raise InternalError("The process that renders chat templates cannot be started.")
        return self._process

    async def _exchange(self, process: Process, conversation: Conversation) -> Rendered:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(conversation) + b"\n")
        rendered = await self._answer(process, self._seconds + _GRACE)
        if rendered is None:
            raise InvalidRequest("the chat template takes too much time or memory over these messages")
        return rendered

    async def _answer(self, process: Process, seconds: float) -> Rendered | None:
        """The worker's next line. None if there is none in time: that worker is ended, as it is when nobody
        waits for the line any more."""
        assert process.stdout is not None
        line = b""
        try:
            async with asyncio.timeout(seconds):
                line = await process.stdout.readline()
        except TimeoutError:
            pass
        finally:
            if not line.endswith(b"\n"):
                await self.aclose()
        return msgspec.json.decode(line, type=Rendered) if line.endswith(b"\n") else None


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """A chat template that an adapter brings."""

    process: TemplateProcess
    source: str
    special_tokens: Mapping[str, str]

    async def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return await self.process.render(self.source, self.special_tokens, messages)
