"""The adapter worker: a child process that fetches, verifies and parses while its parent decodes.

    python -m loraplex.shard.adapters.worker_main

Reads a Setup and then Commands from standard input, answers with Events on standard output, logs to standard
error. Ends when its input does, which is also when the parent has died.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec
from huggingface_hub.utils import logging as hub_logging

from ..errors import ShardError
from .base_weights import WeightRequests
from .manifest import AdapterManifest, Snapshot
from .own_tokenizer import TextComparison
from .pack import PackedDirectory, Packer
from .protocol import (
    HEARTBEAT_SECONDS,
    Alive,
    Command,
    Download,
    Downloaded,
    Event,
    Failed,
    Order,
    Progress,
    Provided,
    Repack,
    Repacked,
    Setup,
    Wanted,
)
from .sources.fetch import Fetcher

NICENESS = 10
CONCURRENT_JOBS = 16
MAX_MESSAGE = 1500
"""Characters of an error."""
MAX_NAME = 200
"""Characters of an adapter's id in it."""

_log = logging.getLogger(__name__)


class Worker:
    """Runs commands on threads. Fetches overlap; parsing is one at a time, which bounds its memory."""

    def __init__(self, setup: Setup, output: BinaryIO) -> None:
        self._fetcher = Fetcher(setup.settings.limits, setup.settings.retry)
        self._packer = Packer(setup.layout, setup.settings.limits)
        self._text = TextComparison(setup.text, setup.settings.limits)
        self._spool = Path(setup.spool)
        self._packing = threading.Lock()
        self.weights = WeightRequests(lambda request, name, held: self.send(Wanted(request, name, held)))
        self._output = output
        self._writing = threading.Lock()

    def run(self, command: Command) -> None:
        """Carry out one command and send what comes of it: always exactly one final event."""
        name = (command.request.id if isinstance(command, Download) else command.id)[:MAX_NAME]
        try:
            event = self._download(command) if isinstance(command, Download) else self._repack(command)
        except ShardError as error:
            event = Failed(command.job, error.reason, _one_line(f"adapter {name!r}: {error}"))
        except Exception as error:  # noqa: BLE001 - the edge of this process: a job must not end in silence
            _log.exception("adapter %r: unexpected error", name)
            message = f"adapter {name!r}: unexpected {type(error).__name__} in the adapter worker"
            event = Failed(command.job, ShardError.reason, _one_line(message))
        self.send(event)

    def send(self, event: Event) -> None:
        line = msgspec.json.encode(event) + b"\n"
        try:
            with self._writing:
                self._output.write(line)
                self._output.flush()
        except BrokenPipeError:
            _log.warning("the shard is gone; leaving")
            self.leave()

    def leave(self) -> NoReturn:
        """Delete the spool and end this process, whatever is still running."""
        shutil.rmtree(self._spool, ignore_errors=True)
        os._exit(0)

    def beat(self) -> None:
        """Say at intervals that this process lives, for ever."""
        while True:
            self.send(Alive())
            time.sleep(HEARTBEAT_SECONDS)

    def _download(self, command: Download) -> Event:
        def report(done: int, total: int) -> None:
            self.send(Progress(command.job, done, total))

        fetched = self._fetcher.fetch(command.request, report, command.parts)
        packed = self._pack(command.job, fetched.directory, "")
        manifest = _manifest(fetched, packed, self._text.differs(fetched.directory))
        return Downloaded(command.job, manifest, str(fetched.directory), packed.file)

    def _repack(self, command: Repack) -> Event:
        packed = self._pack(command.job, Path(command.directory), command.digest)
        return Repacked(command.job, packed.file)

    def _pack(self, job: int, directory: Path, expect_digest: str) -> PackedDirectory:
        with self._packing:
            target = self._spool / f"{job}.packed"
            return self._packer.pack(directory, target, self.weights, expect_digest)


def _one_line(message: str) -> str:
    """A message fit for a log and a gRPC status, whatever names the files put into it."""
    printable = "".join(char if char.isprintable() else "?" for char in message[:MAX_MESSAGE])
    return printable + "…" if len(message) > MAX_MESSAGE else printable


def _manifest(fetched: Snapshot, packed: PackedDirectory, own: tuple[bool, bool]) -> AdapterManifest:
    own_tokenizer, own_chat_template = own
    return AdapterManifest(
        digest=packed.digest,
        revision=fetched.revision,
        rank_bytes=(packed.file.index.nbytes,),
        max_rank=packed.max_rank,
        modules=packed.modules,
        traits=replace(packed.traits, warnings=fetched.warnings + packed.traits.warnings),
        own_tokenizer=own_tokenizer,
        own_chat_template=own_chat_template,
    )


def _claim_stdout() -> BinaryIO:
    """Standard output for events alone: whatever a library prints goes to standard error."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def main() -> NoReturn:
    """Serve until standard input ends."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    hub_logging.set_verbosity(logging.ERROR)  # its warnings show signed addresses
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the parent's to handle
    output = _claim_stdout()
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    worker = Worker(setup, output)
    threading.Thread(target=worker.beat, daemon=True).start()
    pool = ThreadPoolExecutor(CONCURRENT_JOBS)
    orders = msgspec.json.Decoder[Order](Order)
    for line in sys.stdin.buffer:
        order = orders.decode(line)
        if isinstance(order, Provided):
            worker.weights.provide(order.request, order.file)
        else:
            pool.submit(worker.run, order)
    worker.leave()


if __name__ == "__main__":
    main()
