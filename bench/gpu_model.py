"""A Llama of random weights on the device, its adapters, and batches for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.kernels.load import load
from loraplex.kernels.ops import Entries, route
from loraplex.shard.adapters.layout import AdapterLayout, Target
from loraplex.shard.adapters.packed import (
    ALIGNMENT,
    PackedArray,
    PackedIndex,
    PackedLinears,
    PackedPart,
)
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import PackedAdapter
from loraplex.shard.batch import Batch, DecodeSegment, PromptSegment
from loraplex.shard.config import ShardConfig
from loraplex.shard.load import Assembled, ReadModel, assemble

BLOCK = 16
DTYPE = torch.bfloat16


def llama_8b(layers: int = 32) -> LlamaConfig:
    """The shapes of Llama 3 8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def random_model(config: LlamaConfig, device: torch.device) -> Any:
    """The model with normal weights, made on the device."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(DTYPE).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            scale = 0.02 if "embed" in name else 1.0 / math.sqrt(parameter.shape[1])
            parameter.normal_(0.0, scale, generator=generator)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.train(False)
    return model


@dataclass(frozen=True, slots=True)
class Served:
    """A model made ready, and its pool."""

    assembled: Assembled
    pool: AdapterPool

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        device: torch.device,
        *,
        rows: int,
        context: int,
        slots: int,
        adapter_bytes: int,
    ) -> Served:
        """Room for `rows` sequences of `context` tokens each, and for adapters of so many bytes in all."""
        tokens = rows * (context + BLOCK)
        heads = config.num_key_value_heads or config.num_attention_heads
        dim = config.hidden_size // config.num_attention_heads
        block = 2 * config.num_hidden_layers * heads * dim * BLOCK * DTYPE.itemsize
        shard = ShardConfig(
            model="random",
            device=device.type,
            kv_memory=(tokens // BLOCK + 2) * block,
            block_size=BLOCK,
            adapter_memory=adapter_bytes,
            max_adapters=slots,
            max_model_len=context + BLOCK,
            max_num_seqs=rows,
        )
        assembled = assemble(ReadModel(random_model(config, device)), shard, load(device), device)
        return cls(assembled, AdapterPool(assembled.sites, slots=slots, budget=adapter_bytes))

    def load(self, slot: int, adapter: PackedAdapter) -> None:
        self.pool.load(slot, str(slot), adapter)


class _Room:
    """Hands out aligned places in a buffer that is still to be made."""

    def __init__(self) -> None:
        self.nbytes = 0

    def array(self, *shape: int) -> PackedArray:
        offset = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = offset + math.prod(shape) * DTYPE.itemsize
        return PackedArray(offset, shape, str(DTYPE).removeprefix("torch."))


def random_adapter(layout: AdapterLayout, rank: int, device: torch.device) -> PackedAdapter:
    """A plain LoRA on every linear but the head, of small random values."""
    room, sites = _Room(), []
    by_site: dict[int, list[Target]] = {}
    for target in layout.linears:
        if not target.is_head:
            by_site.setdefault(target.site, []).append(target)
    for site, targets in by_site.items():
        a = room.array(rank * len(targets), targets[0].in_features)
        parts = tuple(
            PackedPart(index * rank, target.out_offset, room.array(rank, target.out_features))
            for index, target in enumerate(targets)
        )
        sites.append(PackedLinears(site, len(targets), a, parts))
    values = torch.empty(room.nbytes // DTYPE.itemsize, dtype=DTYPE, device=device).normal_(0.0, 0.01)
    modules = sum(map(len, by_site.values()))
    return PackedAdapter(PackedIndex(room.nbytes, modules, tuple(sites)), values.view(torch.uint8))


def decode_batch(row_entries: Sequence[Entries], context: int) -> Batch:
    """One token each for rows that have `context` tokens, theirs included."""
    rows = len(row_entries)
    width = -(-context // BLOCK)
    tables = 1 + torch.arange(rows * width, dtype=torch.int32).view(rows, width)
    last = context - 1
    routing = route(row_entries, decode_rows=rows)
    return Batch(
        token_ids=torch.arange(rows) % 1000,
        positions=torch.full((rows,), last),
        kv_slots=tables[:, last // BLOCK].long() * BLOCK + last % BLOCK,
        decode=DecodeSegment(tables, torch.full((rows,), context)),
        prompts=(),
        logit_rows=torch.arange(rows),
        token_routing=routing,
        logit_routing=routing,
        samples=(),
        sample_rows=(),
        scored=(),
        row_count=rows,
    )


def prompt_batch(prompt_entries: Sequence[Entries], count: int) -> Batch:
    """Whole prompts of `count` tokens, one for each list of entries; logits of each one's last token."""
    prompts, width = len(prompt_entries), -(-count // BLOCK)
    tables = 1 + torch.arange(prompts * width).view(prompts, width)
    positions = torch.arange(count).repeat(prompts)
    blocks = tables.repeat_interleave(count, dim=0)
    entries = [each for each in prompt_entries for _ in range(count)]
    return Batch(
        token_ids=torch.arange(prompts * count) % 1000,
        positions=positions,
        kv_slots=blocks[torch.arange(len(positions)), positions // BLOCK] * BLOCK + positions % BLOCK,
        decode=None,
        prompts=tuple(PromptSegment(i * count, count, 0, tables[i]) for i in range(prompts)),
        logit_rows=torch.arange(1, prompts + 1) * count - 1,
        token_routing=route(entries),
        logit_routing=route(prompt_entries, decode_rows=prompts),
        samples=(),
        sample_rows=(),
        scored=(),
        row_count=prompts,
    )
