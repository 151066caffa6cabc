"""Compares our server with peers: the same model, adapters and load, in turns on one machine.

    python -m bench.peers.run [--peers vllm,llama.cpp,peft] [--settings base,mixed,rank8,single] [--rounds 3]

All engines of a setting are up at once: while one has its turn the others sleep. Every round has one turn of
each, in alternating order, and ratios are taken within rounds. Below --root it generates models and adapters,
and finds the peers that `python -m bench.peers.install` has put there. Nothing else should be running: where
another process wants a core, engines whose threads wait by spinning lose many times what they should.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraplex.loadtest.plan import Target
from loraplex.ports import free_port

from ..errors import BenchFailed
from ..server import running
from .load import SETTINGS, Setting, parse_settings, seeds
from .model import write_all
from .ours import Loraplex
from .peer import DEFAULT_ROOT, NAMES, PEFT, Servable, parse_names, peers, root_directory
from .ratios import Comparison, table
from .turns import Runner, ServerTurns, Turn, peft_turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Who is compared, and how."""

    servers: Sequence[Servable]
    """The first one is what the others are compared with."""
    with_peft: bool
    root: Path
    rounds: int
    threads: int
    settle: float = 5.0
    """Seconds between turns: the threads of who had the last one may still spin, waiting for more."""

    def __post_init__(self) -> None:
        for flag, value in (("--rounds", self.rounds), ("--threads", self.threads)):
            if value < 1:
                raise BenchFailed(f"{flag} must be at least 1")

    def compare(self, setting: Setting) -> Comparison:
        """Start every engine, give each its turns, stop them all. Raises BenchFailed."""
        directory = self.root / setting.directory
        write_all(directory, setting.adapters, setting.ranks)
        base, adapters = directory / "base", {f"a{n}": directory / f"a{n}" for n in range(setting.adapters)}
        with ExitStack() as stack:
            runners = [
                stack.enter_context(self._serving(engine, setting, base, adapters)) for engine in self.servers
            ]
            if self.with_peft:
                log = self._log(setting, PEFT)
                runners.append(stack.enter_context(peft_turns(base, adapters, self.threads, log)))
            return Comparison(setting.name, self._turns(setting, runners))

    @contextmanager
    def _serving(
        self, engine: Servable, setting: Setting, base: Path, adapters: Mapping[str, Path]
    ) -> Iterator[Runner]:
        began, port = time.monotonic(), free_port()
        launch = engine.launch(base, adapters, port, self.threads)
        with running(launch, port, self._log(setting, engine.name)) as server:
            say(setting, engine.name, f"ready after {time.monotonic() - began:.0f} s")
            yield ServerTurns(
                Target(engine.name, server.url, engine.style, model="base", adapters=tuple(adapters))
            )

    def _turns(self, setting: Setting, runners: Sequence[Runner]) -> Mapping[str, Sequence[Turn]]:
        """By engine, in the order of `runners`. Engines that fail are out from then on, and it is said."""
        turns: dict[str, list[Turn]] = {runner.name: [] for runner in runners}
        racing = list(runners)
        for number, seed in enumerate(seeds(setting, self.rounds)):
            for runner in racing if number % 2 == 0 else list(reversed(racing)):
                time.sleep(self.settle)
                try:
                    turn = runner.turn(replace(setting.load, seed=seed), warm_up=number == 0)
                except BenchFailed as error:
                    say(setting, runner.name, f"is out: {error}")
                    racing = [other for other in racing if other is not runner]
                else:
                    turns[runner.name].append(turn)
                    say(setting, runner.name, f"round {number + 1}: {turn.tokens_per_second:.1f} tokens/s")
        return turns

    def _log(self, setting: Setting, name: str) -> Path:
        return self.root / "logs" / f"{setting.name}-{name}.log"


def say(setting: Setting, engine: str, what: str) -> None:
    """One line of progress."""
    print(f"{setting.name} {engine} {what}", file=sys.stderr, flush=True)


def installed(names: Sequence[str], root: Path) -> list[Servable]:
    """Those of `names` that are servers. Raises BenchFailed where one is not installed."""
    known = peers(root)
    servers = [known[name] for name in names if name in known]
    if missing := [peer.name for peer in servers if not peer.is_installed]:
        command = f"python -m bench.peers.install --peers {','.join(missing)} --root {root}"
        raise BenchFailed(f"not installed below {root}: {', '.join(missing)}; {command}")
    return list(servers)


def document(bench: Bench, settings: Sequence[Setting], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Everything that was asked and measured, with the machine's load as it was at the end."""
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "rounds": bench.rounds,
        "threads": bench.threads,
        "settings": [asdict(setting) for setting in settings],
        "comparisons": [comparison.json() for comparison in comparisons],
    }


def run(bench: Bench, settings: Sequence[Setting], json_file: Path | None) -> None:
    """Measure every setting; the file has after each what there is until then. Raises BenchFailed."""
    comparisons: list[Comparison] = []
    for setting in settings:
        comparisons.append(bench.compare(setting))
        if json_file is not None:
            json_file.write_text(json.dumps(document(bench, settings, comparisons), indent=1))
    print(table(comparisons))


def check_writable(json_file: Path | None) -> None:
    """Raises BenchFailed before anything is measured in vain."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise BenchFailed(f"--json {json_file}: no such folder to write a file into")


def _end(number: int, _: object) -> None:
    """A signal to end unwinds, so that no server is left behind."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", default=",".join(NAMES))
    parser.add_argument("--settings", default=",".join(setting.name for setting in SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _end)
    try:
        check_writable(options.json)
        names, root = parse_names(options.peers), root_directory(options.root)
        bench = Bench(
            servers=[Loraplex(), *installed(names, root)],
            with_peft=PEFT in names,
            root=root,
            rounds=options.rounds,
            threads=options.threads,
        )
        run(bench, parse_settings(options.settings), options.json)
    except BenchFailed as error:
        print(f"run: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
