"""The sampler against transformers' logits processors, plain NumPy and its own promises."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraplex.proto import shard_pb2 as pb
from loraplex.shard.errors import BadPlan
from loraplex.shard.sampling import RowSampling, Sampler, SampleRow, uniform

VOCABULARY = 300
DRAWS = 4000


@pytest.fixture
def logits() -> torch.Tensor:
    """[VOCABULARY], all different, a handful of them likely."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


def row(index: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = (), **sampling: Any) -> SampleRow:
    return SampleRow(RowSampling(**sampling), index, prompt, output)


def tokens(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int | None]:
    return [sampled.token for sampled in Sampler().sample(logits, rows)]


def draw_many(logits: torch.Tensor, count: int = DRAWS, **sampling: Any) -> Counter[int | None]:
    rows = [row(index, seed=5, **sampling) for index in range(count)]
    return Counter(tokens(logits.expand(count, -1), rows))


def reference_probs(logits: torch.Tensor, **sampling: Any) -> torch.Tensor:
    """What transformers' generate() would draw from."""
    chain: list[LogitsProcessor] = []
    if sampling.get("temperature", 1.0) != 1:
        chain.append(TemperatureLogitsWarper(sampling["temperature"]))
    if sampling.get("top_k"):
        chain.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling.get("top_p", 1.0) < 1:
        chain.append(TopPLogitsWarper(sampling["top_p"]))
    if sampling.get("min_p"):
        chain.append(MinPLogitsWarper(sampling["min_p"]))
    scores = logits.unsqueeze(0).clone()
    for processor in chain:
        scores = processor(torch.zeros(1, 1, dtype=torch.int64), scores)
    return scores.softmax(-1)[0]


def chi_square_per_degree(counts: Counter[int | None], probs: torch.Tensor) -> float:
    """Cells that expect fewer than five draws are pooled. About 1 for a right sampler."""
    expected = probs.double().numpy() * counts.total()
    observed = np.array([counts[token] for token in range(len(expected))])
    common = expected >= 5
    cells = [*((observed - expected)[common] ** 2 / expected[common])]
    if rest := expected[~common].sum():
        cells.append((observed[~common].sum() - rest) ** 2 / rest)
    return sum(cells) / max(len(cells) - 1, 1)


MIXES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 3.0, "top_k": 120},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 4.0, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 5.0, "top_k": 200, "top_p": 0.7},
    {"temperature": 5.0, "top_p": 0.99, "min_p": 0.2},
]


@pytest.mark.parametrize("sampling", MIXES, ids=str)
def test_draws_follow_the_distribution_of_transformers(
    sampling: dict[str, Any], logits: torch.Tensor
) -> None:
    probs = reference_probs(logits, **sampling)
    counts = draw_many(logits, **sampling)
    assert all(probs[token] > 0 for token in counts if token is not None)
    assert chi_square_per_degree(counts, probs) < 1.6


def test_the_chi_square_notices_a_slightly_wrong_temperature(logits: torch.Tensor) -> None:
    counts = draw_many(logits, temperature=1.1)
    assert chi_square_per_degree(counts, reference_probs(logits, temperature=1.0)) > 1.6


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocabulary=st.sampled_from([5, 64, 65, 200]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 3, 64, 70]),
    top_p=st.sampled_from([0.05, 0.5, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_every_likely_token_of_the_kept_set_appears_and_no_other(
    seed: int, vocabulary: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    mix = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    probs = reference_probs(logits, **mix)
    drawn = set(draw_many(logits, 600, **mix))
    assert drawn <= set(probs.nonzero().flatten().tolist())
    assert drawn >= set((probs > 0.05).nonzero().flatten().tolist())


def test_uniform_is_flat_and_a_function_of_seed_and_index() -> None:
    values = np.array([[uniform(seed, index) for index in range(200)] for seed in range(200)])
    assert values.min() >= 0
    assert values.max() < 1
    histogram, _ = np.histogram(values, bins=50, range=(0, 1))
    assert ((histogram - 800) ** 2 / 800).sum() < 100
    assert len(np.unique(values)) == values.size
    assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.2
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.2
    assert uniform(3, 4) == uniform(3, 4)
    assert uniform(2**64 - 1, 0) != uniform(2**64 - 2, 0)


def test_a_row_draws_the_same_in_any_company_and_position(logits: torch.Tensor) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        *MIXES,
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {3: 2.0}},
        {"frequency_penalty": 0.7, "logprobs": 2},
    ]
    rows = [row(i, [1, 2, 3], [4, 4, i], seed=i % 3, **kinds[i % len(kinds)]) for i in range(60)]
    many = torch.randn(60, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3
    together = Sampler().sample(many, rows)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = Sampler().sample(many[order], [rows[i] for i in order])
    for place, i in enumerate(order):
        assert shuffled[place].token == together[i].token
        assert Sampler().sample(many[i : i + 1], [rows[i]])[0].token == together[i].token


def test_seed_and_index_both_matter(logits: torch.Tensor) -> None:
    flat = torch.zeros(64, VOCABULARY)
    by_index = tokens(flat, [row(i, temperature=1.0, seed=1) for i in range(64)])
    by_seed = tokens(flat, [row(0, temperature=1.0, seed=i) for i in range(64)])
    assert len(set(by_index)) > 40
    assert len(set(by_seed)) > 40


@pytest.mark.parametrize("vocabulary", [5, 64, 300, 8000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie(vocabulary: int, dtype: torch.dtype) -> None:
    many = torch.randn(20, vocabulary).to(dtype)
    many[3, [4, 2]] = 9.0
    many[4] = 0.0
    many[5] = -torch.inf
    many[5, 1] = -7.0
    want = np.argmax(many.float().numpy(), axis=1).tolist()
    assert want[3:6] == [2, 0, 1]
    assert tokens(many, [row() for _ in range(20)]) == want


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-6}],
    ids=str,
)
def test_the_narrowest_settings_are_greedy(sampling: dict[str, Any]) -> None:
    many = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(6))
    rows = [row(i, **{"temperature": 1.0, **sampling}) for i in range(50)]
    assert tokens(many, rows) == many.argmax(-1).tolist()


def test_top_k_and_top_p_break_ties_by_the_lowest_id() -> None:
    tied = torch.zeros(VOCABULARY)
    assert set(draw_many(tied, 200, temperature=1.0, top_k=3)) == {0, 1, 2}
    assert set(draw_many(tied, 400, temperature=1.0, top_p=0.02)) == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("temperature", [1e-60, 1e-42, 1e-6, 1e6, 3e38])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_temperatures_draw_sane_tokens(
    temperature: float, scale: float, logits: torch.Tensor
) -> None:
    counts = draw_many(logits * scale, 600, temperature=temperature)
    if temperature < 1:
        assert set(counts) == {int(logits.argmax())}
    elif temperature / scale > 100:
        assert len(counts) > 200
    assert None not in counts


def test_an_impossible_token_is_never_drawn() -> None:
    half = torch.zeros(VOCABULARY)
    half[::2] = -torch.inf
    for sampling in ({}, {"top_p": 0.99}, {"top_k": 299}, {"min_p": 0.5}):
        counts = draw_many(half, 1000, temperature=2.0, **sampling)
        assert all(token is not None and token % 2 for token in counts)


def test_repetition_penalty_is_that_of_transformers(logits: torch.Tensor) -> None:
    prompt, output = [1, 2, int(logits.argmax())], [7, 7, int(logits.argmin())]
    ids = torch.tensor([prompt + output])
    want = RepetitionPenaltyLogitsProcessor(1.8)(ids, logits[None].clone())
    at = row(3, prompt, output, repetition_penalty=1.8, temperature=1.0)
    probs = want.softmax(-1)[0]
    rows = [SampleRow(at.sampling, index, prompt, output) for index in range(DRAWS)]
    counts = Counter(tokens(logits.expand(DRAWS, -1), rows))
    assert chi_square_per_degree(counts, probs) < 1.6
    greedy = row(3, prompt, output, repetition_penalty=1.8)
    assert tokens(logits[None], [greedy]) == [int(want.argmax())]


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    logits = torch.full((1, VOCABULARY), -9.0)
    logits[0, :3] = torch.tensor([-1.0, -1.5, -2.5])
    assert tokens(logits, [row(repetition_penalty=2.0)]) == [0]
    assert tokens(logits, [row(0, [0], repetition_penalty=2.0)]) == [1]
    assert tokens(logits, [row(1, [0], [1], repetition_penalty=2.0)]) == [0]


def test_presence_and_frequency_count_output_only() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [10, 11, 12]] = torch.tensor([3.0, 2.0, 1.5])
    prompt = [10] * 9

    def greedy(output: Sequence[int], **sampling: float) -> int | None:
        return tokens(logits, [row(len(output), prompt, output, **sampling)])[0]

    assert greedy([], presence_penalty=2.0, frequency_penalty=2.0) == 10
    assert greedy([10, 10], presence_penalty=0.9) == 10
    assert greedy([10, 10], presence_penalty=1.1) == 11
    assert greedy([10], frequency_penalty=0.9) == 10
    assert greedy([10, 10], frequency_penalty=0.9) == 11
    assert greedy([10, 10, 11], frequency_penalty=0.9) == 12
    assert greedy([50], presence_penalty=-4.0) == 50


def test_bias_applies_after_penalties_and_ids_beyond_the_vocabulary_are_nothing() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 5] = 1.0
    rows = [
        row(logit_bias={9: 1.5, VOCABULARY: 100.0}),
        row(0, [9], repetition_penalty=4.0, logit_bias={9: 1.5}),
    ]
    assert tokens(logits, rows) == [9, 9]
    assert tokens(logits[:1], [row(logit_bias={5: -100.0})]) == [0]
    assert logits[:, 5].tolist() == [1.0, 1.0]


def test_stop_ids_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [4, 8]] = torch.tensor([9.0, 5.0])
    stops = {"stop_ids": (4, VOCABULARY + 3), "min_tokens": 2}
    assert [tokens(logits, [row(index, **stops)])[0] for index in range(4)] == [8, 8, 4, 4]
    biased = row(0, logit_bias={4: 100.0}, temperature=1.0, top_k=1, **stops)
    assert tokens(logits, [biased]) == [8]


@pytest.mark.parametrize(("u", "token"), [(0.0, 130), (1 - 2.0**-53, 190)])
@pytest.mark.parametrize("sampling", [{}, {"min_p": 1e-6}, {"top_p": 0.999999}], ids=str)
def test_the_ends_of_the_unit_interval_hit_possible_tokens(
    u: float, token: int, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.shard.sampling.uniform", lambda seed, index: u)
    middle = torch.full((1, VOCABULARY), -torch.inf)
    middle[0, 130:191] = 0.0
    assert tokens(middle, [row(temperature=1.0, **sampling)]) == [token]


@pytest.mark.parametrize("fault", ["nan", "inf", "all -inf"])
def test_a_row_that_is_not_finite_has_no_token_and_disturbs_nobody(fault: str) -> None:
    many = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(8))
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": 3},
        {"temperature": 1.0, "top_p": 0.9999, "presence_penalty": 0.5},
        {"logprobs": 0, "stop_ids": (7,), "min_tokens": 9},
    ]
    clean = Sampler().sample(many, [row(1, seed=i, **kind) for i, kind in enumerate(kinds)])
    for bad in range(5):
        broken = many.clone()
        if fault == "all -inf":
            broken[bad] = -torch.inf
        else:
            broken[bad, 7] = float(fault)
        got = Sampler().sample(broken, [row(1, seed=i, **kind) for i, kind in enumerate(kinds)])
        assert got[bad].finite is False
        assert got[bad].token is None
        assert got[bad].logprobs is None
        assert [got[i] for i in range(5) if i != bad] == [clean[i] for i in range(5) if i != bad]


def test_a_mask_that_leaves_nothing_is_not_finite() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, 3] = 1.0
    assert not Sampler().sample(logits, [row(0, stop_ids=(3,), min_tokens=1)])[0].finite


def test_logprobs_are_of_the_raw_logits() -> None:
    many = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(9)) * 2
    want = many.double().log_softmax(-1)
    rows = [
        row(temperature=3.0, top_k=200, logprobs=4, seed=1),
        row(logit_bias={17: 100.0}, logprobs=0),
        row(logprobs=2),
    ]
    results = Sampler().sample(many, rows)
    assert results[1].token == 17
    for i, (result, count) in enumerate(zip(results, (4, 0, 2), strict=True)):
        assert result.logprobs is not None
        assert result.token is not None
        assert result.logprobs.logprob == pytest.approx(want[i, result.token].item(), abs=1e-5)
        assert result.logprobs.rank == 1 + int((want[i] > want[i, result.token]).sum())
        best = want[i].topk(count)
        assert list(result.logprobs.top_ids) == best.indices.tolist()
        assert result.logprobs.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-5)
    assert results[2].logprobs is not None
    assert results[2].logprobs.rank == 1


def test_logprobs_rank_ties_by_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 2.0, -0.0, 2.0, 0.0, -1.0]])
    sampled = Sampler().sample(logits, [row(logit_bias={4: 50.0}, logprobs=6)])[0]
    assert sampled.token == 4
    assert sampled.logprobs is not None
    assert sampled.logprobs.rank == 5
    assert sampled.logprobs.top_ids == (1, 3, 0, 2, 4, 5)


def test_more_logprobs_than_tokens_gives_all_tokens() -> None:
    sampled = Sampler().sample(torch.randn(1, 6), [row(logprobs=20)])[0]
    assert sampled.logprobs is not None
    assert sorted(sampled.logprobs.top_ids) == [0, 1, 2, 3, 4, 5]


def test_prompt_logprobs_score_the_given_tokens() -> None:
    many = (torch.randn(150, VOCABULARY, generator=torch.Generator().manual_seed(10)) * 2).to(torch.bfloat16)
    targets = [(i * 37) % VOCABULARY for i in range(150)]
    results = Sampler().prompt_logprobs(many, targets, 3)
    want = many.double().log_softmax(-1)
    assert len(results) == 150
    for i, (result, target) in enumerate(zip(results, targets, strict=True)):
        assert result.logprob == pytest.approx(want[i, target].item(), abs=1e-5)
        order = sorted(range(VOCABULARY), key=lambda token, i=i: (-many[i, token].item(), token))
        assert result.rank == 1 + order.index(target)
        assert list(result.top_ids) == order[:3]
        assert result.top_logprobs == pytest.approx(want[i, order[:3]].tolist(), abs=1e-5)
    assert Sampler().prompt_logprobs(many[:0], [], 3) == []
    assert Sampler().prompt_logprobs(many[:1], [5], 0)[0].top_ids == ()


def test_a_prompt_position_that_is_not_finite_is_nan_and_alone() -> None:
    many = torch.randn(3, VOCABULARY)
    many[1, 0] = torch.nan
    results = Sampler().prompt_logprobs(many, [1, 2, 3], 2)
    assert [math.isnan(result.logprob) for result in results] == [False, True, False]


def test_from_proto_carries_every_field() -> None:
    message = pb.SamplingParams(
        temperature=0.5,
        top_k=4,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.125,
        logit_bias={3: -1.0},
        stop_ids=[2, 9],
        min_tokens=6,
        logprobs=0,
    )
    got = RowSampling.from_proto(message, 2**63)
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        kind = {"stop_ids": tuple, "logit_bias": dict}.get(field.name, type(value))
        assert getattr(got, field.name) == kind(value), field.name
    assert got.seed == 2**63
    message.ClearField("logprobs")
    assert RowSampling.from_proto(message, 0).logprobs is None


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.nan},
        {"logit_bias": {1: math.inf}},
    ],
    ids=str,
)
def test_a_value_without_a_distribution_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(BadPlan, match=next(iter(field))):
        RowSampling(**field)


def test_logits_and_rows_must_match_and_none_is_fine() -> None:
    assert Sampler().sample(torch.empty(0, VOCABULARY), []) == []
    with pytest.raises(ValueError, match="2 rows of logits for 1 rows"):
        Sampler().sample(torch.zeros(2, VOCABULARY), [row()])


class Counted(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_greedy_rows_cost_a_few_operators_however_many_there_are() -> None:
    counts = []
    for number in (1, 64):
        logits, rows = torch.randn(number, VOCABULARY), [row(3) for _ in range(number)]
        with Counted() as counted:
            Sampler().sample(logits, rows)
        counts.append(counted.count)
    assert counts[0] == counts[1] < 20
