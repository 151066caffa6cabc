"""From a model's name to a model that runs steps: fetch, load, check, specialise."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM

from .. import __version__
from ..kernels.cuda import CudaLoraOps
from ..kernels.cuda_decoder import PLAIN_DIM, CudaDecoderOps
from ..kernels.device_tables import PARTS
from ..kernels.launch import KernelUnusable
from ..kernels.load import Backend, BackendMissing
from ..kernels.load import load as load_backend
from ..proto import shard_pb2 as pb
from . import device as devices
from . import gate
from .adapters.base_tensors import BaseTensors
from .adapters.layout import AdapterLayout
from .adapters.pool import Site
from .attention import PagedAttention
from .attention_cuda import CudaAttention, flash_attention
from .config import MIB, ShardConfig
from .decoder import Decoder, FusedDecoder, FusedParts, LayerStack, NotFused, find_decoder
from .errors import ModelRefused
from .graphs import ReservedRouting, StepGraphs, StepInputs, buckets_up_to
from .kv import KvCache, block_bytes
from .model import Specialised, StepModel, specialise
from .parallel.checkpoint import Checkpoint, read_part
from .parallel.forward import join_outputs
from .parallel.meeting import Meeting, meet
from .parallel.ranks import Alone, Ranks
from .parallel.split import WHOLE, Split, narrow
from .tokenizer import tokenizer_reply
from .trace import Trace, trace

log = logging.getLogger(__name__)

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
DIGEST_EDGE = 64 * 1024
CPU_KV_MEMORY = 512 * MIB
GPU_KV_SHARE = 0.8
"""Of what is free once the weights lie there and the adapters have their part; the rest is for the steps."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model made ready for steps."""

    model: StepModel
    graphs: StepGraphs | None
    """Its captured decode steps, where the device has such."""
    kv: KvCache
    sites: Sequence[Site]
    """The places in the model that adapters change, by number."""
    base: BaseTensors
    layout: AdapterLayout
    device: torch.device
    max_model_len: int
    vocab_size: int
    weight_bytes: int
    block_bytes: int
    ranks: Ranks

    @property
    def dtype(self) -> str:
        """What it computes in, and adapters are packed as."""
        return self.layout.dtype


@dataclass(frozen=True, slots=True)
class LoadedModel(Assembled):
    """Everything that comes out of a checkpoint."""

    tokenizer: pb.TokenizerReply
    digest: str
    architecture: str


def load_model(config: ShardConfig, *, backend: Backend | None = None) -> LoadedModel:
    """Load and check the base, to be run by `backend`; unless given, by what its device has.

    Raises ModelRefused, or RanksLost, with one sentence that says what to do.
    """
    device, own = _backend(config.device)
    backend = backend or own
    directory = _locate(config.model, config.revision)
    digest = _content_id(directory)
    read = _read(directory, config, device, _meet(config, digest, device))
    model = read.model
    try:
        assembled = assemble(read, config, backend, device)
    except KernelUnusable as error:
        raise ModelRefused(
            f"{error}; `loraplex doctor` says more, --device cpu serves without kernels"
        ) from error
    return LoadedModel(
        **{field.name: getattr(assembled, field.name) for field in fields(Assembled)},
        tokenizer=tokenizer_reply(str(directory), model),
        digest=digest,
        architecture=type(model).__name__,
    )


def _backend(name: str) -> tuple[torch.device, Backend]:
    """A device and what it computes with. "auto" takes the CPU where nothing serves the GPU."""
    device = devices.resolve(name)
    try:
        return device, load_backend(device)
    except BackendMissing as error:
        if name != "auto":
            raise ModelRefused(str(error)) from error
        log.warning("serving on the CPU: %s", error)
    device = torch.device("cpu")
    return device, load_backend(device)


def assemble(read: ReadModel, config: ShardConfig, backend: Backend, device: torch.device) -> Assembled:
    """Check a transformers model that lies on `device`, and make it ready. Changes the model.

    Raises ModelRefused where it cannot be served exactly.
    """
    model, split = read.model, read.split
    gate.check_config(model.config)
    max_model_len = gate.length_limit(model.config, config.max_model_len)
    vocab_size = read.vocab_size
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    reference = gate.reference_logits(model, vocab_size)
    observed = trace(model)
    gate.check_windows(model.config, observed, max_model_len)
    size = block_bytes(observed.layers, config.block_size, model.dtype)
    kv = KvCache(
        observed.layers,
        blocks=split.ranks.least(_block_count(config, kv_memory(config, device), size, max_model_len)),
        block_size=config.block_size,
        dtype=model.dtype,
        device=device,
    )
    max_blocks = -(-max_model_len // config.block_size)
    attention = _attention(kv, backend, config, max_blocks)
    special = specialise(
        model,
        observed,
        attention=attention,
        ops=backend.lora,
        max_rank=config.max_rank,
        split=split,
        read_whole=read.read_whole,
    )
    gate.check_packed(special.model, reference, block_size=config.block_size)
    if backend.decoder is not None and model.dtype in backend.decoder.dtypes:
        _fuse(read, special, observed, FusedParts(kv, attention, backend.decoder), config.block_size)
    return Assembled(
        model=special.model,
        graphs=_capture(special, observed, backend, config, max_blocks),
        kv=kv,
        sites=special.sites,
        base=BaseTensors(special.parameters, special.held),
        layout=special.layout,
        device=device,
        max_model_len=max_model_len,
        vocab_size=reference[0].shape[-1],
        weight_bytes=weight_bytes,
        block_bytes=size,
        ranks=split.ranks,
    )


def _attention(kv: KvCache, backend: Backend, config: ShardConfig, max_blocks: int) -> PagedAttention:
    decoder = backend.decoder
    if decoder is None:
        return PagedAttention(kv)
    if isinstance(decoder, CudaDecoderOps):
        rows = config.max_num_seqs
        return CudaAttention(kv, decoder, flash_attention(), rows=rows, max_blocks=max_blocks)
    from .attention_native import NativeAttention

    return NativeAttention(kv, decoder)


def _fuse(read: ReadModel, special: Specialised, observed: Trace, parts: FusedParts, block_size: int) -> None:
    """Run the model's steps in fused pieces where it is of the common pattern and they give the same."""
    try:
        decoder = find_decoder(read.model, observed)
        fused = FusedDecoder(decoder, parts, _layer_stack(decoder, parts))
    except NotFused as error:
        log.info("transformers' own forward pass is kept: %s", error)
        return
    distance = gate.distance_of(special.model, fused.forward, read.vocab_size, block_size=block_size)
    if distance <= gate.TOLERANCE[read.model.dtype]:
        special.model.use(fused.forward)
        log.info("the forward pass is fused")
    else:
        log.warning("the fused forward pass differs by %.1e (relative L2) and is not used", distance)


def _layer_stack(decoder: Decoder, parts: FusedParts) -> LayerStack | None:
    if isinstance(parts.ops, CudaDecoderOps):
        return None
    from .decoder_native import native_layers

    return native_layers(decoder, parts)


def _capture(
    special: Specialised, observed: Trace, backend: Backend, config: ShardConfig, max_blocks: int
) -> StepGraphs | None:
    """Decode steps as CUDA graphs, where they do the same on the device whatever their rows hold."""
    ops = backend.lora
    if backend.capture is None or not isinstance(ops, CudaLoraOps):
        return None
    if special.layout.experts:
        log.info("decode steps are not captured: which rows an expert has is known on the host only")
        return None
    shapes = observed.layers.values()
    if any(shape.key_dim != shape.value_dim or shape.key_dim > PLAIN_DIM for shape in shapes):
        log.info("decode steps are not captured: attention of such heads is not the kernels'")
        return None
    rows = config.max_num_seqs
    placed = ops.reserve(rows=rows, slots=config.max_adapters, hidden=rows * PARTS * config.max_rank)
    reserved = ReservedRouting(placed, lambda routing, rows: ops.fill(placed, routing, rows))
    inputs = StepInputs(rows, max_blocks, placed.hidden.device)
    graphs = StepGraphs(special.model, backend.capture(), inputs, reserved)
    graphs.capture(buckets_up_to(rows))
    return graphs


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


SAME_ON_RANKS = (
    *("dtype", "block_size", "kv_memory", "max_model_len", "max_num_seqs", "max_step_tokens"),
    *("max_adapters", "max_rank"),
)
"""Settings in which the ranks of a group may not differ."""


def _meet(config: ShardConfig, digest: str, device: torch.device) -> Ranks:
    """Whom the model is shared with, once all of them are there. Raises RanksLost or ModelRefused."""
    if config.world_size == 1:
        return Alone()
    facts = {name: str(getattr(config, name)) for name in SAME_ON_RANKS}
    facts |= {"version": __version__, "model": digest, "kind of device": device.type}
    return meet(
        Meeting(
            rank=config.rank,
            size=config.world_size,
            master=config.master,
            patience=config.rank_patience,
            facts=facts,
            store_prefix=config.store_prefix,
        ),
        device,
    )


@dataclass(frozen=True, slots=True)
class ReadModel:
    """A transformers model with its weights, or one rank's part of it."""

    model: Any
    split: Split = WHOLE
    read_whole: Callable[[str], torch.Tensor] | None = None
    """As of a SiteContext."""

    @property
    def vocab_size(self) -> int:
        """Embeddings of the whole model."""
        held = self.split.vocabulary
        return int(self.model.get_input_embeddings().weight.shape[0]) if held is None else held.size


def _read(directory: Path, config: ShardConfig, device: torch.device, ranks: Ranks) -> ReadModel:
    if not any(directory.glob("*.safetensors")):
        raise ModelRefused(f"{directory} holds no .safetensors weights; other formats are not read")
    dtype = getattr(torch, config.dtype) if config.dtype else "auto"
    try:
        if ranks.size > 1:
            return _read_part(directory, dtype, device, ranks)
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelRefused(f"transformers cannot load {directory}: {error}") from error
    return ReadModel(model.to(device))


def _read_part(directory: Path, dtype: torch.dtype | str, device: torch.device, ranks: Ranks) -> ReadModel:
    narrowed = narrow(AutoConfig.from_pretrained(directory), ranks)
    checkpoint = Checkpoint(directory, narrowed.whole)
    model = read_part(directory, checkpoint, narrowed, dtype)
    log.info("rank %d of %d has read %d bytes", ranks.rank, ranks.size, checkpoint.bytes_read)
    join_outputs(model, narrowed.split)
    return ReadModel(model.to(device), narrowed.split, lambda name: checkpoint.whole(name).to(model.dtype))


def kv_memory(config: ShardConfig, device: torch.device) -> int:
    """Bytes for keys and values: as asked for, or what the device can spare."""
    if config.kv_memory is not None:
        return config.kv_memory
    if device.type == "cpu":
        return CPU_KV_MEMORY
    return max(0, int(GPU_KV_SHARE * (devices.free_memory(device) - config.adapter_memory)))


def _block_count(config: ShardConfig, budget: int, size: int, max_model_len: int) -> int:
    """Blocks that fit the budget, the sink included, and never more than all rows could fill."""
    per_row = -(-max_model_len // config.block_size)
    count = min(budget // size, config.max_num_seqs * per_row + 1)
    if count < 2:
        raise ModelRefused(f"--kv-memory: {budget} bytes are too few, one block of this model takes {size}")
    return count


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
