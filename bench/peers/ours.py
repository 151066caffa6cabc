"""Our own server, as a user starts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraplex.child import loraplex_command

from ..server import Launch


class Loraplex:
    """Of this checkout, in the environment that runs the comparison."""

    name = "loraplex"
    style = "openai"

    def launch(self, base: Path, adapters: Mapping[str, Path], port: int, threads: int) -> Launch:
        settings = ["--served-model-name=base", "--device=cpu", "--dtype=bfloat16", f"--threads={threads}"]
        settings += ["--max-model-len=1024", "--max-num-seqs=32", "--max-rank=64"]
        settings += [f"--port={port}", "--grpc-port=0", "--drain-timeout=1"]
        settings += [f"--adapter={name}={path}" for name, path in adapters.items()]
        return Launch(loraplex_command("serve", *settings, str(base)), "/health/ready")
