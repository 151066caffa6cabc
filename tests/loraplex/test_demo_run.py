"""The demo against a server of a few lines: what it sends, what it prints, when it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from loraplex.demo import ADAPTERS
from loraplex.demo import run as demo
from loraplex.demo.tasks import TASKS, render

Outcome = tuple[int, list[dict[str, Any]]]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the demo; answers its exit code and the requests that the server saw."""

    def run(prompt: str | None = None, *, adapters: float = 6, status: int = 200) -> Outcome:
        seen: list[dict[str, Any]] = []

        async def complete(request: web.Request) -> web.Response:
            body = await request.json()
            seen.append(body)
            return web.json_response({"choices": [{"text": f"<{body['model']}>"}]}, status=status)

        async def metrics(request: web.Request) -> web.Response:
            return web.Response(text=f"# TYPE x gauge\nloraplex_step_adapters_max {adapters}\n")

        class Server:
            async def url(self) -> str:
                app = web.Application()
                app.add_routes([web.post("/v1/completions", complete), web.get("/metrics", metrics)])
                self._runner = web.AppRunner(app)
                await self._runner.setup()
                await web.TCPSite(self._runner, "127.0.0.1", 0).start()
                return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

            async def stop(self) -> None:
                await self._runner.cleanup()

        monkeypatch.setattr(demo, "_Server", Server)
        return demo.run(prompt), seen

    return run


def test_sends_each_adapter_its_own_prompts_and_ends_with_the_count(
    show: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    code, seen = show(adapters=5.0)
    assert code == 0
    sent = {(body["model"], body["prompt"]) for body in seen if body["max_tokens"] > 1}
    own = {(name, render(text)) for name in ADAPTERS for text in TASKS[name].demo_prompts}
    base = {("base", render(TASKS[name].demo_prompts[0])) for name in ADAPTERS}
    assert sent == own | base
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["adapter", "prompt", "output", "time"]
    assert sum(f"<{name}>" in line for line in lines for name in ADAPTERS) == len(own)
    assert lines[-1] == "adapters in one step: 5"


def test_asks_the_base_and_every_adapter_the_users_prompt(show: Callable[..., Outcome]) -> None:
    code, seen = show("my own line")
    assert code == 0
    asked = [body["model"] for body in seen if body["prompt"] == render("my own line")]
    assert sorted(asked) == sorted(["base", *ADAPTERS])


def test_fails_when_too_few_adapters_shared_a_step(
    show: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(adapters=3)[0] == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "adapters in one step: 3"
    assert captured.err.splitlines()[-1] == "demo: 3 adapters shared a step; at least 4 should have"


def test_fails_when_a_request_fails(show: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert show(status=503)[0] == 1
    assert "demo: base: HTTP 503: " in capsys.readouterr().err


def test_ignores_the_proxies_of_the_environment(
    show: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert show()[0] == 0


def test_a_server_that_does_not_start_is_said_with_its_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MODEL_DIR", "/nowhere/model")
    monkeypatch.setattr(demo, "loraplex_command", lambda *arguments: ("sh", "-c", "echo no model; exit 2"))
    assert demo.run(None) == 1
    assert "demo: the server did not start:\n[serve] no model" in capsys.readouterr().err


def test_long_and_broken_lines_are_shown_in_one() -> None:
    answer = demo.Answer(demo.Question("base", "a\nb"), "x" * 100, 1.234)
    header, rule, row = demo.table([answer]).splitlines()
    assert row.startswith("base ")
    assert "a b" in row
    assert "x" * 43 + "…" in row
    assert row.endswith("1.23 s")
    assert set(rule) == {"-", " "}
    assert len(rule) == len(row)
    assert header.index("time") == row.index("1.23 s")
