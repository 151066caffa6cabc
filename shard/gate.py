"""The gate: a model is served only if packed, paged rows give what separate plain runs give."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..proto import shard_pb2 as pb
from .batch import Batch, build_batch
from .errors import ModelRefused
from .model import CausalModel, Forward, StepModel
from .rows import Row, RowTable
from .trace import Trace

log = logging.getLogger(__name__)

PROBES = ((3, 1, 4, 1, 5, 9, 2), (2, 7, 1, 8, 2))
"""Token ids of two short sequences, taken modulo the vocabulary."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Largest relative L2 distance of the logits. A row that leaks into its neighbour is far beyond it."""

PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
BATCH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})


def check_config(config: Any) -> None:
    """Refuse layers whose state is not keys and values, by name. Raises ModelRefused."""
    kinds = set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS
    if kinds:
        raise ModelRefused(
            f"layers of these kinds keep a state that cannot be packed or paged: {sorted(kinds)}"
        )


def length_limit(config: Any, asked: int | None) -> int:
    """Tokens one sequence may have. A RoPE that changes with the longest row of a batch is held in the
    range where it does not; asking for more raises ModelRefused."""
    trained = int(getattr(config, "max_position_embeddings", None) or 8192)
    ropes = getattr(config, "rope_parameters", None) or {}
    flat = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    limit = trained
    for rope in flat:
        if rope.get("rope_type") in BATCH_DEPENDENT_ROPES:
            limit = min(limit, int(rope.get("original_max_position_embeddings") or trained))
    if asked is None:
        return min(limit, 8192)
    if asked > limit:
        raise ModelRefused(f"--max-model-len {asked} is above this model's limit of {limit} tokens")
    return asked


def check_windows(config: Any, trace: Trace, max_model_len: int) -> None:
    """Refuse a model whose sliding window is only in its mask, which the paged attention never sees."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    expected = "sliding_attention" in kinds if kinds else False
    if expected and window and window < max_model_len and not any(trace.windows.values()):
        raise ModelRefused(
            "this model does not pass its sliding window to attention; "
            f"serve it with --max-model-len {window}"
        )


def _probes(vocab_size: int) -> list[list[int]]:
    return [[token % vocab_size for token in probe] for probe in PROBES]


@torch.inference_mode()
def reference_logits(model: nn.Module, vocab_size: int) -> list[torch.Tensor]:
    """Logits [tokens, vocab] of each probe, from the untouched model, one run each."""
    device = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([probe], device=device), use_cache=False).logits[0]
        for probe in _probes(vocab_size)
    ]


def check_packed(model: StepModel, expected: Sequence[torch.Tensor], *, block_size: int) -> None:
    """Run the probes as one packed prefill over scattered blocks. Raises ModelRefused on a difference."""
    probes = _probes(expected[0].shape[-1])
    logits = model.forward(_probe_steps(probes, block_size)[0])
    start = 0
    for probe, reference in zip(probes, expected, strict=True):
        got = logits[start : start + len(probe)]
        start += len(probe)
        distance = _distance(got, reference)
        if not distance <= TOLERANCE[reference.dtype]:
            raise ModelRefused(
                f"two sequences packed in one batch differ from separate runs by {distance:.1e} "
                "(relative L2): this architecture cannot be served in mixed batches"
            )
    log.info("packed rows equal separate runs")


def distance_of(model: CausalModel, run: Forward, vocab_size: int, *, block_size: int) -> float:
    """How far another forward pass is from a model's own: the largest relative L2 distance of the logits of a
    prefill and a decode step. The model runs by its own pass afterwards."""
    steps = _probe_steps(_probes(vocab_size), block_size)
    expected = [model.forward(step) for step in steps]
    own = model.use(run)
    got = [model.forward(step) for step in steps]
    model.use(own)
    return max(_distance(one, other) for one, other in zip(got, expected, strict=True))


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-9))


def _probe_steps(probes: list[list[int]], block_size: int) -> tuple[Batch, Batch]:
    """Two steps over scattered blocks: the probes as one packed prefill, and a token more of each."""
    rows = RowTable(len(probes), 1 + max(map(len, probes)))
    prefill, decode = pb.StepPlan(), pb.StepPlan()
    next_block = 1
    for index, probe in enumerate(probes):
        row = Row.from_proto(
            pb.RowStart(row=index, prompt_length=len(probe), output=pb.RowStart.PROMPT_LOGPROBS)
        )
        rows.start(row)
        count = -(-(len(probe) + 1) // block_size)
        rows.extend(index, range(next_block, next_block + count))
        next_block += count
        prefill.chunks.add(row=index, start=0, tokens=probe)
        decode.decode_rows.append(index)
    first = build_batch(prefill, rows, block_size=block_size)
    for index, probe in enumerate(probes):
        rows[index].tokens.append(probe[0])
    return first, build_batch(decode, rows, block_size=block_size)
