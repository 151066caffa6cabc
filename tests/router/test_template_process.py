"""Templates that nobody vouches for can neither stop nor fill the router."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from loraplex.router.errors import InvalidRequest
from loraplex.router.template_process import TemplateProcess
from loraplex.router.template_worker import Conversation, render

MESSAGES = [{"role": "user", "content": "hi 日本"}]
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos }}{% endfor %}"


@pytest.fixture
async def process() -> AsyncIterator[TemplateProcess]:
    async with aclosing(TemplateProcess(seconds=1.0)) as process:
        yield process


async def test_it_renders_what_the_template_says(process: TemplateProcess) -> None:
    for _ in range(3):
        assert await process.render(PLAIN, {"eos": "</s>"}, MESSAGES) == "user:hi 日本</s>"
    assert await process.render("a\n{{ 1 }}\n", {}, MESSAGES) == "a\n1"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "does not compile"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ messages[7].content }}", "refuses"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "compile"),
    ],
)
async def test_its_refusals_are_the_callers_to_read(
    process: TemplateProcess, template: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await process.render(template, {}, MESSAGES)
    assert await process.render("x", {}, MESSAGES) == "x"


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ 'x' | center(5000000000) }}",
    ],
    ids=["endless", "number", "text", "doubling", "filter"],
)
async def test_a_bomb_ends_its_request_and_nothing_else(process: TemplateProcess, bomb: str) -> None:
    await process.render("x", {}, MESSAGES)
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    with pytest.raises(InvalidRequest, match="chat template"):
        await process.render(bomb, {}, MESSAGES)
    watching.cancel()
    assert longest < 0.9, "the loop goes on meanwhile"
    assert await process.render(PLAIN, {"eos": ""}, MESSAGES) == "user:hi 日本"


async def test_a_caller_that_goes_does_not_mix_up_answers(process: TemplateProcess) -> None:
    await process.render("x", {}, MESSAGES)
    slow = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    gone = asyncio.create_task(process.render(slow, {}, MESSAGES))
    await asyncio.sleep(0.05)
    waiting = [asyncio.create_task(process.render(f"{n}", {}, MESSAGES)) for n in range(5)]
    await asyncio.sleep(0.05)
    gone.cancel()
    assert await asyncio.gather(*waiting) == ["0", "1", "2", "3", "4"]


async def test_a_killed_worker_is_replaced(process: TemplateProcess) -> None:
    await process.render("x", {}, MESSAGES)
    child = process._process
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    assert await process.render("y", {}, MESSAGES) == "y"


async def test_it_leaves_no_process_behind() -> None:
    process = TemplateProcess()
    await process.render("x", {}, MESSAGES)
    child = process._process
    assert child is not None
    await process.aclose()
    assert child.returncode is not None
    await process.aclose()


def test_a_worker_remembers_templates_by_source_and_special_tokens() -> None:
    texts = [render(Conversation("{{ eos }}", {"eos": eos}, MESSAGES, 1.0)).text for eos in ("a", "b", "a")]
    assert texts == ["a", "b", "a"]
