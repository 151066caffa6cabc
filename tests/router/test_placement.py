"""Where a sequence goes: residency, load, and when an adapter is worth a second copy."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from loraplex.router.client import AdapterState
from loraplex.router.placement import FETCH, HOT, LOAD, RANKS, RARE, GroupView, choose

RANK = 16


@dataclass
class Place:
    """A group by hand. `has`: adapters that are not absent."""

    tokens: int = 0
    work: Counter[str] = field(default_factory=Counter)
    has: dict[str, AdapterState] = field(default_factory=dict)

    @property
    def view(self) -> GroupView:
        return GroupView(self.tokens, self.work, lambda key: self.has.get(key, AdapterState.ABSENT))

    def give(self, tokens: int, *keys: str) -> None:
        """A sequence comes; what it needs becomes resident."""
        self.tokens += tokens
        for key in keys:
            self.work[key] += tokens
            self.has[key] = AdapterState.RESIDENT


def chosen(places: list[Place], *keys: str, tokens: int = 100, rank: int = RANK) -> int:
    return choose([place.view for place in places], keys, tokens, lambda key: rank)


def resident(*keys: str, tokens: int = 0) -> Place:
    return Place(tokens, has=dict.fromkeys(keys, AdapterState.RESIDENT))


def test_a_lone_group_gets_everything() -> None:
    assert chosen([Place(tokens=10**9)], "a", "b") == 0


def test_the_base_goes_where_least_is_to_be_done() -> None:
    assert chosen([Place(tokens=300), Place(tokens=200), Place(tokens=250)]) == 1
    assert chosen([Place(), Place()]) == 0


def test_an_adapter_goes_where_it_is_resident() -> None:
    assert chosen([Place(), resident("a")], "a") == 1
    assert chosen([Place(), resident("a", tokens=RARE * LOAD)], "a") == 1


def test_what_a_group_has_is_worth_the_more_the_nearer_it_is() -> None:
    states = (AdapterState.RESIDENT, AdapterState.LOADING, AdapterState.ON_DISK, AdapterState.ABSENT)
    for near, far in pairwise(states):
        assert chosen([Place(has={"a": far}), Place(has={"a": near})], "a") == 1, (near, far)
    assert chosen([Place(), Place(has={"a": AdapterState.FETCHING})], "a") == 1


def test_a_set_goes_where_most_of_it_is() -> None:
    assert chosen([resident("a"), resident("b", "c")], "a", "b", "c") == 1


def test_an_adapter_that_comes_already_is_not_asked_for_twice() -> None:
    """Sequences that come in one turn of the loop, before anything is fetched."""
    asked = Place(tokens=900, work=Counter(a=900))
    assert chosen([Place(), asked], "a") == 1


def test_a_rare_adapter_stays_where_it_is_within_bounds() -> None:
    home = resident("rare", tokens=RARE * LOAD - 100)
    assert chosen([home, Place(has={"rare": AdapterState.ON_DISK})], "rare", tokens=10) == 0
    home.tokens = 2 * RARE * (LOAD + FETCH)
    assert chosen([home, Place()], "rare", tokens=10) == 1


def test_a_hot_adapter_spills_once_the_other_group_has_less_by_a_load() -> None:
    home = resident("hot", tokens=HOT)
    home.work["hot"] = HOT
    other = Place(tokens=HOT, has={"hot": AdapterState.ON_DISK})
    assert chosen([home, other], "hot") == 0
    other.tokens = HOT - 2 * LOAD
    assert chosen([home, other], "hot") == 1
    other.has["hot"] = AdapterState.RESIDENT
    other.tokens = HOT - 1
    assert chosen([home, other], "hot") == 1


def test_ranks_of_what_is_active_weigh_on_a_group() -> None:
    heavy = Place(tokens=1000, work=Counter(x=1000))
    light = Place(tokens=1100)
    assert chosen([heavy, light], rank=RANKS) == 1
    assert chosen([heavy, light], rank=8) == 0


def test_an_adapter_that_is_active_adds_no_rank() -> None:
    for_it, for_another = resident("a", tokens=1000), resident("a", "b", tokens=1000)
    for_it.work["a"] = for_another.work["b"] = 1000
    assert chosen([for_another, for_it], "a", rank=RANKS) == 1


def test_skewed_work_is_balanced_with_hot_adapters_on_all_groups_and_rare_ones_on_one() -> None:
    """Half of the work is for one adapter, and nothing ever ends: no group has much more than another."""
    places = [Place(), Place(), Place()]
    requests = [f"a{rank}" for rank in range(30) for _ in range(max(1, int(480 / (rank + 1) ** 1.6)))]
    order = sorted(range(len(requests)), key=lambda i: (i * 7919) % len(requests))
    for index in order:
        places[chosen(places, requests[index], rank=0)].give(100, requests[index])
    tokens = [place.tokens for place in places]
    assert max(tokens) < 1.2 * min(tokens), tokens
    homes = {key: sum(key in place.has for place in places) for key in set(requests)}
    assert homes["a0"] >= 2
    assert all(homes[f"a{rank}"] == 1 for rank in range(20, 30)), homes
