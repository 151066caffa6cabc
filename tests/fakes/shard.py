"""A shard without a model: it checks every rule of the contract and answers from a hash.

A token is a function of the tokens found in the row's KV blocks, the adapters' digests and weights, the
seed and the index of the output token. So a block given to two rows, a lost token, a wrong slot or a
wrong prompt length after a preemption all change what comes out.
"""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraplex.proto import shard_pb2
from loraplex.router.errors import AdapterNotFound, AdapterRejected, RouterError, ShardLost
from loraplex.router.rpc_errors import AdapterMemoryFull
from loraplex.router.shards import GroupEvents

VOCAB = 1000

Entries = tuple[tuple[str, float], ...]
"""(digest, weight) of each adapter of a row."""

Applied = Entries | tuple[tuple[int, Entries], ...]
"""The entries of a row from its first position on; else where each of its spans begins, and its entries."""


class ContractViolation(AssertionError):
    """The router broke a rule of shard.proto."""


def next_token(prefix: Sequence[int], entries: Applied, seed: int, index: int) -> int:
    """The model: output token `index` after `prefix`."""
    return zlib.crc32(repr((list(prefix), entries, seed, index)).encode()) % VOCAB


def generate(
    prompt: Sequence[int],
    count: int,
    *,
    entries: Applied = (),
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> list[int]:
    """What a request must get, computed on its own."""
    tokens = list(prompt)
    for index in range(count):
        tokens.append(next_token(tokens, entries, seed, index))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def prompt_logprob(prompt: Sequence[int], position: int) -> float:
    """The logprob of the prompt's token at `position`, which is at least 1."""
    return -(zlib.crc32(repr(list(prompt[: position + 1])).encode()) % 1000) / 100


@dataclass
class FakeAdapter:
    """What a source holds. `error` makes the fetch fail; `fetch_seconds` makes it slow.

    `content` stands for the bytes: another one is another version. `manifest` holds further fields of the
    manifest, `text` what the adapter ships of tokenizer and chat template.
    """

    bytes: int = 100
    fetch_seconds: float = 0.0
    error: RouterError | None = None
    not_finite: bool = False
    content: str = ""
    revision: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    text: shard_pb2.TokenizerReply | None = None

    @staticmethod
    def digest(source_id: str, content: str = "") -> str:
        return f"sha-{source_id}" + (f"-{content}" if content else "")


@dataclass
class _Row:
    start: shard_pb2.RowStart
    table: list[int] = field(default_factory=list)
    length: int = 0
    newest: int | None = None
    outputs: int = 0
    masked: bool = False


@dataclass
class FakeDevice:
    """The device of one rank in one epoch: rows, KV memory, adapter slots."""

    info: shard_pb2.InfoReply
    slots: dict[int, str] = field(default_factory=dict)
    not_finite: set[str] = field(default_factory=set)
    rows: dict[int, _Row] = field(default_factory=dict)
    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    last_seq: int = 0

    @property
    def blocks_in_use(self) -> int:
        return sum(len(row.table) for row in self.rows.values())

    def run(self, plan: shard_pb2.StepPlan) -> shard_pb2.StepResult:
        """One step in full. Raises ContractViolation."""
        self._require(plan.seq == self.last_seq + 1, f"seq {plan.seq} after {self.last_seq}")
        self.last_seq = plan.seq
        for row in plan.ends:
            self._require(row in self.rows, f"end of row {row}, which does not exist")
            del self.rows[row]
        for start in plan.starts:
            self._start(start)
        for delta in plan.block_tables:
            for entry in delta.rows:
                self._extend(entry.row, list(entry.blocks))
        result = shard_pb2.StepResult(epoch=plan.epoch, seq=plan.seq, last=True, device_micros=100)
        self._check_size(plan)
        adapters: set[int] = set()
        for chunk in plan.chunks:
            self._chunk(chunk, result, adapters)
        for row in plan.decode_rows:
            self._decode(row, result, adapters)
        result.row_count = len(plan.chunks) + len(plan.decode_rows)
        result.adapter_count = len(adapters)
        return result

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ContractViolation(message)

    def _check_size(self, plan: shard_pb2.StepPlan) -> None:
        named = [*plan.decode_rows, *(chunk.row for chunk in plan.chunks)]
        self._require(len(named) == len(set(named)), "a row is named twice in one step")
        tokens = len(plan.decode_rows) + sum(len(chunk.tokens) for chunk in plan.chunks)
        self._require(tokens <= self.info.max_step_tokens, f"a step of {tokens} tokens")

    def _start(self, start: shard_pb2.RowStart) -> None:
        self._require(start.row < self.info.max_num_seqs, f"row {start.row} is out of range")
        self._require(start.row not in self.rows, f"row {start.row} starts twice")
        starts = [span.start for span in start.spans]
        self._require(starts == sorted(set(starts)), f"row {start.row} has spans out of order")
        for span in start.spans:
            self._require(len(span.entries) > 0, f"row {start.row} has an empty span")
            for entry in span.entries:
                self._require(entry.slot in self.slots, f"row {start.row} names empty slot {entry.slot}")
        self.rows[start.row] = _Row(start)

    def _extend(self, row: int, blocks: list[int]) -> None:
        self._require(row in self.rows, f"blocks for row {row}, which does not exist")
        taken = {block for other in self.rows.values() for block in other.table}
        count = self.info.kv_groups[0].block_count
        for block in blocks:
            self._require(0 < block < count, f"block {block} is out of range")
            self._require(block not in taken, f"block {block} belongs to two rows")
            taken.add(block)
        self.rows[row].table += blocks

    def _write(self, state: _Row, token: int) -> None:
        size = self.info.kv_groups[0].block_size
        self._require(state.length < len(state.table) * size, f"row {state.start.row} writes past its blocks")
        self._require(state.length < self.info.max_model_len, f"row {state.start.row} outgrows the model")
        self.kv[state.table[state.length // size], state.length % size] = token
        state.length += 1

    def _prefix(self, state: _Row) -> list[int]:
        size = self.info.kv_groups[0].block_size
        return [self.kv[state.table[p // size], p % size] for p in range(state.length)]

    def _chunk(self, chunk: shard_pb2.PromptChunk, result: shard_pb2.StepResult, adapters: set[int]) -> None:
        state = self.rows.get(chunk.row)
        self._require(state is not None and state.newest is None, f"a chunk for row {chunk.row}")
        assert state is not None
        self._require(chunk.start == state.length, f"a chunk at {chunk.start}, row is at {state.length}")
        self._require(len(chunk.tokens) > 0, "an empty chunk")
        for token in chunk.tokens:
            self._write(state, token)
        answer = shard_pb2.RowResult(row=chunk.row)
        if state.start.output == shard_pb2.RowStart.PROMPT_LOGPROBS:
            tokens = self._prefix(state)
            answer.prompt_start = max(1, chunk.start)
            for position in range(answer.prompt_start, state.length):
                count = state.start.prompt_logprobs
                answer.prompt_logprobs.add(
                    logprob=prompt_logprob(tokens, position),
                    rank=1,
                    top_ids=range(count),
                    top_logprobs=[-1.0] * count,
                )
        if chunk.last:
            self._sample(state, answer, adapters)
        if chunk.last or answer.prompt_logprobs:
            result.rows.append(answer)

    def _decode(self, row: int, result: shard_pb2.StepResult, adapters: set[int]) -> None:
        state = self.rows.get(row)
        self._require(state is not None and state.newest is not None, f"decode of row {row}")
        assert state is not None
        assert state.newest is not None
        if state.masked:
            return
        self._write(state, state.newest)
        self._sample(state, result.rows.add(row=row), adapters)

    def _sample(self, state: _Row, answer: shard_pb2.RowResult, adapters: set[int]) -> None:
        named = [entry for span in state.start.spans for entry in span.entries]
        adapters.update(entry.slot for entry in named)
        digests = [self.slots.get(entry.slot, "") for entry in named]
        self._require(all(digests), f"row {answer.row} runs on an empty slot")
        spans = tuple(
            (span.start, tuple((self.slots[e.slot], round(e.weight, 3)) for e in span.entries))
            for span in state.start.spans
        )
        entries: Applied = spans[0][1] if len(spans) == 1 and spans[0][0] == 0 else spans
        prefix = self._prefix(state)
        index = len(prefix) - state.start.prompt_length
        token = next_token(prefix, entries, state.start.seed, index)
        state.newest = token
        if self.not_finite.intersection(digests):
            answer.finish = shard_pb2.NUMERICAL
            state.masked = True
            return
        answer.tokens.append(token)
        if token in state.start.sampling.stop_ids:
            answer.finish = shard_pb2.STOP_ID
            state.masked = True
        if state.start.sampling.HasField("logprobs"):
            count = state.start.sampling.logprobs
            answer.logprobs.add(
                logprob=-token / 100, rank=1, top_ids=range(count), top_logprobs=[-1.0] * count
            )


def make_info(
    *,
    blocks: int = 1000,
    block_size: int = 4,
    rows: int = 256,
    step_tokens: int = 512,
    slots: int = 8,
    adapter_bytes: int = 10_000,
    max_model_len: int = 4096,
) -> shard_pb2.InfoReply:
    """What a shard says of itself. `blocks` leaves out block 0."""
    info = shard_pb2.InfoReply(
        protocol_version=1,
        model="fake",
        model_digest="fake-digest",
        architecture="FakeForCausalLM",
        device="cpu",
        dtype="float32",
        world_size=1,
        adapter_bytes=adapter_bytes,
        adapter_slots=slots,
        max_rank=64,
        max_model_len=max_model_len,
        max_num_seqs=rows,
        max_step_tokens=step_tokens,
        vocab_size=VOCAB,
    )
    info.kv_groups.add(
        layers=[0], kind=shard_pb2.KvGroup.FULL, block_bytes=1, block_count=blocks + 1, block_size=block_size
    )
    return info


class FakeShards:
    """A `ShardGroup` in memory. Steps take `step_seconds`; while `paused` no step is answered.

    `sources` maps a source's id to its adapter; unknown ids are not found. Groups of one router share
    `epochs`.
    """

    def __init__(
        self,
        info: shard_pb2.InfoReply | None = None,
        *,
        sources: dict[str, FakeAdapter] | None = None,
        step_seconds: float = 0.0,
        epochs: Iterator[int] | None = None,
    ) -> None:
        self._epochs = epochs or itertools.count(1)
        self.info = info or make_info()
        self.sources = sources or {}
        self.step_seconds = step_seconds
        self.load_seconds = 0.0
        self.load_error: RouterError | None = None
        self.alter: Callable[[shard_pb2.StepResult], None] = lambda result: None
        """Changes an answer before it is given."""
        self.device = FakeDevice(self.info)
        self.epoch = 0
        self.connected = False
        self.returns = True
        """After a loss the group comes back by itself."""
        self.plans: list[shard_pb2.StepPlan] = []
        self.in_flight_most = 0
        self.downloads: list[str] = []
        self.requests: list[shard_pb2.DownloadAdapterRequest] = []
        """Of the downloads."""
        self.tokenizers_asked: list[str] = []
        self.loads: list[str] = []
        """Digests, in order."""
        self.unloads = 0
        self.violations: list[str] = []
        self.abandoned: list[str] = []
        self.released: list[int] = []
        """Epochs that ended in order."""
        self._on_disk: dict[str, FakeAdapter] = {}
        """By digest, as they were when they were fetched."""
        self._events: GroupEvents | None = None
        self._pending: asyncio.Queue[shard_pb2.StepPlan] = asyncio.Queue()
        self._unanswered: list[shard_pb2.StepPlan] = []
        self._running = asyncio.Event()
        self._running.set()
        self._tasks: list[asyncio.Task[None]] = []

    # ShardGroup.

    def start(self, events: GroupEvents) -> None:
        self._events = events
        self.connect()

    def send(self, plan: shard_pb2.StepPlan) -> None:
        if not self.connected or plan.epoch != self.epoch:
            return
        self.plans.append(plan)
        self._unanswered.append(plan)
        self.in_flight_most = max(self.in_flight_most, len(self._unanswered))
        self._pending.put_nowait(plan)

    def abandon(self, epoch: int, reason: str) -> None:
        self.abandoned.append(reason)
        if self.connected and epoch == self.epoch:
            self.lose()

    def release(self, epoch: int) -> None:
        self._rule(
            self.connected and epoch == self.epoch and not self._unanswered, f"release of epoch {epoch}"
        )
        self._rule(not self.device.rows, "release amid running rows")
        self.released.append(epoch)
        self.connected = False

    async def tokenizer(self, adapter_digest: str = "") -> shard_pb2.TokenizerReply:
        self.tokenizers_asked.append(adapter_digest)
        if not adapter_digest:
            return shard_pb2.TokenizerReply(tokenizer_json=b"{}", stop_ids=[0])
        if not self.connected:
            raise ShardLost("gone")
        if adapter_digest not in self._on_disk:
            raise AdapterNotFound(f"{adapter_digest} is not on disk")
        return self._on_disk[adapter_digest].text or shard_pb2.TokenizerReply()

    async def download(
        self, request: shard_pb2.DownloadAdapterRequest
    ) -> AsyncIterator[shard_pb2.DownloadAdapterEvent]:
        self.downloads.append(request.id)
        self.requests.append(request)
        merged = request.source == shard_pb2.DownloadAdapterRequest.MERGED
        adapter = self._merge(request.merge) if merged else self.sources.get(request.id)
        if adapter is None:
            raise AdapterNotFound(f"nothing at {request.id}")
        progress = shard_pb2.DownloadProgress(bytes_done=1, bytes_total=adapter.bytes)
        yield shard_pb2.DownloadAdapterEvent(progress=progress)
        await asyncio.sleep(adapter.fetch_seconds)
        if not self.connected:
            raise ShardLost("gone")
        if adapter.error is not None:
            raise adapter.error
        digest = FakeAdapter.digest("merge" if merged else request.id, adapter.content)
        if request.expect_digest not in ("", digest):
            raise AdapterRejected(f"its files have changed: {request.expect_digest} is now {digest}")
        self._on_disk[digest] = replace(adapter)
        if adapter.not_finite:
            self.device.not_finite.add(digest)
        manifest = shard_pb2.AdapterManifest(
            digest=digest,
            revision=adapter.revision,
            rank_bytes=[adapter.bytes],
            max_rank=8,
            modules=4,
            own_tokenizer=bool(adapter.text and adapter.text.tokenizer_json),
            own_chat_template=bool(adapter.text and adapter.text.chat_template),
            **adapter.manifest,
        )
        yield shard_pb2.DownloadAdapterEvent(manifest=manifest)

    async def load(self, digest: str, slot: int) -> shard_pb2.LoadAdapterReply:
        self.loads.append(digest)
        await asyncio.sleep(self.load_seconds)
        if self.load_error is not None:
            raise self.load_error
        self._rule(digest in self._on_disk, f"load of {digest}, which is not on disk")
        self._rule(slot not in self.device.slots, f"load into slot {slot}, which is in use")
        self._rule(slot < self.info.adapter_slots, f"slot {slot} is out of range")
        size = self._size(digest)
        if size + sum(self._size(other) for other in self.device.slots.values()) > self.info.adapter_bytes:
            raise AdapterMemoryFull("no room")
        self.device.slots[slot] = digest
        return shard_pb2.LoadAdapterReply(bytes=size, modules=4)

    async def unload(self, slot: int) -> shard_pb2.UnloadAdapterReply:
        self.unloads += 1
        self._rule(slot in self.device.slots, f"unload of slot {slot}, which is empty")
        for start in [row.start for row in self.device.rows.values()] + [
            start for plan in self._unanswered for start in plan.starts
        ]:
            named = {entry.slot for span in start.spans for entry in span.entries}
            self._rule(slot not in named, f"unload of slot {slot}, which row {start.row} names")
        await asyncio.sleep(0)
        return shard_pb2.UnloadAdapterReply(bytes=self._size(self.device.slots.pop(slot)))

    async def close(self) -> None:
        self.connected = False
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # What a test does to it.

    def connect(self) -> None:
        """The group is (back) there, empty, with a new epoch."""
        assert self._events is not None
        self.epoch = next(self._epochs)
        self.connected = True
        self.device = FakeDevice(self.info)
        self._on_disk.clear()
        self._unanswered.clear()
        self._pending = asyncio.Queue()
        self._tasks.append(asyncio.create_task(self._work(self.epoch, self._pending)))
        self._events.group_ready(self.epoch, self.info)

    def lose(self) -> None:
        """The group dies with all it holds."""
        assert self._events is not None
        self.connected = False
        self._events.group_lost(self.epoch, ShardLost("gone"))
        if self.returns:
            asyncio.get_running_loop().call_soon(self.connect)

    def drain(self) -> None:
        """The group is about to stop."""
        assert self._events is not None
        self._events.group_draining(self.epoch)

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    async def _work(self, epoch: int, pending: asyncio.Queue[shard_pb2.StepPlan]) -> None:
        while True:
            plan = await pending.get()
            await asyncio.sleep(self.step_seconds)
            await self._running.wait()
            if not self.connected or epoch != self.epoch:
                return
            try:
                result = self.device.run(plan)
            except ContractViolation as error:
                self.violations.append(str(error))
                raise
            self._unanswered.remove(plan)
            self.alter(result)
            assert self._events is not None
            self._events.step_answered(result)

    def _merge(self, recipe: shard_pb2.MergeRecipe) -> FakeAdapter:
        """A merged adapter is a function of its recipe."""
        for part in recipe.parts:
            if part.digest not in self._on_disk:
                raise AdapterNotFound(f"{part.digest} is not on disk")
        content = zlib.crc32(recipe.SerializeToString(deterministic=True))
        return FakeAdapter(content=f"{recipe.method}-{content}", manifest={"kind": "merged LoRA"})

    def _size(self, digest: str) -> int:
        return self._on_disk[digest].bytes

    def _rule(self, condition: bool, message: str) -> None:
        if not condition:
            self.violations.append(message)
            raise ContractViolation(message)
