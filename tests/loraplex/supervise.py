"""The real `Supervisor` around two fake children, with what to run as JSON on the command line."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from typing import Any

from loraplex.child import Program
from loraplex.keeper import GroupKeeper, LaunchFailed, RestartPolicy
from loraplex.launch import Log, Supervisor
from loraplex.probes import until_router_ready, until_shard_ready


async def supervise(plan: dict[str, Any]) -> None:
    replicas = plan["replicas"]
    shards = [
        Program(
            label=f"group {rank} shard 0" if replicas else f"shard {rank}",
            argv=tuple(argv),
            until_ready=partial(until_shard_ready, f"127.0.0.1:{port}"),
        )
        for rank, (argv, port) in enumerate(zip(plan["shards"], plan["shard_ports"], strict=True))
    ]
    router = Program(
        label="router",
        argv=tuple(plan["router"]),
        until_ready=lambda: until_router_ready("127.0.0.1", plan["router_port"]),
    )
    log = Log().write
    policy = RestartPolicy(deaths=3, first_delay=0.1, max_delay=0.4)
    keepers: list[GroupKeeper] = []
    for programs in [[shard] for shard in shards] if replicas else [shards]:
        keepers.append(GroupKeeper(lambda programs=programs: programs, policy, log, among=keepers))
    await Supervisor(
        keepers,
        router,
        drain_timeout=plan["drain_timeout"],
        log=log,
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
