"""Every kind of change on real architectures: a batch's rows equal models with merged weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from loraplex.kernels.ops import Entries
from loraplex.shard.adapters.changes import EmbeddingChange, LinearChange, ModuleChange, Rows
from loraplex.shard.adapters.floats import Float32
from loraplex.shard.adapters.layout import AdapterLayout, Target

from .dense import Changes, Shard, assert_row_equals, merged_logits, target_of

VOCAB = 300
PROMPTS = ([3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8], [250, 6, 1], [30, 31, 32, 33, 34], [11, 200], [99] * 6)

Draw = np.random.Generator


def normal(draw: Draw, *shape: int) -> Float32:
    return draw.standard_normal(shape, np.float32) * np.float32(0.5 / shape[-1] ** 0.5)


def near_one(draw: Draw, size: int) -> Float32:
    return (1 + draw.standard_normal(size) / 5).astype(np.float32)


def low_rank(draw: Draw, target: Target, rank: int) -> LinearChange:
    return LinearChange(
        a=normal(draw, rank, target.in_features), b=normal(draw, target.out_features, rank) * 4
    )


@pytest.fixture(scope="module")
def models(tiny_model: Callable[[str], Path]) -> Callable[[str], tuple[nn.Module, Shard]]:
    """By kind: the model as transformers has it and as a shard has it. A process serves one at a time."""
    built: dict[str, tuple[nn.Module, Shard]] = {}

    def get(kind: str) -> tuple[nn.Module, Shard]:
        if kind not in built:
            built.clear()
            model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), attn_implementation="eager").eval()
            built[kind] = (model, Shard.of(model))
        return built[kind]

    return get


def check(
    model: nn.Module,
    shard: Shard,
    adapters: list[Changes],
    row_entries: list[Entries],
    prompts: tuple[list[int], ...] = PROMPTS,
) -> None:
    """Load the adapters into slots 0, 1, … and compare every row with its own merged model."""
    shard.pool.clear()
    for slot, changes in enumerate(adapters):
        shard.load(slot, changes)
    prompts = prompts[: len(row_entries)]
    rows = zip(prompts, row_entries, shard.logits(prompts, row_entries), strict=True)
    for prompt, entries, got in rows:
        used = [(adapters[slot], weight) for slot, weight in entries]
        assert_row_equals(got, merged_logits(model, shard.special.layout, used, prompt))


def of_every_kind(layout: AdapterLayout, draw: Draw) -> list[Changes]:
    """One adapter for each way to change a linear, an embedding or a norm."""
    linears = [target for target in layout.linears if not target.is_head]
    head = next(target for target in layout.linears if target.is_head)
    embedding = layout.embeddings[0]
    ids = np.array([1, 5, 31, 250], np.int64)
    alone = [target for target in linears if target.out_offset == 0]
    return [
        {target.name: low_rank(draw, target, 3) for target in linears},
        {
            target.name: LinearChange(
                low_rank(draw, target, 2).a, low_rank(draw, target, 2).b, near_one(draw, target.out_features)
            )
            for target in alone
        },
        {target.name: LinearChange(shift=normal(draw, target.out_features)) for target in linears[1:4]},
        {
            target.name: LinearChange(input_scale=near_one(draw, target.in_features))
            for target in linears
            if [each.site for each in linears].count(target.site) == 1
        },
        {
            embedding.name: EmbeddingChange(
                a=normal(draw, VOCAB, 5),
                b=normal(draw, embedding.hidden_size, 5),
                scale=near_one(draw, embedding.hidden_size),
                rows=Rows(ids, normal(draw, 4, embedding.hidden_size)),
            )
        },
        {
            head.name: LinearChange(
                scale=near_one(draw, VOCAB), rows=Rows(ids, normal(draw, 4, head.in_features))
            ),
            embedding.name: EmbeddingChange(rows=Rows(None, normal(draw, VOCAB, embedding.hidden_size))),
        },
        {
            target.name: ModuleChange({name: near_one(draw, *shape) for name, shape in target.parameters})
            for target in layout.modules
        },
        {head.name: low_rank(draw, head, 4)},
    ]


@pytest.mark.parametrize(
    "kind", ["llama", "llama_tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt"]
)
def test_every_kind_of_change_beside_the_others(
    kind: str, models: Callable[[str], tuple[nn.Module, Shard]]
) -> None:
    model, shard = models(kind)
    adapters = of_every_kind(shard.special.layout, np.random.default_rng(0))
    first: list[Entries] = [((0, 1.0),), (), ((1, 1.0),), ((2, 1.0),), ((3, 1.0),)]
    second: list[Entries] = [((4, 1.0),), ((5, 1.0),), ((6, 1.0),), ((7, 0.5), (0, -1.5)), (), ((6, 1.0),)]
    check(model, shard, adapters, first)
    check(model, shard, adapters, second)


def resized(layout: AdapterLayout, draw: Draw, vocabulary: int, rank: int) -> Changes:
    """An adapter of a base whose vocabulary was resized, with LoRA on its head and its embedding."""
    head = next(target for target in layout.linears if target.is_head)
    embedding = layout.embeddings[0]
    return {
        head.name: LinearChange(
            a=normal(draw, rank, head.in_features),
            b=normal(draw, vocabulary, rank) * 4,
            scale=near_one(draw, vocabulary),
            rows=Rows(None, normal(draw, vocabulary, head.in_features)),
        ),
        embedding.name: EmbeddingChange(
            a=normal(draw, vocabulary, rank),
            b=normal(draw, embedding.hidden_size, rank),
            rows=Rows(None, normal(draw, vocabulary, embedding.hidden_size)),
        ),
    }


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_vocabularies_of_several_sizes_in_one_batch(
    kind: str, models: Callable[[str], tuple[nn.Module, Shard]]
) -> None:
    """Taller, shorter, with single tokens added; Gemma 2 caps its logits, but never minus infinity."""
    model, shard = models(kind)
    layout, draw = shard.special.layout, np.random.default_rng(1)
    head = next(target for target in layout.linears if target.is_head)
    ids = np.array([7, *range(VOCAB, VOCAB + 5)], np.int64)
    own = normal(draw, len(ids), head.in_features)
    added: Changes = {
        head.name: LinearChange(rows=Rows(ids, own)),
        layout.embeddings[0].name: EmbeddingChange(rows=Rows(ids, own)),
    }
    adapters = [resized(layout, draw, VOCAB + 9, 3), resized(layout, draw, VOCAB - 44, 2), added]
    prompts = ([3, VOCAB + 8, 5], [4, 1, 5], [2, VOCAB - 45, 9], [VOCAB + 4, 7, 1], [299, 298])
    check(model, shard, adapters, [((0, 1.0),), (), ((1, 1.0),), ((2, 1.0),), ()], prompts)
    check(model, shard, adapters, [((1, 1.0),)], ([1, 2, 3],))
    check(model, shard, adapters, [((2, 1.0),), ((2, 1.0),)], ([1, 2, VOCAB], [3, 7]))


def test_replaced_rows_with_biases_of_their_own_and_the_bases(
    models: Callable[[str], tuple[nn.Module, Shard]],
) -> None:
    model, shard = models("qwen2")
    layout, draw = shard.special.layout, np.random.default_rng(2)
    q, k, v = (target_of(layout, f"model.layers.1.self_attn.{name}_proj") for name in "qkv")
    assert isinstance(q, Target)
    assert isinstance(k, Target)
    assert isinstance(v, Target)
    ids = np.array([0, 3, 31], np.int64)
    adapters: list[Changes] = [
        {k.name: LinearChange(rows=Rows(ids, normal(draw, 3, k.in_features)))},
        {v.name: LinearChange(rows=Rows(ids, normal(draw, 3, v.in_features), near_one(draw, 3)))},
        {q.name: LinearChange(rows=Rows(None, normal(draw, q.out_features, q.in_features)))},
    ]
    check(
        model, shard, adapters, [((0, 1.0),), ((1, 1.0),), (), ((2, 1.0),), ((0, 1.0),), ((1, 1.0), (2, 1.0))]
    )


def test_dropping_an_adapter_leaves_the_base(models: Callable[[str], tuple[nn.Module, Shard]]) -> None:
    model, shard = models("gemma3")
    layout = shard.special.layout
    before = shard.logits(PROMPTS[:2], [(), ()])
    draw = np.random.default_rng(3)
    adapters = [*of_every_kind(layout, draw), resized(layout, draw, VOCAB + 2, 1)]
    check(model, shard, adapters, [((8, 1.0),), ()])
    shard.pool.clear()
    for one, other in zip(before, shard.logits(PROMPTS[:2], [(), ()]), strict=True):
        assert torch.equal(one, other)


@st.composite
def adapters_and_rows(draw: st.DrawFn) -> tuple[list[list[tuple[int, int, str]]], list[Entries]]:
    """([(index of a module, rank, kinds of change)] of each adapter, entry lists of rows)."""
    change = st.tuples(
        st.integers(0, 40), st.integers(1, 16), st.sampled_from(["", "scale", "shift", "both"])
    )
    adapters = draw(st.lists(st.lists(change, min_size=1, max_size=6), min_size=1, max_size=4))
    entry = st.tuples(st.integers(0, len(adapters) - 1), st.sampled_from([1.0, 0.5, -0.75]))
    rows = draw(st.lists(st.lists(entry, max_size=2).map(tuple), min_size=1, max_size=len(PROMPTS)))
    return adapters, rows


def drawn(layout: AdapterLayout, choices: list[tuple[int, int, str]], draw: Draw) -> Changes:
    changes: Changes = {}
    for index, rank, kind in choices:
        places = (*layout.linears, *layout.embeddings)
        target = places[index % len(places)]
        if isinstance(target, Target):
            vector = {"": (), "both": ("scale", "shift")}.get(kind, (kind,))
            plain = low_rank(draw, target, rank)
            scale = near_one(draw, target.out_features) if "scale" in vector else None
            shift = normal(draw, target.out_features) if "shift" in vector else None
            changes[target.name] = LinearChange(plain.a, plain.b, scale, shift)
        else:
            scale = near_one(draw, target.hidden_size) if kind == "scale" else None
            changes[target.name] = EmbeddingChange(
                normal(draw, VOCAB, rank), normal(draw, target.hidden_size, rank), scale
            )
    return changes


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=adapters_and_rows(), seed=st.integers(0, 2**31))
def test_any_adapters_in_any_batch(
    case: tuple[list[list[tuple[int, int, str]]], list[Entries]],
    seed: int,
    models: Callable[[str], tuple[nn.Module, Shard]],
) -> None:
    model, shard = models("llama")
    draw = np.random.default_rng(seed)
    adapters = [drawn(shard.special.layout, choices, draw) for choices in case[0]]
    check(model, shard, adapters, case[1])
