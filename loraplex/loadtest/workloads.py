"""From a spec to the requests of one run: when, which adapter, how long. Pure and seeded.

The same spec gives the same requests, whichever server they go to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import popularity
from .specs import Closed, Punica, SLora, Spec

FIRST_TOKEN_ID = 10
"""Smallest id in a prompt; the ones below are special in most vocabularies."""
_BASE_STREAM, _PROMPT_STREAM = 1, 2
"""Keep the draws of the base's share and of prompts apart from those of the workload."""
_PUNICA_SIGMA, _PUNICA_SHIFT, _PUNICA_SCALE = 0.8, -1.0, 18.0
_PUNICA_LEAST_OUTPUT = 2


@dataclass(frozen=True, slots=True)
class Request:
    """One completion. `at` is when to send it, in seconds from the start; `adapter` None is the base."""

    at: float
    adapter: int | None
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What one run sends: each request at its own time, or, with `concurrency`, so many at once in order."""

    requests: tuple[Request, ...]
    concurrency: int | None


def trace(spec: Spec, adapters: int, base_share: float = 0.0) -> Trace:
    """The requests of `spec` over `adapters` adapters; 0 of them: all for the base.

    With `base_share`, each request goes to the base with that probability, independently of everything else.
    """
    match spec:
        case Closed():
            made = Trace(closed(spec, adapters), spec.concurrency)
        case SLora():
            made = Trace(slora(spec, adapters), None)
        case Punica():
            made = Trace(punica(spec, adapters), spec.concurrency)
    to_base = np.random.default_rng([spec.seed, _BASE_STREAM]).random(len(made.requests)) < base_share
    requests = (
        replace(request, adapter=None) if base or not adapters else request
        for request, base in zip(made.requests, to_base, strict=True)
    )
    return replace(made, requests=tuple(requests))


def closed(spec: Closed, adapters: int) -> tuple[Request, ...]:
    """Requests of one length, their adapters by `spec.spread`."""
    random = np.random.default_rng(spec.seed)
    indices = popularity.spread(spec.spread, spec.requests, max(adapters, 1), random)
    return tuple(Request(0.0, int(index), spec.prompt_tokens, spec.output_tokens) for index in indices)


def slora(spec: SLora, adapters: int) -> tuple[Request, ...]:
    """S-LoRA's synthetic trace: int(R·T) requests at the rate R over T seconds, with

    - the adapter floor(n · numpy.power(alpha)), see `popularity.power`;
    - input and output lengths uniform over [8, 512), unless the spec has other ranges;
    - gaps Gamma(shape 1/cv², scale cv²/R): mean 1/R, coefficient of variation cv.

    The legacy generator and the order of the draws are those of the source, so that a seed gives its very
    trace. Source: arXiv 2311.03285, and benchmarks/trace.py in its repository.
    """
    random = np.random.RandomState(spec.seed)
    count = int(spec.rate * spec.duration)
    indices = popularity.power(random.power(spec.alpha, count), max(adapters, 1))
    prompts = random.randint(spec.input_range.low, spec.input_range.high, count)
    outputs = random.randint(spec.output_range.low, spec.output_range.high, count)
    times = random.gamma(1 / spec.cv**2, spec.cv**2 / spec.rate, count).cumsum()
    rows = zip(times.tolist(), indices.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return tuple(Request(*row) for row in rows)


def punica(spec: Punica, adapters: int) -> tuple[Request, ...]:
    """Punica's requests: prompts lognormal (sigma 0.8, shift -1, scale 18) of at most L-2 tokens; prompt and
    output together uniform over [0, L), but at least the prompt and 2 tokens; L is `max_length`.

    A smaller L than the paper's 2048 cuts the same prompts and draws totals from the shorter range; nothing
    is stretched. Unlike the source, a prompt has at least one token: servers refuse empty ones. The draws are
    the source's otherwise. Source: arXiv 2310.18547, and benchmarks/bench_textgen.py in its repository.
    """
    random = np.random.default_rng(spec.seed)
    normal = random.standard_normal(spec.requests)
    drawn = np.exp(_PUNICA_SIGMA * normal) * _PUNICA_SCALE + _PUNICA_SHIFT
    prompts = np.clip(drawn, 1, spec.max_length - _PUNICA_LEAST_OUTPUT).astype(np.int64)
    totals = random.integers(0, spec.max_length, spec.requests)
    outputs = np.maximum(totals - prompts, _PUNICA_LEAST_OUTPUT)
    indices = popularity.punica_spread(
        spec.mix, spec.requests, max(adapters, 1), np.random.default_rng(spec.seed)
    )
    rows = zip(indices.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return tuple(Request(0.0, *row) for row in rows)


def prompt(seed: int, run: int, index: int, length: int, vocabulary: int) -> list[int]:
    """Random token ids in [10, vocabulary) for request `index` of a run.

    Every run has prompts of its own, so that a server's prefix cache never finds one of an earlier run.
    """
    random = np.random.default_rng([seed, _PROMPT_STREAM, run, index])
    ids: list[int] = random.integers(FIRST_TOKEN_ID, vocabulary, length).tolist()
    return ids
