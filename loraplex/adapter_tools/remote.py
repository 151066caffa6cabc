"""`loraplex adapters ls`, `load`, `unload`, `pin`: the adapters of a running server, over REST."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
from yarl import URL

from .errors import REFUSED, UNUSABLE, ToolFailed
from .progress import download_bar
from .text import printable, size, table

_POLL_SECONDS = 0.25
_CONNECT_SECONDS = 10.0
_VERSION_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server answers, and the key it wants, if any."""

    url: str
    api_key: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said yes with."""

    headers: Mapping[str, str]
    content: Any
    """Decoded JSON, or text."""


def list_adapters(server: Server) -> None:
    """Print every adapter that this key may name."""
    asyncio.run(_list(server))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What shall be loaded, and how."""

    name: str
    source: str
    scaling: float | None = None
    pin: bool = False
    hub_token: str = field(default="", repr=False)
    """For a private repository. An adapter loaded with one belongs to the caller's tenant alone."""


def load(server: Server, wanted: Load) -> None:
    """Have the server load an adapter; waits until it is resident, with a progress bar."""
    asyncio.run(_load(server, wanted))


def unload(server: Server, name: str) -> None:
    """Have the server drain and free an adapter."""
    asyncio.run(_unload(server, name))


def pin(server: Server, name: str, pinned: bool) -> None:
    """Keep an adapter resident, or let it make room again."""
    asyncio.run(_pin(server, name, pinned))


class Connection:
    """One connection to a server. Raises ToolFailed where it says no, or nobody answers."""

    def __init__(self, server: Server) -> None:
        try:
            base = URL(server.url)
        except ValueError as error:
            raise ToolFailed(UNUSABLE, f"--url {server.url}: {error}") from error
        if base.scheme not in ("http", "https") or not base.host:
            raise ToolFailed(UNUSABLE, f"--url {server.url} is no address such as http://127.0.0.1:8080")
        self._base = str(base).rstrip("/")
        # A session of aiohttp ignores the proxies that the environment names.
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {server.api_key}"} if server.api_key else {},
            timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, path: str) -> Any:
        """The content of an answer."""
        return (await self._ask("GET", path, None)).content

    async def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        try:
            async with self._session.request(
                method, URL(self._base + path, encoded=True), json=body
            ) as answer:
                is_json = answer.content_type == "application/json"
                content = await answer.json() if is_json else await answer.text()
                if answer.status >= 400:
                    raise ToolFailed(REFUSED, printable(_message(content, answer.status)))
                return Answer(answer.headers, content)
        except aiohttp.ClientConnectorError as error:
            raise ToolFailed(REFUSED, f"no server answers at {self._base} ({error.strerror})") from error
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ToolFailed(REFUSED, f"{self._base} broke off ({type(error).__name__})") from error


async def _list(server: Server) -> None:
    async with Connection(server) as connection:
        entries = (await connection.get("/v1/adapters"))["data"]
    head = ("name", "state", "version", "bytes", "running", "waiting", "kind", "source")
    print(table(head, [_row(entry) for entry in entries]))
    for entry in entries:
        if entry.get("error"):
            print(printable(f"{entry['name']}: {entry['error']}"))


async def _load(server: Server, wanted: Load) -> None:
    name, path = wanted.name, _as_the_server_sees(wanted.source)
    body: dict[str, Any] = {"lora_name": name, "lora_path": path, "pinned": wanted.pin}
    if wanted.scaling is not None:
        body["scaling"] = wanted.scaling
    if wanted.hub_token:
        body["adapter_token"] = wanted.hub_token
    async with Connection(server) as connection:
        with download_bar(name) as report:
            watch = asyncio.create_task(_watch(connection, name, report))
            try:
                await connection.post("/v1/load_lora_adapter", body)
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
        entry = await connection.get(_path(name))
    print(f"{name}: {_state(entry)}, version {_version(entry)}, {size(entry['bytes'])}")
    for warning in entry.get("warnings", ()):
        print(printable(f"warning: {warning}"))


async def _watch(connection: Connection, name: str, report: Callable[[int, int], None]) -> None:
    """Report how far the download of an adapter is, until cancelled."""
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        try:
            entry = await connection.get(_path(name))
        except ToolFailed:
            continue  # not registered yet; whether the load succeeds, its own answer says
        report(entry.get("bytes_done", 0), entry.get("bytes_total", 0))


async def _unload(server: Server, name: str) -> None:
    async with Connection(server) as connection:
        answer = await connection.post("/v1/unload_lora_adapter", {"lora_name": name})
    print(f"{name}: unloaded, {size(int(answer.headers.get('x-bytes-freed', 0)))} freed")


async def _pin(server: Server, name: str, pinned: bool) -> None:
    async with Connection(server) as connection:
        answer = await connection.post(f"{_path(name)}/pin", {"pinned": pinned})
    print(f"{name}: {_state(answer.content)}")


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='/')}"


def _as_the_server_sees(source: str) -> str:
    """A directory of this machine by its whole path; anything else as typed."""
    path = Path(source.removeprefix("local:")).expanduser()
    return f"local:{path.resolve()}" if path.is_dir() else source


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(entry["name"]),
        _state(entry),
        _version(entry),
        size(entry["bytes"]) if entry["bytes"] else "",
        str(entry["running"]),
        str(entry["waiting"]),
        str(entry.get("kind", "")),
        str(entry["source"]),
    )


def _state(entry: Mapping[str, Any]) -> str:
    state = str(entry["state"])
    if state == "fetching" and entry.get("bytes_total"):
        state += f" {100 * entry['bytes_done'] // entry['bytes_total']}%"
    return f"{state}, pinned" if entry["pinned"] else state


def _version(entry: Mapping[str, Any]) -> str:
    return str(entry["digest"])[:_VERSION_DIGITS]


def _message(content: Any, status: int) -> str:
    """What a refusal says, in the server's own words where it has some."""
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])
    text = error if isinstance(error, str) else content if isinstance(content, str) else ""
    return text.strip()[:500] or f"the server answered {status}"
