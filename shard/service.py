"""gRPC in and out of a shard: messages to calls, errors to statuses. Nothing is decided or computed here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from ..proto import shard_pb2 as pb
from ..proto import shard_pb2_grpc
from .adapters.loading import AdapterLoading
from .adapters.manifest import AdapterManifest, AdapterRequest, Source
from .adapters.merging.recipe import MergePart, MergeRequest, merge_recipe
from .adapters.own_tokenizer import OwnTokenizer
from .adapters.progress import repeated
from .adapters.store import AdapterStore
from .device import DeviceThread
from .errors import AdapterRejected, ShardError
from .sequencer import Sequencer

log = logging.getLogger(__name__)

SOURCES = {
    pb.DownloadAdapterRequest.HUB: Source.HUB,
    pb.DownloadAdapterRequest.LOCAL: Source.LOCAL,
    pb.DownloadAdapterRequest.S3: Source.S3,
    pb.DownloadAdapterRequest.MERGED: Source.MERGED,
}

PROGRESS_SECONDS = 10.0
"""A download says that it goes on at least so often, also while an adapter is converted or merged."""

Context = grpc.aio.ServicerContext[object, object]


class ShardService(shard_pb2_grpc.ShardServicer):
    """One rank's service.

    `on_fatal` is called when the epoch cannot go on in this process: a step failed, or the router's
    stream broke. The process then exits and its supervisor starts a fresh one.
    """

    def __init__(
        self,
        *,
        info: pb.InfoReply,
        tokenizer: pb.TokenizerReply,
        sequencer: Sequencer,
        store: AdapterStore,
        loading: AdapterLoading,
        on_fatal: Callable[[str], None],
    ) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._sequencer = sequencer
        self._store = store
        self._loading = loading
        self._on_fatal = on_fatal
        self._streams = 0
        self.left = asyncio.Event()
        """Set while no router has a decode stream open."""
        self.left.set()

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoReply:
        return self._info

    async def Tokenizer(self, request: pb.TokenizerRequest, context: Context) -> pb.TokenizerReply:
        if not request.adapter_digest:
            return self._tokenizer
        try:
            own = await self._store.own_tokenizer(request.adapter_digest)
        except ShardError as error:
            await abort(context, error)
        return _tokenizer_proto(own)

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[pb.DownloadAdapterEvent]:
        progress: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()

        async def fetch() -> AdapterManifest:
            try:
                wanted = _adapter_request(request)
                return await self._store.download(wanted, lambda *done: progress.put_nowait(done))
            finally:
                progress.put_nowait(None)

        download = asyncio.create_task(fetch())
        try:
            async for done, total in repeated(progress, PROGRESS_SECONDS):
                yield pb.DownloadAdapterEvent(
                    progress=pb.DownloadProgress(bytes_done=done, bytes_total=total)
                )
            yield pb.DownloadAdapterEvent(manifest=_manifest_proto(await download))
        except ShardError as error:
            await abort(context, error)
        finally:
            download.cancel()

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterReply:
        began = time.monotonic()
        try:
            packed = await self._store.host_weights(request.digest)
            await self._loading.load(request.slot, request.digest, packed)
        except ShardError as error:
            await abort(context, error)
        elapsed = int((time.monotonic() - began) * 1000)
        return pb.LoadAdapterReply(bytes=packed.nbytes, modules=packed.modules, milliseconds=elapsed)

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterReply:
        try:
            freed = await self._loading.unload(request.slot)
        except ShardError as error:
            await abort(context, error)
        return pb.UnloadAdapterReply(bytes=freed)

    async def Prefill(self, request: pb.StepPlan, context: Context) -> AsyncIterator[pb.StepResult]:
        try:
            yield await self._sequencer.submit(request)
        except ShardError as error:
            self._on_fatal(f"step {request.seq}: {error}")
            await abort(context, error)

    async def Decode(
        self, request_iterator: AsyncIterator[pb.StepPlan], context: Context
    ) -> AsyncIterator[pb.StepResult]:
        answers: asyncio.Queue[asyncio.Future[pb.StepResult] | None] = asyncio.Queue()
        self._streams += 1
        self.left.clear()
        reader = asyncio.create_task(self._read_plans(request_iterator, answers))
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
            await reader
        except ShardError as error:
            self._on_fatal(str(error))
            await abort(context, error)
        finally:
            reader.cancel()
            self._streams -= 1
            if self._streams == 0:
                self.left.set()

    async def _read_plans(
        self,
        plans: AsyncIterator[pb.StepPlan],
        answers: asyncio.Queue[asyncio.Future[pb.StepResult] | None],
    ) -> None:
        """Queue the answers of all plans up to the farewell, which leaves this shard as it was at its start.
        A stream that ends without one is fatal."""
        orderly = False
        try:
            async for plan in plans:
                if plan.farewell:
                    orderly = True
                    self._sequencer.end_epoch()
                    await self._loading.clear()
                    return
                answers.put_nowait(self._sequencer.submit(plan))
        except ShardError as error:
            self._on_fatal(str(error))
            raise
        finally:
            answers.put_nowait(None)
            if not orderly:
                self._on_fatal("the router's decode stream broke")


def _adapter_request(request: pb.DownloadAdapterRequest) -> AdapterRequest:
    if request.source not in SOURCES:
        raise AdapterRejected(f"adapter {request.id!r}: no source is named")
    return AdapterRequest(
        source=SOURCES[request.source],
        id=request.id,
        revision=request.revision,
        token=request.token,
        expect_digest=request.expect_digest,
        subfolder=request.subfolder,
        root=request.root,
        merge=_merge_request(request.id, request.merge) if request.HasField("merge") else None,
    )


def _merge_request(name: str, merge: pb.MergeRecipe) -> MergeRequest:
    try:
        recipe = merge_recipe(
            merge.method,
            density=merge.density if merge.HasField("density") else None,
            majority_sign_method=merge.majority_sign_method,
            seed=merge.seed,
            rank=merge.rank,
        )
    except AdapterRejected as error:
        raise AdapterRejected(f"adapter {name!r}: {error}") from error
    return MergeRequest(tuple(MergePart(part.digest, part.weight) for part in merge.parts), recipe)


def _tokenizer_proto(own: OwnTokenizer) -> pb.TokenizerReply:
    return pb.TokenizerReply(
        tokenizer_json=own.tokenizer_json,
        chat_template=own.chat_template,
        special_tokens=own.special_tokens,
        stop_ids=own.stop_ids,
        bos_id=own.bos_id,
    )


def _manifest_proto(manifest: AdapterManifest) -> pb.AdapterManifest:
    return pb.AdapterManifest(
        digest=manifest.digest,
        revision=manifest.revision,
        rank_bytes=manifest.rank_bytes,
        max_rank=manifest.max_rank,
        modules=manifest.modules,
        warnings=manifest.traits.warnings,
        kind=manifest.traits.kind,
        alone=manifest.traits.alone,
        owns=manifest.traits.owns,
        invocation_tokens=manifest.traits.invocation_tokens,
        vocab_size=manifest.traits.vocab_size,
        own_tokenizer=manifest.own_tokenizer,
        own_chat_template=manifest.own_chat_template,
    )


async def abort(context: Context, error: ShardError) -> NoReturn:
    """End an RPC with the error's code and, in google.rpc.ErrorInfo, its reason."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain="loraplex"))
    status = status_pb2.Status(code=error.grpc_code.value[0], message=str(error), details=[detail])
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status raises")


async def watch_health(
    thread: DeviceThread,
    report: Callable[[bool], Awaitable[None]],
    *,
    limit: float,
    interval: float = 1.0,
) -> None:
    """Report every `interval` seconds whether the oldest unfinished command is younger than `limit`
    seconds. Runs until cancelled; queues no work of its own."""
    while True:
        await report(thread.oldest_age() < limit)
        await asyncio.sleep(interval)
