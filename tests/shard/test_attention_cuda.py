"""Attention as a GPU does it, its kernels emulated, against attention in plain torch over the same cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from loraplex.kernels.cuda_decoder import CudaDecoderOps
from loraplex.kernels.decoder_ops import Scores
from loraplex.proto import shard_pb2 as pb
from loraplex.shard.attention import Options, PagedAttention, attend
from loraplex.shard.attention_cuda import CudaAttention, Packed, flash_attention, pack
from loraplex.shard.batch import Batch, PromptSegment, build_batch
from loraplex.shard.kv import KvCache, LayerShape
from loraplex.shard.rows import Row, RowTable

from ..kernels.emulation.launcher import EmulatedLauncher, missing

HEADS, KV_HEADS, BLOCK, ROWS, BLOCKS, LAYERS = 4, 2, 16, 4, 8, 2
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

Step = tuple[dict[int, int], list[int]]
"""Tokens of each row's next chunk, and the rows that decode."""

STEPS: tuple[Step, ...] = (
    ({0: 40, 1: 5}, []),
    ({1: 30, 2: 17}, [0]),
    ({1: 1, 3: 1}, [0, 2]),
    ({}, [0, 1, 2, 3]),
)


@dataclass
class PlainVarlen:
    """`VarlenAttention` in plain torch, counting its calls."""

    calls: list[Packed] = field(default_factory=list)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, options: Options
    ) -> torch.Tensor:
        self.calls.append(packed)
        out = torch.empty_like(q)
        query_ends, key_ends = packed.query_ends.tolist(), packed.key_ends.tolist()
        assert (query_ends[-1], key_ends[-1]) == (len(q), len(k))
        for i in range(len(query_ends) - 1):
            queries, keys = slice(*query_ends[i : i + 2]), slice(*key_ends[i : i + 2])
            count, total = queries.stop - queries.start, keys.stop - keys.start
            assert count <= packed.longest_query
            assert total <= packed.longest_key
            back = torch.arange(total - count, total)[:, None] - torch.arange(total)[None]
            mask = (back >= 0) & (back < (options.window or total))
            k_own, v_own = (
                each[keys].repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(0, 1)[None]
                for each in (k, v)
            )
            attended = attend(q[queries].transpose(0, 1)[None], k_own, v_own, mask, options)
            out[queries] = attended[0].transpose(0, 1)
        return out


class NoKernels(CudaDecoderOps):
    """For steps that must do without kernels."""

    def __init__(self) -> None:
        pass

    def decode_attention(self, *args: Any) -> None:
        raise AssertionError("a kernel was launched")


class Watched(CudaDecoderOps):
    """Notes where the room lies that each launch is given."""

    def __init__(self) -> None:
        super().__init__(EmulatedLauncher())
        self.rooms: set[int] = set()

    def decode_attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        tables: torch.Tensor,
        lengths: torch.Tensor,
        room: torch.Tensor,
        scores: Scores,
    ) -> None:
        self.rooms.add(room.data_ptr())
        super().decode_attention(out, q, cache, tables, lengths, room, scores)


@pytest.fixture
def ops() -> Watched:
    if (why := missing()) is not None:
        pytest.skip(why)
    return Watched()


def cache(dtype: torch.dtype, dim: int, value_dim: int) -> KvCache:
    shapes = {layer: LayerShape(KV_HEADS, dim, value_dim) for layer in range(LAYERS)}
    return KvCache(shapes, blocks=ROWS * BLOCKS + 1, block_size=BLOCK, dtype=dtype, device=CPU)


def cuda_attention(kv: KvCache, ops: CudaDecoderOps, varlen_attention: PlainVarlen) -> CudaAttention:
    return CudaAttention(kv, ops, varlen_attention, rows=ROWS, max_blocks=BLOCKS)


def batches() -> list[Batch]:
    """STEPS, over blocks that lie in no order."""
    rows = RowTable(ROWS, BLOCKS)
    order = torch.randperm(ROWS * BLOCKS, generator=torch.Generator().manual_seed(3)).add(1).tolist()
    for row in range(ROWS):
        rows.start(Row.from_proto(pb.RowStart(row=row, prompt_length=1)))
        rows.extend(row, [order.pop() for _ in range(BLOCKS)])
    result = []
    for chunks, decode in STEPS:
        plan = pb.StepPlan(decode_rows=decode)
        for row in decode:
            rows[row].tokens.append(0)
        for row, count in chunks.items():
            plan.chunks.add(row=row, start=len(rows[row].tokens), tokens=[0] * count)
        result.append(build_batch(plan, rows, block_size=BLOCK))
    return result


def run(attention: PagedAttention, kv: KvCache, options: Options) -> list[torch.Tensor]:
    """What every layer of every step attends to, of random queries, keys and values."""
    generator = torch.Generator().manual_seed(7)
    outputs = []
    for batch in batches():
        attention.begin(batch)
        for layer in kv.layers:
            keys, values = kv.layer(layer)
            tokens = len(batch.token_ids)
            k = torch.randn(tokens, KV_HEADS, keys.shape[-1], generator=generator)
            v = torch.randn(tokens, KV_HEADS, values.shape[-1], generator=generator)
            q = torch.randn(tokens, HEADS, keys.shape[-1], generator=generator)
            kv.write(layer, batch.kv_slots, k.to(keys.dtype), v.to(keys.dtype))
            outputs.append(attention.attend(layer, q.to(keys.dtype), options))
    return outputs


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        limit = TOLERANCE[one.dtype]
        torch.testing.assert_close(one.double(), other.double(), rtol=limit, atol=limit)


@pytest.mark.parametrize("window", [None, 1, 3, 20, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prompts_and_decode_rows_in_one_step(window: int | None, dtype: torch.dtype, ops: Watched) -> None:
    options, plain, kv = Options(0.125, window, None), PlainVarlen(), cache(dtype, 64, 64)
    got = run(cuda_attention(kv, ops, plain), kv, options)
    other = cache(dtype, 64, 64)
    assert_same(got, run(PagedAttention(other), other, options))
    assert len(plain.calls) == 3 * LAYERS, "all prompts of a step go in one call a layer"
    assert len({id(packed) for packed in plain.calls}) == 3, "what a step's layers share is made once"
    assert len(ops.rooms) == 1, "room for decode rows is taken once"


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim", "softcap"),
    [
        pytest.param(torch.float32, 64, 64, None, id="fp32"),
        pytest.param(torch.bfloat16, 64, 64, 5.0, id="softcap"),
        pytest.param(torch.float16, 20, 20, None, id="odd heads"),
    ],
)
def test_prompts_that_flash_attention_does_not_serve(
    dtype: torch.dtype, dim: int, value_dim: int, softcap: float | None, ops: Watched
) -> None:
    options, plain, kv = Options(0.125, 20, softcap), PlainVarlen(), cache(dtype, dim, value_dim)
    got = run(cuda_attention(kv, ops, plain), kv, options)
    other = cache(dtype, dim, value_dim)
    assert_same(got, run(PagedAttention(other), other, options))
    assert not plain.calls
    assert ops.rooms


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 32), (512, 512)])
def test_heads_that_no_kernel_serves(dim: int, value_dim: int) -> None:
    options, plain, kv = Options(0.05, None, None), PlainVarlen(), cache(torch.bfloat16, dim, value_dim)
    got = run(cuda_attention(kv, NoKernels(), plain), kv, options)
    other = cache(torch.bfloat16, dim, value_dim)
    assert_same(got, run(PagedAttention(other), other, options))
    assert not plain.calls


def test_where_the_prompts_of_a_step_lie() -> None:
    blocks = [torch.tensor(each) for each in ([5, 2], [7], [1, 9, 4])]
    prompts = [
        PromptSegment(2, 3, 4, blocks[0]),
        PromptSegment(5, 4, 0, blocks[1]),
        PromptSegment(9, 1, 8, blocks[2]),
    ]
    packed = pack(prompts, 4)
    assert packed.first == 2
    first = [20, 21, 22, 23, 8, 9, 10]
    assert packed.kv_slots.tolist() == [*first, 28, 29, 30, 31, 4, 5, 6, 7, 36, 37, 38, 39, 16]
    assert packed.query_ends.tolist() == [0, 3, 7, 8]
    assert packed.key_ends.tolist() == [0, 7, 11, 20]
    assert packed.query_ends.dtype == packed.key_ends.dtype == torch.int32
    assert (packed.longest_query, packed.longest_key) == (4, 9)


def without_gqa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """torch 2.11's arguments."""
    seen = Packed(0, torch.empty(0), cu_seq_q, cu_seq_k, max_q, max_k)
    assert scale is not None
    assert window_size[1] == 0, "causal"
    back = None if window_size[0] == -1 else window_size[0] + 1
    return PlainVarlen()(query, key, value, seen, Options(scale, back, None))


def with_gqa(
    *args: Any, enable_gqa: bool = False, num_splits: int | None = None, **more: Any
) -> torch.Tensor:
    """torch 2.12's and later: fewer heads of keys have to be asked for."""
    assert enable_gqa
    return without_gqa(*args, **more)


@pytest.mark.parametrize("function", [without_gqa, with_gqa])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_every_versions_arguments(
    function: Callable[..., torch.Tensor], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", function)
    packed = pack([PromptSegment(0, 3, 2, torch.tensor([1])), PromptSegment(3, 4, 0, torch.tensor([2]))], 16)
    q, k = torch.randn(7, HEADS, 8), torch.randn(9, KV_HEADS, 8)
    options = Options(0.3, window, None)
    assert torch.equal(flash_attention()(q, k, k, packed, options), PlainVarlen()(q, k, k, packed, options))


def test_this_torch_has_the_arguments_that_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    signature, windows = inspect.signature(varlen.varlen_attn), []

    def note(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)
        windows.append(bound.arguments["window_size"])
        return torch.empty_like(bound.arguments["query"])

    note.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", note)
    packed, k = pack([PromptSegment(0, 2, 0, torch.tensor([1]))], 16), torch.ones(2, KV_HEADS, 8)
    for window in (None, 4):
        flash_attention()(torch.ones(2, HEADS, 8), k, k, packed, Options(1.0, window, None))
    assert windows == [(-1, 0), (3, 0)]
