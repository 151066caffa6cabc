"""A shard's service over a real channel: contract, typed errors, and what ends an epoch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loraplex.proto import shard_pb2 as pb
from loraplex.proto import shard_pb2_grpc
from loraplex.shard.adapters.host_cache import HostCache
from loraplex.shard.adapters.loading import AdapterLoading
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.store import AdapterStore
from loraplex.shard.adapters.upload import SharedUploader
from loraplex.shard.adapters.worker import AdapterWorker
from loraplex.shard.config import ShardConfig
from loraplex.shard.device import DeviceThread
from loraplex.shard.engine import StepEngine
from loraplex.shard.load import LoadedModel, load_model
from loraplex.shard.main import describe
from loraplex.shard.rows import RowTable
from loraplex.shard.sampling import Sampler
from loraplex.shard.sequencer import Sequencer
from loraplex.shard.service import ShardService, watch_health

from ..tiny import AdapterRecipe, build_adapter

SLOTS = 4


@dataclass
class Live:
    """A served shard and what its service reported."""

    stub: shard_pb2_grpc.ShardAsyncStub
    channel: grpc.aio.Channel
    rows: RowTable
    fatal: list[str]


@pytest.fixture(scope="module")
def config(tiny_model: Callable[[str], Path]) -> ShardConfig:
    return ShardConfig(
        model=str(tiny_model("llama")),
        device="cpu",
        kv_memory=1 << 21,
        max_adapters=SLOTS,
        adapter_memory=200_000,
    )


@pytest.fixture(scope="module")
def loaded(config: ShardConfig) -> LoadedModel:
    return load_model(config)


@asynccontextmanager
async def serving(config: ShardConfig, loaded: LoadedModel) -> AsyncIterator[Live]:
    thread = DeviceThread()
    thread.start()
    for site in loaded.sites:
        for slot in range(SLOTS):
            site.drop(slot)
    pool = AdapterPool(loaded.sites, slots=SLOTS, budget=config.adapter_memory)
    rows = RowTable(8, 64)
    engine = StepEngine(
        loaded.model,
        loaded.kv,
        rows,
        Sampler(),
        slot_is_resident=lambda slot: pool.digest_of(slot) is not None,
    )
    store = AdapterStore(AdapterWorker(loaded.layout, loaded.base), HostCache(config.host_adapter_memory))
    fatal: list[str] = []
    service = ShardService(
        info=describe(config, loaded),
        tokenizer=loaded.tokenizer,
        sequencer=Sequencer(thread, engine),
        store=store,
        loading=AdapterLoading(thread, pool, SharedUploader()),
        on_fatal=fatal.append,
    )
    server = grpc.aio.server()
    shard_pb2_grpc.add_ShardServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]
    ) as channel:
        yield Live(shard_pb2_grpc.ShardStub(channel), channel, rows, fatal)  # type: ignore[arg-type]
    await server.stop(0)
    await store.stop()
    thread.stop()


def reason(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


async def download(live: Live, directory: Path) -> pb.AdapterManifest:
    request = pb.DownloadAdapterRequest(source=pb.DownloadAdapterRequest.LOCAL, id=str(directory))
    events = [event async for event in live.stub.DownloadAdapter(request)]
    assert [event.WhichOneof("event") for event in events[:-1]] == ["progress"] * (len(events) - 1)
    return events[-1].manifest


def prompt(
    seq: int, *, tokens: list[int] | None = None, slot: int | None = None, row: int = 0
) -> pb.StepPlan:
    tokens = tokens or [1, 2, 3]
    spans = [] if slot is None else [pb.AdapterSpan(entries=[pb.AdapterEntry(slot=slot, weight=1.0)])]
    return pb.StepPlan(
        epoch=1,
        seq=seq,
        starts=[pb.RowStart(row=row, prompt_length=len(tokens), spans=spans)],
        chunks=[pb.PromptChunk(row=row, start=0, tokens=tokens, last=True)],
        block_tables=[pb.BlockTableDelta(rows=[pb.BlockTableDelta.Row(row=row, blocks=[row + 1])])],
    )


async def test_info_and_tokenizer_describe_the_model(config: ShardConfig, loaded: LoadedModel) -> None:
    async with serving(config, loaded) as live:
        info = await live.stub.Info(pb.InfoRequest())
        assert (info.architecture, info.dtype, info.vocab_size) == ("LlamaForCausalLM", "float32", 300)
        assert list(info.kv_groups[0].layers) == [0, 1, 2]
        assert info.kv_groups[0].block_count * info.kv_groups[0].block_bytes <= config.kv_memory
        assert len(info.model_digest) == 64
        reply = await live.stub.Tokenizer(pb.TokenizerRequest())
        assert list(reply.stop_ids) == [299]
        assert b"ByteLevel" in reply.tokenizer_json
        assert "assistant" in reply.chat_template


async def test_an_adapter_is_downloaded_loaded_named_and_unloaded(
    config: ShardConfig, loaded: LoadedModel, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = build_adapter(tiny_model("llama"), tmp_path / "a", AdapterRecipe(4), seed=1)
    async with serving(config, loaded) as live:
        manifest = await download(live, path)
        assert (manifest.max_rank, manifest.modules) == (4, 21)
        reply = await live.stub.LoadAdapter(pb.LoadAdapterRequest(digest=manifest.digest, slot=2))
        assert reply.bytes == manifest.rank_bytes[0]
        [base] = [r async for r in live.stub.Prefill(prompt(1))]
        [adapted] = [r async for r in live.stub.Prefill(prompt(2, slot=2, row=1))]
        assert (base.adapter_count, adapted.adapter_count) == (0, 1)
        assert base.rows[0].tokens != adapted.rows[0].tokens
        assert (await live.stub.UnloadAdapter(pb.UnloadAdapterRequest(slot=2))).bytes == reply.bytes
        assert live.fatal == []


def merge_request(*digests: str, method: str = "cat") -> pb.DownloadAdapterRequest:
    parts = [pb.MergeRecipe.Part(digest=digest, weight=0.5) for digest in digests]
    return pb.DownloadAdapterRequest(
        source=pb.DownloadAdapterRequest.MERGED,
        id="mix",
        merge=pb.MergeRecipe(parts=parts, method=method),
    )


async def test_downloaded_adapters_can_be_merged(
    config: ShardConfig,
    loaded: LoadedModel,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    base = tiny_model("llama")
    directories = [
        build_adapter(base, tmp_path / f"{rank}", AdapterRecipe(rank), seed=rank) for rank in (2, 3)
    ]
    async with serving(config, loaded) as live:
        parts = [(await download(live, directory)).digest for directory in directories]
        events = [event async for event in live.stub.DownloadAdapter(merge_request(*parts))]
        manifest = events[-1].manifest
        assert manifest.max_rank == 5
        reply = await live.stub.LoadAdapter(pb.LoadAdapterRequest(digest=manifest.digest, slot=0))
        assert reply.modules == manifest.modules > 0
        for request, said in (
            (merge_request(parts[0], "f" * 64), "ADAPTER_NOT_FOUND"),
            (merge_request(*parts, method="average"), "ADAPTER_REJECTED"),
            (merge_request(*parts, method="linear"), "ADAPTER_REJECTED"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="adapter 'mix'") as caught:
                [event async for event in live.stub.DownloadAdapter(request)]
            assert reason(caught.value) == said
        assert live.fatal == []


async def test_a_directory_named_in_a_request_stays_below_its_root(
    config: ShardConfig, loaded: LoadedModel, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    outside = build_adapter(tiny_model("llama"), tmp_path / "outside", AdapterRecipe(2), seed=1)
    inside = tmp_path / "root" / "inside"
    inside.mkdir(parents=True)
    for path in outside.iterdir():
        (inside / path.name).symlink_to(path)
    request = pb.DownloadAdapterRequest(
        source=pb.DownloadAdapterRequest.LOCAL, id=str(inside), root=str(tmp_path / "root")
    )
    async with serving(config, loaded) as live:
        with pytest.raises(grpc.aio.AioRpcError, match=r"adapter_config\.json is a link") as caught:
            [event async for event in live.stub.DownloadAdapter(request)]
        assert reason(caught.value) == "ADAPTER_REJECTED"
        assert (await download(live, inside)).max_rank == 2, "the operator's own may link to anywhere"


async def test_adapters_that_cannot_be_had_end_in_typed_errors(
    config: ShardConfig, loaded: LoadedModel, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    big = build_adapter(tiny_model("llama"), tmp_path / "big", AdapterRecipe(40), seed=1)
    async with serving(config, loaded) as live:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await download(live, tmp_path / "nothing")
        assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [event async for event in live.stub.DownloadAdapter(pb.DownloadAdapterRequest(id="org/nameless"))]
        assert reason(caught.value) == "ADAPTER_REJECTED"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await live.stub.LoadAdapter(pb.LoadAdapterRequest(digest="unknown", slot=0))
        assert reason(caught.value) == "ADAPTER_NOT_FOUND"
        manifest = await download(live, big)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await live.stub.LoadAdapter(pb.LoadAdapterRequest(digest=manifest.digest, slot=0))
        assert reason(caught.value) == "ADAPTER_MEMORY_FULL"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await live.stub.UnloadAdapter(pb.UnloadAdapterRequest(slot=SLOTS))
        assert reason(caught.value) == "BAD_PLAN"
        assert live.fatal == []


async def test_decode_streams_results_in_order_beside_prefill(
    config: ShardConfig, loaded: LoadedModel
) -> None:
    async with serving(config, loaded) as live:
        stream = live.stub.Decode()
        await stream.write(pb.StepPlan(epoch=1, seq=2, decode_rows=[0]))
        await stream.write(pb.StepPlan(epoch=1, seq=3, decode_rows=[0]))
        [first] = [r async for r in live.stub.Prefill(prompt(1))]
        answers = [await stream.read(), await stream.read()]
        assert [first.seq, *(answer.seq for answer in answers)] == [1, 2, 3]
        assert all(len(answer.rows[0].tokens) == 1 for answer in answers)
        await stream.write(pb.StepPlan(epoch=1, farewell=True))
        assert await stream.read() is grpc.aio.EOF
        await asyncio.sleep(0.05)
        assert len(live.rows) == 0, "an orderly end frees every row"
        assert live.fatal == []


async def test_after_a_farewell_another_router_finds_every_slot_free(
    config: ShardConfig, loaded: LoadedModel, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    first = build_adapter(tiny_model("llama"), tmp_path / "a", AdapterRecipe(2), seed=1)
    second = build_adapter(tiny_model("llama"), tmp_path / "b", AdapterRecipe(2), seed=2)
    async with serving(config, loaded) as live:
        for epoch, path in enumerate((first, second), start=1):
            stream = live.stub.Decode()
            digest = (await download(live, path)).digest
            await live.stub.LoadAdapter(pb.LoadAdapterRequest(digest=digest, slot=0))
            plan = prompt(1, slot=0)
            plan.epoch = epoch
            await stream.write(plan)
            assert (await stream.read()).adapter_count == 1
            await stream.write(pb.StepPlan(epoch=epoch, farewell=True))
            assert await stream.read() is grpc.aio.EOF
        assert live.fatal == []


async def test_a_broken_stream_and_a_bad_plan_are_fatal(config: ShardConfig, loaded: LoadedModel) -> None:
    async with serving(config, loaded) as live:
        stream = live.stub.Decode()
        await stream.write(prompt(1))
        await stream.read()
        stream.cancel()
        for _ in range(100):
            if live.fatal:
                break
            await asyncio.sleep(0.01)
        assert live.fatal == ["the router's decode stream broke"]
    async with serving(config, loaded) as live:
        stream = live.stub.Decode()
        await stream.write(pb.StepPlan(epoch=1, seq=1, decode_rows=[5]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_PLAN")
        assert live.fatal[0] == "row 5 is not running"


async def test_health_follows_the_age_of_the_oldest_command() -> None:
    ages = iter([0.0, 0.4, 2.0, 0.1])
    seen: list[bool] = []

    class Thread:
        def oldest_age(self) -> float:
            return next(ages)

    async def report(healthy: bool) -> None:
        seen.append(healthy)
        if len(seen) == 4:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await watch_health(Thread(), report, limit=1.0, interval=0)  # type: ignore[arg-type]
    assert seen == [True, True, False, True]
