"""Processes that stay, for jobs that groups of ranks do: to start one takes longer than most jobs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

from loraplex.ports import free_port

from .rank_main import Done, Job

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 120.0
_MAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.shard.parallel.rank_main import main
main(int(sys.argv[1]))
"""


class RankPool:
    """As many ranks as a job has needed so far. After a job that fails they are started anew.

    Args:
        logs: a folder for what the ranks write.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._ranks: list[subprocess.Popen[str]] = []

    def run(self, job: Job, size: int = 2) -> list[Done]:
        """What each rank of a group tells of the job."""
        job = replace(job, size=size, master=f"127.0.0.1:{free_port()}")
        while len(self._ranks) < size:
            self._ranks.append(self._start(len(self._ranks)))
        ranks = self._ranks[:size]
        late = threading.Timer(SECONDS, self._kill)
        late.start()
        try:
            for rank in ranks:
                assert rank.stdin is not None
                rank.stdin.write(json.dumps(asdict(job)) + "\n")
                rank.stdin.flush()
            answers = [rank.stdout.readline() for rank in ranks if rank.stdout is not None]
        finally:
            late.cancel()
        if not all(answers):
            self.close()
            raise AssertionError("\n".join(self._log(rank).read_text()[-2000:] for rank in range(size)))
        return [Done(**json.loads(answer)) for answer in answers]

    def close(self) -> None:
        """End them all."""
        self._kill()
        for rank in self._ranks:
            with rank:  # closes its pipes and waits
                pass
        self._ranks.clear()

    def _start(self, rank: int) -> subprocess.Popen[str]:
        with self._log(rank).open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, str(rank)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.kill()

    def _log(self, rank: int) -> Path:
        return self._logs / f"{rank}.log"
