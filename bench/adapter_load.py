"""How long does an adapter take from host memory to the device, and what does it cost there?

Packs a LoRA adapter for every linear of a 12-layer, 768-wide model, as PEFT would save it, loads and
unloads it many times, and prints a table.

    python -m bench.adapter_load [--rank N] [--repeats N] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors.numpy import save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.kernels.load import load
from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.files import CONFIG, WEIGHTS, FileLimits
from loraplex.shard.adapters.layout import AdapterLayout
from loraplex.shard.adapters.pack import Packer
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import LinearWeights, PackedAdapter, read_packed
from loraplex.shard.attention import PagedAttention
from loraplex.shard.kv import KvCache
from loraplex.shard.model import Specialised, specialise
from loraplex.shard.trace import trace

MODEL = LlamaConfig(
    vocab_size=1000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one dtype. Milliseconds and bytes."""

    dtype: str
    pack: float
    read: float
    load_best: float
    load_median: float
    unload_median: float
    tensor_bytes: int
    device_bytes: int

    def __str__(self) -> str:
        cells = (
            self.dtype,
            f"{self.pack:.0f}",
            f"{self.read:.1f}",
            f"{self.load_best:.2f}",
            f"{self.load_median:.2f}",
            f"{self.unload_median:.2f}",
            f"{self.tensor_bytes:,}",
            f"{self.device_bytes:,}",
        )
        return "| " + " | ".join(cells) + " |"


HEADER = (
    "| dtype | pack ms | read ms | load ms, best | median | unload ms, median "
    "| bytes of A and B | on the device |"
)


def build() -> Specialised:
    model: nn.Module = LlamaForCausalLM(MODEL)
    model.train(False)
    seen = trace(model)
    kv = KvCache(seen.layers, blocks=2, block_size=16, dtype=torch.float32, device=CPU)
    return specialise(model, seen, attention=PagedAttention(kv), ops=load(CPU).lora, max_rank=256)


def write_adapter(directory: Path, layout: AdapterLayout, rank: int) -> int:
    """Save LoRA on every linear but the head; answers how many values its A and B hold."""
    random, tensors = np.random.default_rng(0), {}
    for target in layout.linears:
        if not target.is_head:
            name = f"base_model.model.{target.name}"
            tensors[f"{name}.lora_A.weight"] = random.standard_normal((rank, target.in_features), np.float32)
            tensors[f"{name}.lora_B.weight"] = random.standard_normal((target.out_features, rank), np.float32)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({key.split(".")[-3] for key in tensors}),
    }
    directory.mkdir()
    (directory / CONFIG).write_text(json.dumps(config))
    (directory / WEIGHTS).write_bytes(save(tensors))
    return sum(tensor.size for tensor in tensors.values())


def pieces(adapter: PackedAdapter) -> Iterator[torch.Tensor]:
    """Every A and B that the model reads."""
    for weights in adapter.site_weights().values():
        assert isinstance(weights, LinearWeights)
        assert weights.lora is not None
        yield weights.lora.a
        yield from (part.b for part in weights.lora.parts)


def measure(special: Specialised, dtype: str, rank: int, repeats: int) -> Figures:
    layout = replace(special.layout, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        directory, target = Path(folder, "adapter"), Path(folder, "packed")
        values = write_adapter(directory, layout, rank)
        began = time.perf_counter()
        result = Packer(layout, FileLimits()).pack(directory, target, BaseTensors(special.parameters))
        packed_at = time.perf_counter()
        adapter = read_packed(target, result.file.index, pin=False)
        read_at = time.perf_counter()
    held = sum(piece.nbytes for piece in pieces(adapter))
    assert held == values * getattr(torch, dtype).itemsize
    pool = AdapterPool(special.sites, slots=1, budget=1 << 40)
    loads, unloads = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        pool.load(0, "digest", adapter)
        loaded_at = time.perf_counter()
        used = pool.used_bytes
        pool.unload(0)
        loads.append(loaded_at - start)
        unloads.append(time.perf_counter() - loaded_at)
    return Figures(
        dtype=dtype,
        pack=1e3 * (packed_at - began),
        read=1e3 * (read_at - packed_at),
        load_best=1e3 * min(loads),
        load_median=1e3 * median(loads),
        unload_median=1e3 * median(unloads),
        tensor_bytes=held,
        device_bytes=used,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    special = build()
    print(f"torch {torch.__version__}, {options.threads} threads, rank {options.rank}\n")
    print(HEADER)
    print("|---" + "|---:" * 7 + "|")
    for dtype in ("float32", "bfloat16"):
        print(measure(special, dtype, options.rank, options.repeats), flush=True)


if __name__ == "__main__":
    main()
