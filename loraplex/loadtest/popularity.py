"""Which adapter each request names. Pure functions of a generator; adapters are indices from 0."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .specs import Popularity

Indices = NDArray[np.int64]


def power(draws: NDArray[np.float64], adapters: int) -> Indices:
    """Indices from draws of `numpy.power(alpha)`, density alpha·x^(alpha-1) on [0, 1): floor(adapters · x).

    So P(index < k) = (k / adapters)^alpha: alpha 1 is uniform, and the smaller alpha, the more go to the
    first few. Source: S-LoRA (arXiv 2311.03285), its repository's benchmarks/trace.py.
    """
    return np.minimum((draws * adapters).astype(np.int64), adapters - 1)


def zipf(adapters: int, exponent: float) -> NDArray[np.float64]:
    """Zipf's law: the k-th of `adapters` has the share k^-exponent / Σ_j j^-exponent, k and j from 1."""
    weights: NDArray[np.float64] = np.arange(1, adapters + 1, dtype=np.float64) ** -exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def spread(popularity: Popularity, requests: int, adapters: int, random: np.random.Generator) -> Indices:
    """One adapter for each of `requests` requests, by `uniform`, `round-robin`, `zipf` or `power`."""
    match popularity.kind:
        case "uniform":
            return random.integers(0, adapters, requests)
        case "round-robin":
            return np.arange(requests) % adapters
        case "zipf":
            return random.choice(adapters, requests, p=zipf(adapters, popularity.parameter))
        case "power":
            return power(random.power(popularity.parameter, requests), adapters)
    raise ValueError(f"no spread is called {popularity.kind}")


def punica_groups(mix: Popularity, requests: int) -> list[int]:
    """How many of `requests` requests share each adapter, in one of Punica's four mixes, largest first.

    - identical: all of them one adapter; distinct: each its own;
    - uniform: ceil(sqrt(requests)) adapters with equally many, as near as whole numbers allow;
    - zipf:g (the paper's g is 1.5; not Zipf's law): floor(1), floor(g), floor(g²), … as long as they leave a
      request over; what is left is one more group.

    Source: Punica (arXiv 2310.18547), section 7, and its repository's benchmarks/benchmark_utils.py.
    """
    match mix.kind:
        case "identical":
            return [requests]
        case "distinct":
            return [1] * requests
        case "uniform":
            groups = math.ceil(math.sqrt(requests))
            share, more = divmod(requests, groups)
            return [share + 1] * more + [share] * (groups - more)
        case "zipf":
            return _geometric_groups(mix.parameter, requests)
    raise ValueError(f"no mix is called {mix.kind}")


def _geometric_groups(growth: float, requests: int) -> list[int]:
    groups: list[int] = []
    left, size = requests, 1.0
    while math.floor(size) < left:
        groups.append(math.floor(size))
        left -= groups[-1]
        size *= growth
    return sorted([*groups, left], reverse=True)


def punica_spread(mix: Popularity, requests: int, adapters: int, random: np.random.Generator) -> Indices:
    """One adapter for each request: Punica's groups, shuffled.

    Where there are more groups than adapters, group g takes adapter g mod adapters (Punica's benchmark does
    the same beyond its batch size).
    """
    groups = punica_groups(mix, requests)
    indices = np.repeat(np.arange(len(groups)), groups)
    random.shuffle(indices)
    return indices % adapters
