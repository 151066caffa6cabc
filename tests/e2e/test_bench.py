"""`loraplex bench` against the real server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from loraplex import cli

from .server import Server


async def test_every_answer_of_the_server_is_complete(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    line = f"""bench ours={server.url} --adapters alpha,beta --base-share 0.25 --vocabulary 290
        --requests 24 --concurrency 6 --prompt-tokens 12 --output-tokens 16 --json {path}"""
    assert await asyncio.to_thread(cli.run, line.split()) == 0
    content = json.loads(path.read_text())
    figures = content["points"][0]["servers"]["ours"]
    assert (figures["finished"], figures["failed"], figures["adapters"]) == (24, 0, 2)
    assert figures["tokens_per_second"] > 0
    assert figures["first_token"]["p50"] <= figures["seconds_per_request"]["p50"]
    requests = content["runs"][0]["requests"]
    assert {request["tokens"] for request in requests} == {16}
    assert {request["adapter"] for request in requests} == {None, 0, 1}
