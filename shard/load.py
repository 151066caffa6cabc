"""From a model's name to a model that runs steps: fetch, load, check, specialise."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from ..kernels.load import load as load_ops
from ..proto import shard_pb2 as pb
from . import device as devices
from . import gate
from .adapters.base_tensors import BaseTensors
from .adapters.layout import AdapterLayout
from .adapters.pool import Site
from .config import ShardConfig
from .errors import ModelRefused
from .kv import KvCache, block_bytes
from .model import StepModel, specialise
from .tokenizer import tokenizer_reply
from .trace import trace

log = logging.getLogger(__name__)

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
DIGEST_EDGE = 64 * 1024


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that comes out of a checkpoint."""

    model: StepModel
    kv: KvCache
    sites: Sequence[Site]
    """The places in the model that adapters change, by number."""
    base: BaseTensors
    layout: AdapterLayout
    tokenizer: pb.TokenizerReply
    device: torch.device
    dtype: str
    digest: str
    architecture: str
    max_model_len: int
    vocab_size: int
    weight_bytes: int
    block_bytes: int


def load_model(config: ShardConfig) -> LoadedModel:
    """Load and check the base. Raises ModelRefused with one sentence that says what to do."""
    device = devices.resolve(config.device)
    ops = load_ops(device.type)
    directory = _locate(config.model, config.revision)
    model = _read(directory, config, device)
    gate.check_config(model.config)
    max_model_len = gate.length_limit(model.config, config.max_model_len)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    reference = gate.reference_logits(model, vocab_size)
    observed = trace(model)
    gate.check_windows(model.config, observed, max_model_len)
    size = block_bytes(observed.layers, config.block_size, model.dtype)
    blocks = _block_count(config, size, max_model_len)
    kv = KvCache(
        observed.layers, blocks=blocks, block_size=config.block_size, dtype=model.dtype, device=device
    )
    special = specialise(model, observed, kv=kv, ops=ops, max_rank=config.max_rank)
    gate.check_packed(special.model, reference, block_size=config.block_size, device=device)
    return LoadedModel(
        model=special.model,
        kv=kv,
        sites=special.sites,
        base=BaseTensors(special.parameters),
        layout=special.layout,
        tokenizer=tokenizer_reply(str(directory), model),
        device=device,
        dtype=special.layout.dtype,
        digest=_content_id(directory),
        architecture=type(model).__name__,
        max_model_len=max_model_len,
        vocab_size=reference[0].shape[-1],
        weight_bytes=weight_bytes,
        block_bytes=size,
    )


def _locate(name: str, revision: str | None) -> Path:
    """The directory of a checkpoint, fetched from the hub where `name` is no directory."""
    path = Path(name)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
    except HFValidationError as error:
        raise ModelRefused(f"{name} is neither a directory nor a hub repository") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelRefused(f"{name} is no directory, and the hub did not deliver it: {error}") from error


def _read(directory: Path, config: ShardConfig, device: torch.device) -> Any:
    if not any(directory.glob("*.safetensors")):
        raise ModelRefused(f"{directory} holds no .safetensors weights; other formats are not read")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, config.dtype) if config.dtype else "auto",
            attn_implementation="eager",
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelRefused(f"transformers cannot load {directory}: {error}") from error
    return model.to(device)


def _block_count(config: ShardConfig, size: int, max_model_len: int) -> int:
    """Blocks that fit the budget, the sink included, and never more than all rows could fill."""
    per_row = -(-max_model_len // config.block_size)
    count = min(config.kv_memory // size, config.max_num_seqs * per_row + 1)
    if count < 2:
        raise ModelRefused(
            f"--kv-memory {config.kv_memory} is too small: one block of this model takes {size} bytes"
        )
    return int(count)


def _content_id(directory: Path) -> str:
    """SHA-256 over every config, and over each weight file's name, size, beginning and end.

    Tells checkpoints apart without reading gigabytes; ranks of one group must agree on it.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.json")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(DIGEST_EDGE))
            file.seek(max(0, size - DIGEST_EDGE))
            digest.update(file.read())
    return digest.hexdigest()
