"""Installs peers in environments of their own, from the package index.

    python -m bench.peers.install [--peers vllm,llama.cpp] [--root DIR]

Below DIR, env/NAME is the environment and env/NAME/install.log says how it was made. vLLM needs some 3 GB and
a few minutes, llama.cpp a C++ compiler, 2 GB and some ten minutes. An interrupted run is simply run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import BenchFailed
from .peer import DEFAULT_ROOT, NAMES, parse_names, peers, root_directory


def install(names: Sequence[str], root: Path) -> None:
    """One line before and after each. Raises BenchFailed."""
    servers = peers(root)
    for name in names:
        if name in servers and not servers[name].is_installed:
            began = time.monotonic()
            print(f"{name}: installing below {root / 'env' / name}, follow install.log there", flush=True)
            servers[name].install()
            print(f"{name}: took {time.monotonic() - began:.0f} s", flush=True)
        print(f"{name}: installed", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", default=",".join(NAMES))
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT)
    options = parser.parse_args(arguments)
    try:
        install(parse_names(options.peers), root_directory(options.root))
    except BenchFailed as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
