"""From changes to the packed form: everything once, at its true size, in the dtype that is served."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from loraplex.shard.adapters.assemble import assemble
from loraplex.shard.adapters.changes import (
    AnyTarget,
    Change,
    EmbeddingChange,
    ExpertLora,
    ExpertsChange,
    LinearChange,
    ModuleChange,
    ParsedAdapter,
    Placed,
    Rows,
    Traits,
)
from loraplex.shard.adapters.layout import (
    EmbeddingTarget,
    ExpertsParameter,
    ExpertsTarget,
    ModuleTarget,
    Target,
)
from loraplex.shard.adapters.packed import ALIGNMENT
from loraplex.shard.adapters.weights import (
    EmbeddingWeights,
    ExpertWeights,
    LinearWeights,
    ModuleWeights,
    PackedAdapter,
    SiteWeights,
)
from loraplex.shard.errors import AdapterRejected

Q = Target("q", 0, 8, 6, 0, has_bias=True)
K = Target("k", 0, 8, 4, 6)
EMBED = EmbeddingTarget("embed", 1, 20, 8)
NORM = ModuleTarget("norm", 2, (("weight", (8,)), ("bias", (8,))))
EXPERTS = ExpertsTarget("experts", 3, 2, (ExpertsParameter("down", 4, 6, False),))

random = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return random.standard_normal(shape, np.float32)


def pack(*placed: tuple[AnyTarget, Change], dtype: str = "float32") -> PackedAdapter:
    adapter = ParsedAdapter(
        tuple(Placed(target, 0, lambda change=change: change) for target, change in placed),  # type: ignore[misc]
        Traits(kind="test"),
    )
    file = io.BytesIO()
    index = assemble(adapter, file, dtype)
    assert index.nbytes == len(file.getvalue())
    return PackedAdapter(index, torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))


def linears(*placed: tuple[AnyTarget, Change], dtype: str = "float32") -> LinearWeights:
    weights = pack(*placed, dtype=dtype).site_weights()[0]
    assert isinstance(weights, LinearWeights)
    return weights


def equal(tensor: torch.Tensor | None, array: np.ndarray) -> bool:
    return tensor is not None and np.array_equal(tensor.numpy(), array)


def test_linears_of_a_site_lie_in_the_order_of_their_outputs() -> None:
    q, k = LinearChange(a=normal(3, 8), b=normal(6, 3)), LinearChange(a=normal(2, 8), b=normal(4, 2))
    weights = linears((K, k), (Q, q))
    assert weights.lora is not None
    assert equal(weights.lora.a, np.concatenate([q.a, k.a]))
    first, second = weights.lora.parts
    assert (first.rank_offset, first.out_offset, second.rank_offset, second.out_offset) == (0, 0, 3, 6)
    assert equal(first.b, q.b.T)
    assert equal(second.b, k.b.T)
    assert (first.scale, first.shift, weights.input_scale, weights.rows) == (None, None, None, ())


def test_vectors_without_a_and_b_have_rank_zero() -> None:
    scale, shift, plain = normal(6), normal(4), LinearChange(a=normal(2, 8), b=normal(4, 2))
    weights = linears(
        (Q, LinearChange(scale=scale)), (K, plain), (K, LinearChange(shift=shift)), dtype="bfloat16"
    )
    assert weights.lora is not None
    q, k = weights.lora.parts
    assert (tuple(q.b.shape), q.rank_offset, tuple(k.b.shape), k.rank_offset) == ((0, 6), 0, (2, 4), 0)
    assert equal(q.scale, scale), "vectors stay fp32"
    assert equal(k.shift, shift)
    assert weights.lora.a.dtype == k.b.dtype == torch.bfloat16


def test_replaced_rows_and_input_scales() -> None:
    ids, own, bias, scale = np.array([1, 5], np.int64), normal(2, 8), normal(2), normal(8)
    whole = normal(4, 8)
    weights = linears(
        (Q, LinearChange(input_scale=scale, rows=Rows(ids, own, bias))),
        (K, LinearChange(input_scale=scale.copy(), rows=Rows(None, whole))),
    )
    assert weights.lora is None
    assert equal(weights.input_scale, scale)
    first, second = weights.rows
    assert (first.out_offset, second.out_offset, second.ids, second.bias) == (0, 6, None, None)
    assert equal(first.ids, ids)
    assert equal(first.weight, own)
    assert equal(first.bias, bias)
    assert equal(second.weight, whole)


@pytest.mark.parametrize("other", [LinearChange(input_scale=normal(8)), LinearChange(shift=normal(4))])
def test_one_input_cannot_be_scaled_in_two_ways(other: LinearChange) -> None:
    with pytest.raises(AdapterRejected, match="q and k read one input"):
        pack((Q, LinearChange(input_scale=normal(8))), (K, other))


def test_the_embedding_with_and_without_low_rank() -> None:
    a, b, scale, rows = (
        normal(20, 3),
        normal(8, 3),
        normal(8),
        Rows(np.array([19, 21], np.int64), normal(2, 8)),
    )
    weights = pack((EMBED, EmbeddingChange(a=a, b=b)), (EMBED, EmbeddingChange(scale=scale, rows=rows)))
    embedding = weights.site_weights()[1]
    assert isinstance(embedding, EmbeddingWeights)
    assert embedding.lora is not None
    assert embedding.rows is not None
    assert equal(embedding.lora.a, a)
    assert equal(embedding.lora.b, b.T)
    assert equal(embedding.lora.scale, scale)
    assert equal(embedding.rows.weight, rows.weight)
    alone = pack((EMBED, EmbeddingChange(scale=scale))).site_weights()[1]
    assert isinstance(alone, EmbeddingWeights)
    assert alone.lora is not None
    assert (tuple(alone.lora.a.shape), tuple(alone.lora.b.shape)) == ((20, 0), (0, 8))
    assert equal(alone.lora.scale, scale)


def test_a_modules_parameters_come_together() -> None:
    weight, bias = normal(8), normal(8)
    adapter = pack((NORM, ModuleChange({"weight": weight})), (NORM, ModuleChange({"bias": bias})))
    module = adapter.site_weights()[2]
    assert isinstance(module, ModuleWeights)
    assert equal(module.parameters["weight"], weight)
    assert equal(module.parameters["bias"], bias)


def test_experts_have_b_transposed() -> None:
    a, b = normal(2, 3, 4), normal(2, 6, 3)
    experts = pack((EXPERTS, ExpertsChange({"down": ExpertLora(a, b)}))).site_weights()[3]
    assert isinstance(experts, ExpertWeights)
    assert equal(experts.parameters["down"][0], a)
    assert equal(experts.parameters["down"][1], b.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("target", "change", "field"),
    [
        (Q, LinearChange(shift=normal(6)), "shift"),
        (NORM, ModuleChange({"bias": normal(8)}), "bias"),
        (EXPERTS, ExpertsChange({"down": ExpertLora(normal(2, 1, 4), normal(2, 6, 1))}), "down"),
    ],
)
def test_nothing_is_changed_twice(target: AnyTarget, change: Change, field: str) -> None:
    with pytest.raises(AdapterRejected, match=f"{target.name}: two parts of the adapter change its {field}"):
        pack((target, change), (target, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (LinearChange(a=np.full((1, 8), 1e6, np.float32), b=normal(6, 1)), "do not fit the range of float16"),
        (LinearChange(scale=np.full(6, np.inf, np.float32)), "scale or shift is not finite"),
    ],
)
def test_values_must_fit(change: LinearChange, message: str) -> None:
    with pytest.raises(AdapterRejected, match=message):
        pack((Q, change), dtype="float16")


def tensors_of(weights: SiteWeights) -> Sequence[torch.Tensor]:
    match weights:
        case LinearWeights(lora, input_scale, rows):
            found = [input_scale] if lora is None else [input_scale, lora.a]
            found += (
                [each for part in lora.parts for each in (part.b, part.scale, part.shift)] if lora else []
            )
            found += [each for own in rows for each in (own.ids, own.weight, own.bias)]
        case EmbeddingWeights(lora, own):
            found = [lora.a, lora.b, lora.scale] if lora is not None else []
            found += [own.ids, own.weight] if own is not None else []
        case ModuleWeights(parameters):
            found = list(parameters.values())
        case ExpertWeights(pairs):
            found = [each for pair in pairs.values() for each in pair]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_takes_the_bytes_of_its_tensors_and_less_than_a_line_more_for_each(dtype: str) -> None:
    adapter = pack(
        (Q, LinearChange(normal(3, 8), normal(6, 3), normal(6), normal(6))),
        (K, LinearChange(rows=Rows(np.array([2], np.int64), normal(1, 8)))),
        (EMBED, EmbeddingChange(normal(20, 5), normal(8, 5), normal(8))),
        (NORM, ModuleChange({"weight": normal(8)})),
        (EXPERTS, ExpertsChange({"down": ExpertLora(normal(2, 3, 4), normal(2, 6, 3))})),
        dtype=dtype,
    )
    tensors = [each for weights in adapter.site_weights().values() for each in tensors_of(weights)]
    held = sum(tensor.nbytes for tensor in tensors)
    assert held <= adapter.nbytes == adapter.buffer.nbytes < held + ALIGNMENT * len(tensors)
    start = adapter.buffer.data_ptr()
    offsets = [tensor.data_ptr() - start for tensor in tensors]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert len(set(offsets)) == len(tensors)
