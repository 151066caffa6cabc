"""Which shard group a sequence goes to: a pure function over plain data.

The cost of a group is what it would have to do, in tokens, once the sequence is there:

    cost = (tokens + own) · (1 + ranks / RANKS) + Σ bring(adapter)

`tokens` are those of the sequences already there, waiting or running, and `own` those of this one; `ranks`
is the sum of the ranks of the adapters that these and this one use, each counted once, since a step's adapter
work grows with it. So a group that serves an adapter already is cheaper for it, and work is balanced.

`bring` is what it takes until the group has the adapter resident: nothing where it is; LOAD where it is being
loaded, or lies on disk; FETCH more where its files must come first. A copy that nobody has asked for there
yet is also paid for by whoever it displaces, and is worth the more, the more work will use it. So it costs

    bring · clamp(HOT / work, 1, RARE)

with `work` the tokens of all groups' sequences that use this adapter, this one's among them. A rare adapter
stays where it is, up to RARE loads' worth of imbalance; a hot one goes to a second group as soon as that has
less to do by what it takes to bring it, and from then on costs nothing on either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .client import AdapterState

RANKS = 1024
"""Ranks of adapters in one step that make it as slow again as without any."""
LOAD = 256
"""Tokens that a group could have computed in the time of a load."""
FETCH = 768
"""The same for a fetch."""
HOT = 2048
"""Tokens of waiting and running work from which on an adapter's copy pays for its load alone."""
RARE = 8
"""Most that a load counts for an adapter with less work."""

_BRING = {
    AdapterState.RESIDENT: 0,
    AdapterState.LOADING: LOAD,
    AdapterState.ON_DISK: LOAD,
    AdapterState.FETCHING: FETCH + LOAD,
    AdapterState.ABSENT: FETCH + LOAD,
}
_UNDER_WAY = (AdapterState.RESIDENT, AdapterState.LOADING, AdapterState.FETCHING)


@dataclass(frozen=True, slots=True)
class GroupView:
    """What placement sees of one group."""

    tokens: int
    """Of all sequences that wait or run there, prompt and output."""
    work: Mapping[str, int]
    """These tokens by each adapter that they are for."""
    state: Callable[[str], AdapterState]
    """How far the group has come with an adapter: never FAILED."""


def choose(views: Sequence[GroupView], keys: tuple[str, ...], tokens: int, rank: Callable[[str], int]) -> int:
    """The index of the cheapest group, the first one of several; there must be one.

    Args:
        keys: adapters of the sequence.
        tokens: of its prompt and output together.
        rank: largest rank of an adapter.
    """
    if len(views) == 1:
        return 0
    work = {key: tokens + sum(view.work.get(key, 0) for view in views) for key in keys}
    costs = [_cost(view, keys, tokens, work, rank) for view in views]
    return costs.index(min(costs))


def _cost(
    view: GroupView,
    keys: tuple[str, ...],
    tokens: int,
    work: Mapping[str, int],
    rank: Callable[[str], int],
) -> float:
    ranks = sum(rank(key) for key in {*view.work, *keys})
    bring = sum(_bring(view, key, work[key]) for key in keys)
    return (view.tokens + tokens) * (1 + ranks / RANKS) + bring


def _bring(view: GroupView, key: str, work: int) -> float:
    state = view.state(key)
    if state in _UNDER_WAY or key in view.work:
        return _BRING[state]
    return _BRING[state] * min(max(HOT / max(work, 1), 1.0), RARE)
