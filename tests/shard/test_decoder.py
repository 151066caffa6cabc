"""The fused forward pass, its kernels emulated, against transformers' own and against merged models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DiffLlamaConfig,
    Ernie4_5Config,
    GlmConfig,
    Ministral3Config,
    PreTrainedConfig,
    SmolLM3Config,
)

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.cuda_decoder import CudaDecoderOps
from loraplex.kernels.load import Backend
from loraplex.kernels.ops import Entries
from loraplex.proto import shard_pb2 as pb
from loraplex.shard import load
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.attention import NAME, PagedAttention, register
from loraplex.shard.attention_cuda import CudaAttention
from loraplex.shard.batch import Batch, build_batch
from loraplex.shard.config import ShardConfig
from loraplex.shard.decoder import FusedDecoder, FusedParts, NotFused, find_decoder
from loraplex.shard.kv import KvCache
from loraplex.shard.model import Specialised, specialise
from loraplex.shard.rows import Row, RowTable
from loraplex.shard.trace import trace

from ..kernels.emulation.launcher import EmulatedLauncher, missing
from ..tiny import _LLAMA_LIKE
from .dense import Changes, assert_row_equals, merged_logits, packed
from .test_attention_cuda import PlainVarlen
from .test_served_changes import of_every_kind

FUSED = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "phi3"]
BLOCK, BLOCKS, CPU = 4, 6, torch.device("cpu")

SEQUENCES = (
    (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7),
    (2, 7, 1, 8, 2, 8, 1),
    (1, 6, 1, 8, 0, 3, 3, 9, 8, 8),
    (5, 7, 7, 2, 1, 5, 6, 6, 4, 9, 0),
)
"""Tokens of each row, prompt and forced outputs."""

PROMPTS = (11, 4, 7, 10)
STEPS: tuple[tuple[dict[int, int], list[int]], ...] = (
    ({0: 5, 1: 4}, []),
    ({0: 6, 2: 7}, [1]),
    ({3: 10}, [0, 1, 2]),
    ({}, [0, 2, 3]),
)
"""Tokens of each row's next chunk, and the rows that decode: beside each other, and longer than a window."""


@dataclass
class Fused:
    """A model with both of its forward passes, and adapters in its slots."""

    base: nn.Module
    """As it was."""
    special: Specialised
    decoder: FusedDecoder
    attention: CudaAttention
    kv: KvCache

    @classmethod
    def of(cls, base: nn.Module, ops: CudaDecoderOps) -> Fused:
        model = copy.deepcopy(base)
        seen = trace(model)
        dtype = next(model.parameters()).dtype
        blocks = len(SEQUENCES) * BLOCKS + 1
        kv = KvCache(seen.layers, blocks=blocks, block_size=BLOCK, dtype=dtype, device=CPU)
        attention = CudaAttention(kv, ops, PlainVarlen(), rows=len(SEQUENCES), max_blocks=BLOCKS)
        special = specialise(model, seen, attention=attention, ops=CpuLoraOps(), max_rank=64)
        parts = FusedParts(kv, attention, ops)
        return cls(base, special, FusedDecoder(find_decoder(model, seen), parts), attention, kv)

    def adapters(self, adapters: Sequence[Changes]) -> None:
        pool = AdapterPool(self.special.sites, slots=16, budget=1 << 30)
        for slot, changes in enumerate(adapters):
            pool.load(slot, str(slot), packed(self.special.layout, changes))

    def run(self, row_entries: Sequence[Entries], *, fused: bool) -> list[tuple[Batch, torch.Tensor]]:
        """Every step and its logits, over a cache that holds nothing yet."""
        for layer in self.kv.layers:
            for values in self.kv.layer(layer):
                values.fill_(torch.nan)
        register(self.attention.forward)
        own = self.special.model.use(self.decoder.forward) if fused else None
        results = [(batch, self.special.model.forward(batch)) for batch in _batches(row_entries)]
        if own is not None:
            self.special.model.use(own)
        return results


def _batches(row_entries: Sequence[Entries]) -> Sequence[Batch]:
    rows, batches = RowTable(len(SEQUENCES), BLOCKS), []
    for index, entries in enumerate(row_entries):
        start = pb.RowStart(row=index, prompt_length=PROMPTS[index])
        if entries:
            span = start.spans.add(start=0)
            for slot, weight in entries:
                span.entries.add(slot=slot, weight=weight)
        rows.start(Row.from_proto(start))
        rows.extend(index, range(1 + index * BLOCKS, 1 + (index + 1) * BLOCKS))
    for chunks, decode in STEPS:
        plan = pb.StepPlan(decode_rows=decode)
        for index in decode:
            rows[index].tokens.append(SEQUENCES[index][len(rows[index].tokens)])
        for index, count in chunks.items():
            first = len(rows[index].tokens)
            tokens = SEQUENCES[index][first : first + count]
            plan.chunks.add(row=index, start=first, tokens=tokens, last=first + count == PROMPTS[index])
        batches.append(build_batch(plan, rows, block_size=BLOCK))
    return batches


@pytest.fixture(scope="module")
def ops() -> CudaDecoderOps:
    if (why := missing()) is not None:
        pytest.skip(why)
    return CudaDecoderOps(EmulatedLauncher())


@pytest.fixture(scope="module")
def served(tiny_model: Callable[[str], Path], ops: CudaDecoderOps) -> Callable[[str], Fused]:
    made: dict[str, Fused] = {}

    def serve(kind: str) -> Fused:
        if kind not in made:
            made[kind] = Fused.of(AutoModelForCausalLM.from_pretrained(tiny_model(kind)), ops)
            adapters = of_every_kind(made[kind].special.layout, np.random.default_rng(0))
            made[kind].adapters(adapters)
        return made[kind]

    return serve


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 where there are logits; the same places must have none."""
    assert torch.equal(got.isneginf(), want.isneginf())
    got, want = got.nan_to_num(neginf=0.0).double(), want.nan_to_num(neginf=0.0).double()
    return float((got - want).norm() / want.norm())


ROW_ENTRIES: tuple[tuple[Entries, ...], ...] = (
    ((), (), (), ()),
    (((0, 1.0),), (), ((1, 1.0),), ((2, 1.0),)),
    (((3, 1.0),), ((4, 1.0),), ((5, 1.0),), ((6, 1.0),)),
    (((6, 1.0),), ((7, 0.5), (0, -1.5)), (), ((6, 1.0),)),
)
"""The adapters of each row, of every kind: 6 brings every norm."""


@pytest.mark.parametrize("row_entries", ROW_ENTRIES, ids=["base", "linears", "kinds", "norms"])
@pytest.mark.parametrize("kind", FUSED)
def test_equals_the_models_own_forward_pass(
    kind: str, row_entries: Sequence[Entries], served: Callable[[str], Fused]
) -> None:
    model = served(kind)
    own = model.run(row_entries, fused=False)
    for (_, want), (_, got) in zip(own, model.run(row_entries, fused=True), strict=True):
        assert distance(got, want) <= 1e-5


@pytest.mark.parametrize("row_entries", ROW_ENTRIES[1:], ids=["linears", "kinds", "norms"])
@pytest.mark.parametrize("kind", FUSED)
def test_equals_transformers_with_merged_weights(
    kind: str, row_entries: Sequence[Entries], served: Callable[[str], Fused]
) -> None:
    model = served(kind)
    adapters = of_every_kind(model.special.layout, np.random.default_rng(0))
    wanted = [
        merged_logits(
            model.base, model.special.layout, [(adapters[slot], weight) for slot, weight in entries], sequence
        )
        for entries, sequence in zip(row_entries, SEQUENCES, strict=True)
    ]
    lengths = [0] * len(SEQUENCES)
    for (chunks, decode), (batch, logits) in zip(STEPS, model.run(row_entries, fused=True), strict=True):
        for row in (*decode, *chunks):
            lengths[row] += chunks.get(row, 1)
        for sample, line in zip(batch.samples, batch.sample_rows, strict=True):
            last = slice(lengths[sample.id] - 1, lengths[sample.id])
            assert_row_equals(logits[line : line + 1], wanted[sample.id][last])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "phi3"])
def test_half_precision(
    kind: str, dtype: torch.dtype, limit: float, tiny_model: Callable[[str], Path], ops: CudaDecoderOps
) -> None:
    model = Fused.of(AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=dtype), ops)
    own = model.run(ROW_ENTRIES[0], fused=False)
    for (_, want), (_, got) in zip(own, model.run(ROW_ENTRIES[0], fused=True), strict=True):
        assert distance(got, want) <= limit


def _specialised(model: Any) -> tuple[Any, Any]:
    seen = trace(model)
    kv = KvCache(seen.layers, blocks=2, block_size=16, dtype=model.dtype, device=CPU)
    specialise(model, seen, attention=PagedAttention(kv), ops=CpuLoraOps(), max_rank=8)
    return model, seen


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gemma2", "SiLU"), ("gemma3", "SiLU"), ("gpt2", "SiLU"), ("mixtral", "MLP"), ("qwen3_moe", "MLP")],
)
def test_other_patterns_keep_their_own_forward_pass(
    kind: str, reason: str, tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(NotFused, match=reason):
        find_decoder(*_specialised(AutoModelForCausalLM.from_pretrained(tiny_model(kind))))


_FAR_SCALED = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
}

LOOKALIKES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], str]] = {
    "layers without positions": (SmolLM3Config, {"num_hidden_layers": 4}, "layer 3 makes other queries"),
    "neighbours turned": (Ernie4_5Config, {}, "makes other queries"),
    "queries scaled far on": (
        Ministral3Config,
        {"rope_parameters": _FAR_SCALED, "head_dim": 16},
        "other queries",
    ),
    "weights beside projections": (DiffLlamaConfig, {}, "other projections"),
    "half of each head turned": (GlmConfig, {"head_dim": 16}, "only a part of each head"),
}
"""Of the same parts as Llama, but other in what they do with them."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_told(name: str, dtype: torch.dtype) -> None:
    config, extra, reason = LOOKALIKES[name]
    with pytest.raises(NotFused, match=reason):
        find_decoder(*_specialised(_random(config(**_LLAMA_LIKE | extra), dtype)))


def _random(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, attn_implementation="eager"
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.12)
    return model.to(dtype).eval()


def _assembled(directory: Path, ops: CudaDecoderOps) -> load.Assembled:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    config = ShardConfig(model=str(directory), device="cpu", kv_memory=1 << 20)
    return load.assemble(load.ReadModel(model), config, Backend(CpuLoraOps(), ops), CPU)


def test_is_used_where_it_gives_the_same(
    tiny_model: Callable[[str], Path], ops: CudaDecoderOps, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        _assembled(tiny_model("mistral"), ops)
        assert "the forward pass is fused" in caplog.text
        caplog.clear()
        _assembled(tiny_model("gemma2"), ops)
        assert "own forward pass is kept: its activation is not SiLU" in caplog.text


def test_is_not_used_where_it_gives_something_else(
    tiny_model: Callable[[str], Path], ops: CudaDecoderOps, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(CudaDecoderOps):
        def silu_mul(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
            super().silu_mul(out, gate_up.flip(1).contiguous())

    batch = _batches([()] * len(SEQUENCES))[0]
    expected = _assembled(tiny_model("llama"), ops).model.forward(batch)
    with caplog.at_level(logging.INFO):
        assembled = _assembled(tiny_model("llama"), Wrong(EmulatedLauncher()))
    assert "differs by" in caplog.text
    torch.testing.assert_close(assembled.model.forward(batch), expected)


def test_looking_for_the_pattern_leaves_the_model_as_it_was(
    tiny_model: Callable[[str], Path], ops: CudaDecoderOps
) -> None:
    model = Fused.of(AutoModelForCausalLM.from_pretrained(tiny_model("qwen3")), ops)
    assert AttentionInterface()[NAME] == model.attention.forward  # type: ignore[no-untyped-call]
