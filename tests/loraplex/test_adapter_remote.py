"""`loraplex adapters ls`, `load`, `unload` and `pin` against the router's REST interface."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from loraplex import cli
from loraplex.adapter_tools.progress import download_bar
from loraplex.router.auth import ApiKeys
from loraplex.router.client import AdapterState, AdapterStatus
from loraplex.router.errors import AdapterRejected
from loraplex.router.frontend import Frontend
from loraplex.router.rest.app import RestServer, RestServices, build_app
from loraplex.router.rest.lorax import ServerFacts
from loraplex.router.tokenizer import Tokenizer

from .. import tiny
from ..fakes.engine import FakeEngine

Run = Callable[..., Awaitable[int]]


class SlowEngine(FakeEngine):
    """Loads take a moment, and are half fetched all that time."""

    def __init__(self) -> None:
        super().__init__(tiny.VOCAB)
        self.loads: list[tuple[str, str, dict[str, Any]]] = []
        self.loading: AdapterStatus | None = None

    async def load_adapter(self, name: str, source: str, **wishes: Any) -> AdapterStatus:
        self.loads.append((name, source, wishes))
        self.loading = AdapterStatus(
            name=name, source=source, state=AdapterState.FETCHING, bytes_done=50, bytes_total=100
        )
        await asyncio.sleep(0.8)
        self.loading = None
        return await super().load_adapter(name, source, **wishes)

    def adapters(self, *, tenant: str) -> list[AdapterStatus]:
        return [*super().adapters(tenant=tenant), *([self.loading] if self.loading else [])]


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
async def url(engine: SlowEngine, tmp_path: Path) -> AsyncIterator[str]:
    """A server that wants the key `secret`."""
    text = tiny.tokenizer().backend_tokenizer.to_str().encode()
    tokenizer = Tokenizer(tokenizer_json=text, chat_template="", special_tokens={}, stop_ids=[0])
    keys = tmp_path / "keys"
    keys.write_text("secret tenant\n")
    services = RestServices(
        engine=engine,
        frontend=Frontend(engine, tokenizer),
        keys=ApiKeys.from_file(keys),
        registry=CollectorRegistry(),
        facts=ServerFacts(version="0", groups=list, max_queued_requests=1),
        max_body_bytes=1 << 20,
    )
    server = RestServer(build_app(services))
    port = await server.start("127.0.0.1", 0)
    yield f"http://127.0.0.1:{port}"
    await server.stop()


@pytest.fixture
def run(url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command while the server goes on; URL and key come from the environment."""
    monkeypatch.setenv("LORAPLEX_URL", url)
    monkeypatch.setenv("LORAPLEX_API_KEY", "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def run(*arguments: str) -> int:
        return await asyncio.to_thread(cli.run, ["adapters", *arguments])

    return run


async def test_ls_shows_a_table(run: Run, engine: SlowEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.loading = AdapterStatus(
        name="new",
        source="hub:org/new",
        state=AdapterState.FETCHING,
        digest="0123456789abcdef",
        bytes=1536,
        running=2,
        waiting=3,
        pinned=True,
        bytes_done=1,
        bytes_total=4,
        error="not yet\x1b[2J",
    )
    assert await run("ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["name", "state", "version", "bytes", "running", "waiting"]
    [new] = [line for line in lines if line.startswith("new ")]
    assert "fetching 25%, pinned" in new
    assert "0123456789ab " in new
    assert "1.5 KiB" in new
    assert new.split()[-3:] == ["2", "3", "hub:org/new"]
    assert lines[-1] == "new: not yet?[2J"


async def test_load_waits_until_the_adapter_is_resident(
    run: Run, engine: SlowEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run("load", "org/sql", "hub:org/sql-lora", "--scaling", "0.5", "--pin") == 0
    output, bar = capsys.readouterr()
    assert output.startswith("org/sql: resident, pinned, version ")
    assert output.splitlines()[0].endswith(", 64 B")
    assert bar == ""
    [(name, source, wishes)] = engine.loads
    assert (name, source, wishes["scaling"], wishes["pin"]) == ("org/sql", "hub:org/sql-lora", 0.5, True)
    assert (wishes["tenant"], wishes["token"]) == ("tenant", "")


async def test_load_passes_the_callers_hub_token_on(run: Run, engine: SlowEngine) -> None:
    assert await run("load", "org/sql", "hub:org/sql-lora", "--hub-token", "hf_secret") == 0
    assert engine.loads[-1][2]["token"] == "hf_secret"


async def test_load_shows_how_far_the_download_is(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert await run("load", "sql", "hub:org/sql") == 0
    output, bar = capsys.readouterr()
    assert output.startswith("sql: resident, version ")
    assert "50/100 bytes" in bar


async def test_a_directory_is_named_by_its_whole_path(
    run: Run, engine: SlowEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert await run("load", "sql", "./mine") == 0
    assert engine.loads[0][1] == f"local:{tmp_path / 'mine'}"


async def test_unload_says_what_it_freed(
    run: Run, engine: SlowEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    await run("load", "sql", "hub:org/sql")
    capsys.readouterr()
    assert await run("unload", "sql") == 0
    assert capsys.readouterr().out == "sql: unloaded, 64 B freed\n"
    assert await run("unload", "sql") == 1
    assert capsys.readouterr().err == "loraplex: The model or adapter sql does not exist.\n"


async def test_pin_and_let_go(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("pin", "org/nested") == 0
    assert await run("pin", "org/nested", "--off") == 0
    assert capsys.readouterr().out == "org/nested: on_disk, pinned\norg/nested: on_disk\n"


async def test_the_servers_refusal_is_one_line(
    run: Run, engine: SlowEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuse(*_: Any, **__: Any) -> AdapterStatus:
        raise AdapterRejected("adapter 'x' has\nNaN in B")

    engine.load_adapter = refuse  # type: ignore[method-assign]
    assert await run("load", "x", "hub:org/x") == 1
    assert capsys.readouterr().err == "loraplex: adapter 'x' has NaN in B\n"


async def test_a_wrong_key_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("ls", "--api-key", "wrong") == 1
    assert "key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("http://127.0.0.1:9", 1, "no server answers at http://127.0.0.1:9"),
        ("127.0.0.1:8080", 2, "is no address such as http://127.0.0.1:8080"),
        ("ftp://host", 2, "is no address such as http://127.0.0.1:8080"),
    ],
)
def test_an_address_without_a_server(
    url: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["adapters", "ls", "--url", url]) == code
    assert message in capsys.readouterr().err


async def test_what_is_no_server_of_ours_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    async def teapot(_: web.Request) -> web.Response:
        return web.Response(status=418, text="short and stout")

    app = web.Application()
    app.router.add_get("/v1/adapters", teapot)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        assert await asyncio.to_thread(cli.run, ["adapters", "ls", "--url", site_url(runner)]) == 1
    finally:
        await runner.cleanup()
    assert capsys.readouterr().err == "loraplex: short and stout\n"


def site_url(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://{host}:{port}"


def test_a_bar_is_drawn_for_terminals_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw() -> str:
        with download_bar("org/[x]") as report:
            report(10, 0)
            report(512, 2048)
        return capsys.readouterr().err

    assert draw() == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    drawn = draw()
    assert "org/[x]" in drawn
    assert "0.5/2.0 KiB" in drawn


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORAPLEX_")]:
        monkeypatch.delenv(name)
