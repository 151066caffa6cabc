"""The benchmark's workloads against the formulas of their sources."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from loraplex.loadtest import popularity
from loraplex.loadtest.specs import Closed, Lengths, Popularity, Punica, SLora, Spec
from loraplex.loadtest.workloads import Request, prompt, trace

LONG = SLora(rate=100, duration=200)


def shares(requests: tuple[Request, ...]) -> Counter[int | None]:
    return Counter(request.adapter for request in requests)


@pytest.mark.parametrize(("alpha", "top_share"), [(0.1, 0.589), (0.3, 0.204), (0.6, 0.042), (1.0, 0.005)])
def test_slora_the_top_k_of_n_adapters_get_k_over_n_to_the_alpha(alpha: float, top_share: float) -> None:
    assert (1 / 200) ** alpha == pytest.approx(top_share, abs=5e-4)
    counts = shares(trace(replace(LONG, alpha=alpha), 200).requests)
    for k in (1, 10, 100):
        expected = (k / 200) ** alpha
        found = sum(counts[adapter] for adapter in range(k)) / 20_000
        assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000))


def test_slora_600_uniform_requests_touch_about_515_of_2000_adapters() -> None:
    expected = 2000 * (1 - (1 - 1 / 2000) ** 600)
    touched = [
        len(shares(trace(SLora(rate=10, duration=60, seed=seed), 2000).requests)) for seed in range(20)
    ]
    assert np.mean(touched) == pytest.approx(expected, abs=6)
    assert len(shares(trace(SLora(rate=10, duration=60), 2000).requests)) == pytest.approx(515, abs=10)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_slora_gaps_have_the_rates_mean_and_the_wanted_variation(cv: float) -> None:
    times = np.array([request.at for request in trace(replace(LONG, cv=cv), 8).requests])
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 100, rel=4 * cv / math.sqrt(len(gaps)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.15)


def test_slora_lengths_are_uniform_over_8_up_to_511() -> None:
    made = trace(LONG, 1)
    assert made.concurrency is None
    for lengths in (
        [request.prompt_tokens for request in made.requests],
        [request.output_tokens for request in made.requests],
    ):
        assert (min(lengths), max(lengths)) == (8, 511)
        assert np.mean(lengths) == pytest.approx((8 + 511) / 2, rel=0.02)
    narrow = trace(replace(LONG, input_range=Lengths(3, 5)), 1).requests
    assert {request.prompt_tokens for request in narrow} == {3, 4}


def test_slora_a_seed_gives_the_sources_trace() -> None:
    """The source draws adapters, inputs, outputs and gaps in this order from NumPy's legacy generator."""
    made = trace(SLora(rate=3, duration=5.5, alpha=0.3, cv=2), 10).requests
    random = np.random.RandomState(42)
    assert [request.adapter for request in made] == (random.power(0.3, 16) * 10).astype(int).tolist()
    assert [request.prompt_tokens for request in made] == random.randint(8, 512, 16).tolist()
    assert [request.output_tokens for request in made] == random.randint(8, 512, 16).tolist()
    assert [request.at for request in made] == pytest.approx(np.cumsum(random.gamma(0.25, 4 / 3, 16)))


@pytest.mark.parametrize(
    ("mix", "groups"),
    [
        (Popularity("identical"), [20]),
        (Popularity("distinct"), [1] * 20),
        (Popularity("uniform"), [4, 4, 4, 4, 4]),
        (Popularity("zipf", 1.5), [7, 5, 3, 2, 1, 1, 1]),
    ],
)
def test_punica_groups(mix: Popularity, groups: list[int]) -> None:
    assert popularity.punica_groups(mix, 20) == groups
    counts = shares(trace(Punica(requests=20, mix=mix), 100).requests)
    assert sorted(counts.values(), reverse=True) == groups


def test_punica_groups_cover_every_request_whatever_their_number() -> None:
    for requests in range(1, 200):
        for mix in (Popularity("uniform"), Popularity("zipf", 1.5), Popularity("zipf", 1.01)):
            groups = popularity.punica_groups(mix, requests)
            assert sum(groups) == requests
            assert min(groups) >= 1
        assert len(popularity.punica_groups(Popularity("uniform"), requests)) == math.ceil(requests**0.5)


def test_punica_more_groups_than_adapters_wrap_around() -> None:
    counts = shares(trace(Punica(requests=20, mix=Popularity("distinct")), 8).requests)
    assert sorted(counts.values()) == [2] * 4 + [3] * 4


def test_punica_lengths() -> None:
    made = trace(Punica(requests=20_000), 1).requests
    prompts = np.array([request.prompt_tokens for request in made])
    outputs = np.array([request.output_tokens for request in made])
    assert np.median(prompts) == pytest.approx(17, abs=1)
    assert prompts.mean() == pytest.approx(18 * math.exp(0.8**2 / 2) - 1.5, rel=0.03)
    assert (prompts + outputs).mean() == pytest.approx(1023.5, rel=0.02)
    assert (prompts + outputs).max() == 2047
    assert outputs.min() == 2


def test_punica_a_smaller_length_cuts() -> None:
    long = trace(Punica(requests=2000), 1).requests
    short = trace(Punica(requests=2000, max_length=32), 1).requests
    assert max(request.prompt_tokens + request.output_tokens for request in short) == 32
    assert [request.prompt_tokens for request in short] == [min(r.prompt_tokens, 30) for r in long]


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        (Popularity("uniform"), [0.25] * 4),
        (Popularity("round-robin"), [0.25] * 4),
        (Popularity("zipf", 1.0), [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        (Popularity("zipf", 2.0), [144 / 205, 36 / 205, 16 / 205, 9 / 205]),
        (Popularity("power", 0.5), [0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5]),
    ],
)
def test_a_closed_loop_spreads_adapters(spread: Popularity, expected: list[float]) -> None:
    made = trace(Closed(requests=20_000, spread=spread, concurrency=3, prompt_tokens=5, output_tokens=6), 4)
    counts = shares(made.requests)
    assert [counts[adapter] / 20_000 for adapter in range(4)] == pytest.approx(expected, abs=0.015)
    assert made.concurrency == 3
    assert {(r.at, r.prompt_tokens, r.output_tokens) for r in made.requests} == {(0.0, 5, 6)}


def test_round_robin_goes_round() -> None:
    made = trace(Closed(requests=5, spread=Popularity("round-robin")), 2)
    assert [request.adapter for request in made.requests] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("spec", [Closed(requests=2000), SLora(rate=20, duration=100), Punica(requests=2000)])
def test_the_bases_share_leaves_the_rest_as_it_was(spec: Spec) -> None:
    whole, mixed = trace(spec, 8).requests, trace(spec, 8, base_share=0.25).requests
    assert None not in shares(whole)
    assert shares(mixed)[None] / 2000 == pytest.approx(0.25, abs=0.05)
    assert all(b == a or b == replace(a, adapter=None) for a, b in zip(whole, mixed, strict=True))
    assert set(shares(trace(spec, 8, base_share=1.0).requests)) == {None}
    assert set(shares(trace(spec, 0).requests)) == {None}


@pytest.mark.parametrize("spec", [Closed(), SLora(), Punica()])
def test_a_seed_decides_everything(spec: Spec) -> None:
    assert trace(spec, 8, 0.5) == trace(spec, 8, 0.5)
    assert trace(spec, 8, 0.5) != trace(replace(spec, seed=1), 8, 0.5)


def test_prompts_are_ids_of_the_vocabulary_and_differ() -> None:
    ids = prompt(1, 1, 0, 5000, 300)
    assert (min(ids), max(ids), len(ids)) == (10, 299, 5000)
    assert ids == prompt(1, 1, 0, 5000, 300)
    others = [prompt(*key, 64, 300) for key in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1))]
    assert len({tuple(other) for other in others}) == 4
