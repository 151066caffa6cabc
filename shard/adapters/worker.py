"""The parent's side of the adapter worker: starts it, gives it jobs, survives its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    ShardError,
)
from .base_tensors import BaseTensors
from .layout import AdapterLayout
from .manifest import AdapterManifest, AdapterRequest
from .merging.recipe import PartPlace
from .own_tokenizer import BaseText
from .pack import PackedFile
from .progress import OnProgress
from .protocol import (
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
    WorkerSettings,
)
from .weights import PackedAdapter, read_packed

_log = logging.getLogger(__name__)

DEFAULT_COMMAND = (sys.executable, "-m", "loraplex.shard.adapters.worker_main")
SILENCE_SECONDS = 30.0
"""A worker that says nothing for so long is hung (it beats every second) and is killed."""

_LINE_LIMIT = 16 * 1024 * 1024
_ERRORS: dict[str, type[ShardError]] = {
    error.reason: error for error in (AdapterNotFound, AdapterRejected, AdapterFetchFailed)
}
_NO_TEXT = BaseText()
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True, slots=True)
class DownloadedAdapter:
    """A fetched and parsed adapter."""

    manifest: AdapterManifest
    directory: Path
    packed: PackedAdapter


@dataclass(slots=True)
class _Job:
    done: asyncio.Future[Downloaded | Repacked]
    on_progress: OnProgress


class AdapterWorker:
    """Fetches and parses adapters in a child process. Started again on the next job if it died."""

    def __init__(
        self,
        layout: AdapterLayout,
        base: BaseTensors,
        text: BaseText = _NO_TEXT,
        *,
        command: Sequence[str] = DEFAULT_COMMAND,
        settings: WorkerSettings | None = None,
        pin: bool = False,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        """Starts nothing. `pin`: read into pinned memory, for a GPU. `silence`: seconds until it is hung."""
        self._layout = layout
        self._base = base
        self._text = text
        self._command = tuple(command)
        self._settings = settings or WorkerSettings()
        self._pin = pin
        self._silence = silence
        self._child: _Child | None = None
        self._starting = asyncio.Lock()
        self._last_job = 0

    @property
    def pid(self) -> int | None:
        """The child's process id while one runs."""
        return self._child.process.pid if self._child is not None and self._child.is_alive else None

    async def start(self) -> None:
        """Start the child unless it runs. Otherwise the first job does."""
        await self._living_child()

    async def stop(self) -> None:
        """End the child. Jobs in progress fail."""
        async with self._starting:
            if self._child is not None:
                await self._child.stop()
                self._child = None

    async def download(
        self, request: AdapterRequest, on_progress: OnProgress, parts: tuple[PartPlace, ...] = ()
    ) -> DownloadedAdapter:
        """Fetch, verify and parse; `parts`: where those lie that a merged adapter is made of.

        Raises AdapterNotFound, AdapterRejected or AdapterFetchFailed.
        """
        reply = await self._run(lambda job: Download(job, request, parts), on_progress)
        assert isinstance(reply, Downloaded)
        return DownloadedAdapter(reply.manifest, Path(reply.directory), await self._read(reply.file))

    async def pack(self, name: str, directory: Path, digest: str) -> PackedAdapter:
        """Parse an adapter on disk again. Raises AdapterRejected where its files have another digest now."""
        reply = await self._run(
            lambda job: Repack(job, name, str(directory), digest), lambda done, total: None
        )
        return await self._read(reply.file)

    async def _run(self, command: Callable[[int], Command], on_progress: OnProgress) -> Downloaded | Repacked:
        child = await self._living_child()
        self._last_job += 1
        return await child.run(command(self._last_job), on_progress)

    async def _read(self, file: PackedFile) -> PackedAdapter:
        return await asyncio.to_thread(_take_packed, file, self._pin)

    async def _living_child(self) -> _Child:
        async with self._starting:
            if self._child is None or not self._child.is_alive:
                if self._child is not None:
                    await self._child.stop()
                self._child = await self._start_child()
            return self._child

    async def _start_child(self) -> _Child:
        spool = Path(tempfile.mkdtemp(prefix="loraplex-adapters-"))
        # Xet transfers bypass plain HTTP, and with it the proxies and mirrors that HF_ENDPOINT may name.
        environment = {"HF_HUB_DISABLE_XET": "1"} | os.environ | _ENVIRONMENT
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, env=environment, limit=_LINE_LIMIT
            )
        except OSError as error:
            shutil.rmtree(spool, ignore_errors=True)
            raise AdapterFetchFailed(f"the adapter worker could not be started: {error}") from error
        child = _Child(process, spool, self._base, self._silence)
        child.send(Setup(self._layout, self._text, str(spool), self._settings))
        return child


def _take_packed(file: PackedFile, pin: bool) -> PackedAdapter:
    """Read a packed file and delete it."""
    path = Path(file.path)
    try:
        return read_packed(path, file.index, pin=pin)
    except OSError as error:
        raise AdapterFetchFailed(f"a parsed adapter could not be read back: {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)


class _Child:
    """One run of the child process, with the jobs that wait for it."""

    def __init__(self, process: Process, spool: Path, base: BaseTensors, silence: float) -> None:
        self.process = process
        self._spool = spool
        self._base = base
        self._silence = silence
        self._jobs: dict[int, _Job] = {}
        self._providing: set[asyncio.Task[None]] = set()
        self._cause = "ended"
        self.is_alive = True
        self._listener = asyncio.create_task(self._listen())

    def send(self, message: Setup | Order) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(message) + b"\n")

    async def run(self, command: Command, on_progress: OnProgress) -> Downloaded | Repacked:
        job = _Job(asyncio.get_running_loop().create_future(), on_progress)
        self._jobs[command.job] = job
        try:
            self.send(command)
            return await job.done
        finally:
            del self._jobs[command.job]

    async def stop(self) -> None:
        """End the process, by closing its input or else by force; wait until it and its files are gone."""
        self._close_input()
        try:
            await asyncio.wait_for(asyncio.shield(self._listener), timeout=2.0)
        except TimeoutError:
            self._kill()
            await self._listener

    def _close_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _kill(self) -> None:
        self._close_input()  # should the command have children of its own, this ends the worker among them
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def _listen(self) -> None:
        """Hand events to their jobs until the process ends or hangs; then fail what is left and clean up."""
        assert self.process.stdout is not None
        events = msgspec.json.Decoder[Event](Event)
        try:
            while line := await asyncio.wait_for(self.process.stdout.readline(), self._silence):
                self._handle(events.decode(line))
            cause = self._cause
        except TimeoutError:
            self._kill()
            cause = "hung and was killed"
        except (ValueError, msgspec.MsgspecError):
            _log.exception("the adapter worker wrote a line that is no event")
            self._kill()
            cause = "broke its protocol and was killed"
        status = await self.process.wait()
        self.is_alive = False
        for job in self._jobs.values():
            if not job.done.done():
                job.done.set_exception(
                    AdapterFetchFailed(f"the adapter worker {cause} (status {status}); try again")
                )
        await asyncio.to_thread(shutil.rmtree, self._spool, ignore_errors=True)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Alive):
            return
        if isinstance(event, Wanted):
            task = asyncio.create_task(self._provide(event))
            self._providing.add(task)
            task.add_done_callback(self._providing.discard)
            return
        job = self._jobs.get(event.job)
        if isinstance(event, Progress):
            if job is not None:
                job.on_progress(event.bytes_done, event.bytes_total)
        elif job is None or job.done.done():
            if not isinstance(event, Failed):
                Path(event.file.path).unlink(missing_ok=True)
        elif isinstance(event, Failed):
            job.done.set_exception(_ERRORS.get(event.reason, ShardError)(event.message))
        else:
            job.done.set_result(event)

    async def _provide(self, wanted: Wanted) -> None:
        """Write a weight of the base to the spool and tell the child. Where that fails, end the child, which
        would wait for it without end."""
        path = self._spool / f"{wanted.request}.weight"
        try:
            file = await asyncio.to_thread(self._base.write, wanted.name, path, held=wanted.held)
        except (OSError, KeyError) as error:
            why = error.strerror if isinstance(error, OSError) else "the base has no such weight"
            self._cause = f"was ended, for it could not be given {wanted.name}: {why}"
            self._kill()
        else:
            self.send(Provided(wanted.request, file))
