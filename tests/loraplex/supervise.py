"""The real `Supervisor` around two fake children, with what to run as JSON on the command line."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from loraplex.child import Program
from loraplex.launch import LaunchFailed, Log, RestartPolicy, Supervisor
from loraplex.probes import until_router_ready, until_shard_ready


async def supervise(plan: dict[str, Any]) -> None:
    shard = Program(
        label="shard 0",
        argv=tuple(plan["shard"]),
        until_ready=lambda: until_shard_ready(f"127.0.0.1:{plan['shard_port']}"),
    )
    router = Program(
        label="router",
        argv=tuple(plan["router"]),
        until_ready=lambda: until_router_ready("127.0.0.1", plan["router_port"]),
    )
    await Supervisor(
        shard,
        router,
        drain_timeout=plan["drain_timeout"],
        restarts=RestartPolicy(deaths=3, first_delay=0.1, max_delay=0.4),
        log=Log().write,
        announce=lambda: print("ready", flush=True),
    ).run()


def main() -> int:
    try:
        asyncio.run(supervise(json.loads(sys.argv[1])))
    except LaunchFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
