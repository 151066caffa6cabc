"""One streamed completion: sent, timed token by token, and checked for completeness."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from ..adapter_tools.text import printable
from .naming import Naming
from .specs import Timeouts
from .workloads import Request

_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request does not count: a short kind to count by, and what exactly happened."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Record:
    """One request as it went. Times are seconds of the monotonic clock."""

    request: Request
    sent: float
    arrivals: tuple[float, ...]
    """When each chunk came that brought text or the end. A chunk may hold several tokens."""
    ended: float
    tokens: int | None
    """Of the output, by the server's usage; None where the stream ended before that."""
    finish: str | None
    failure: Failure | None

    @property
    def seconds(self) -> float:
        """From sending to the end of the answer."""
        return self.ended - self.sent

    @property
    def first_token(self) -> float | None:
        """Seconds from sending to the first chunk with text."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def per_token(self) -> float | None:
        """Seconds for each output token after the first: (last chunk - first chunk) / (tokens - 1)."""
        if not self.arrivals or self.tokens is None or self.tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)

    @property
    def longest_gap(self) -> float | None:
        """Longest pause between two chunks, in seconds."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=None)


class Client:
    """Sends completions to one server. Never raises for what the server does: that is in the record."""

    def __init__(self, session: aiohttp.ClientSession, url: str, naming: Naming) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._naming = naming

    async def complete(self, request: Request, prompt: Sequence[int]) -> Record:
        """Greedy, to the very number of output tokens, whatever the model would end with."""
        body = {
            **self._naming.fields(request.adapter),
            "prompt": prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stream = _Stream()
        sent = time.perf_counter()
        failure = await self._send(body, stream) or stream.fault(request.output_tokens)
        return Record(
            request=request,
            sent=sent,
            arrivals=tuple(stream.arrivals),
            ended=time.perf_counter(),
            tokens=stream.tokens,
            finish=stream.finish,
            failure=failure,
        )

    async def _send(self, body: dict[str, Any], stream: _Stream) -> Failure | None:
        """Feed the answer to `stream`; answers what went wrong on the way."""
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    return _refusal(response.status, await response.read())
                async for data in _events(response.content):
                    stream.take(data, time.perf_counter())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return _failure("no connection", error)
        except aiohttp.SocketTimeoutError as error:
            return _failure("silence", error)
        except TimeoutError as error:
            return _failure("timeout", error)
        except aiohttp.ClientError as error:
            return _failure("broken off", error)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _failure("not understood", error)
        return None


def open_session(timeouts: Timeouts, api_key: str) -> aiohttp.ClientSession:
    """A session for any number of connections. It ignores the proxies that the environment names.

    Each request has a connection of its own: some servers close one without having announced it.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(
            total=timeouts.total, sock_connect=timeouts.connect, sock_read=timeouts.silence
        ),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Chunk)


class _Stream:
    """What has come of one answer."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.tokens: int | None = None
        self.finish: str | None = None
        self._done = False
        self._error: Failure | None = None

    def take(self, data: bytes, now: float) -> None:
        """One event that came at `now`. Raises msgspec.DecodeError for what is no chunk."""
        if data == b"[DONE]":
            self._done = True
            return
        chunk = _DECODER.decode(data)
        if chunk.error is not None:
            self._error = self._error or Failure("error in stream", _message({"error": chunk.error}))
        if chunk.usage is not None and chunk.usage.completion_tokens is not None:
            self.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices or ():
            self.finish = choice.finish_reason or self.finish
            if choice.text or choice.finish_reason:
                self.arrivals.append(now)

    def fault(self, wanted: int) -> Failure | None:
        """Why this is not the whole answer of `wanted` tokens; None where it is."""
        if self._error is not None:
            return self._error
        if not self._done:
            return Failure("early end", f"the stream ended after {len(self.arrivals)} chunks, without [DONE]")
        if self.tokens is None:
            return Failure("no usage", "the stream says no usage, so its tokens cannot be counted")
        if self.tokens != wanted:
            return Failure("wrong count", f"{self.tokens} tokens came where {wanted} were wanted")
        if self.finish != "length":
            return Failure("wrong finish", f"the finish reason is {self.finish}, not length")
        if not self.arrivals:
            return Failure("no text", "no chunk brought text")
        return None


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event."""
    rest = b""
    async for block in content.iter_any():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _refusal(status: int, body: bytes) -> Failure:
    try:
        message = _message(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = body.decode(errors="replace")
    return Failure(f"HTTP {status}", _line(message) or "without a message")


def _message(content: Any) -> str:
    """What an error object says: `{"error": {"message": …}}`, `{"message": …}`, or the object itself."""
    error = content.get("error", content) if isinstance(content, dict) else content
    message = error.get("message") if isinstance(error, dict) else None
    return _line(str(message or error))


def _failure(kind: str, error: Exception) -> Failure:
    return Failure(kind, _line(str(error)) or type(error).__name__)


def _line(text: str) -> str:
    return printable(text).strip()[:_MESSAGE_CHARACTERS]
