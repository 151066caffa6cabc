"""Which adapters may serve a request together, and from which position each applies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.router.client import Manifest, PreparedAdapter
from loraplex.router.errors import InvalidRequest
from loraplex.router.request import AdapterChoice, AdapterUse
from loraplex.router.sums import check_parts, check_sum, last_occurrence, uses_in

from ..fakes.shard import FakeShards, generate, make_info
from .served import hub, serving, tokens_of


def adapter(name: str, weight: float = 1.0, **facts: object) -> PreparedAdapter:
    return PreparedAdapter(name, f"{name}#1", weight, Manifest(digest=name, **facts))  # type: ignore[arg-type]


def test_what_may_go_together_does() -> None:
    check_sum([], "adapters")
    check_sum([adapter("dora", alone="DoRA", owns=("lm_head",))], "model")
    check_sum([adapter("a", -3.0, owns=("lm_head",)), adapter("b", 0.0, owns=("embed_tokens",))], "adapters")


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (
            [adapter("a"), adapter("dora", alone="DoRA"), adapter("b")],
            r"dora \(DoRA\) cannot be summed with a, b: use it alone",
        ),
        ([adapter("dora", 0.5, alone="DoRA")], r"dora \(DoRA\) takes no weight but 1, not 0.5"),
        (
            [adapter("a", owns=("lm_head", "norm")), adapter("c"), adapter("b", owns=("norm",))],
            "a and b both replace norm",
        ),
    ],
)
def test_what_may_not_go_together_is_refused_by_name(adapters: list[PreparedAdapter], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check_sum(adapters, "adapters")
    assert caught.value.param == "adapters"


@pytest.mark.parametrize("facts", [{"alone": "DoRA"}, {"invocation_tokens": (1,)}])
def test_what_cannot_be_merged_is_refused_by_name(facts: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=r"^odd .*cannot be merged"):
        check_parts([adapter("plain"), adapter("odd", **facts)])


@given(
    tokens=st.lists(st.integers(0, 2), max_size=20),
    wanted=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_the_last_occurrence_is_found(tokens: list[int], wanted: list[int]) -> None:
    starts = [at for at in range(len(tokens)) if tokens[at : at + len(wanted)] == wanted]
    assert last_occurrence(tokens, wanted) == (starts[-1] if starts else None)
    assert last_occurrence(tuple(tokens), tuple(wanted)) == last_occurrence(tokens, wanted)


def test_each_adapter_counts_from_its_own_start() -> None:
    adapters = [
        adapter("plain", 0.5),
        adapter("late", invocation_tokens=(7, 8)),
        adapter("absent", invocation_tokens=(9,)),
        adapter("early", invocation_tokens=(1,)),
    ]
    assert uses_in([0, 1, 7, 8, 7, 8, 7], adapters) == (
        AdapterUse("plain#1", 0.5, 0),
        AdapterUse("late#1", 1.0, 4),
        AdapterUse("early#1", 1.0, 1),
    )


# Through the engine: spans on the shard.


async def test_an_invoked_adapter_applies_from_its_invocation_on() -> None:
    sources = hub(1, manifest={"invocation_tokens": [7, 8]}) | {"org/plain": hub(1)["org/a0"]}
    async with serving(FakeShards(sources=sources)) as served:
        own = (("sha-org/a0", 1.0),)
        assert await tokens_of(await served.ask([5, 7, 8, 6], "org/a0")) == generate(
            [5, 7, 8, 6], 8, entries=((1, own),)
        )
        assert await tokens_of(await served.ask([7, 8, 6], "org/a0")) == generate([7, 8, 6], 8, entries=own)
        both = ((0, (("sha-org/plain", 2.0),)), (2, (("sha-org/plain", 2.0), ("sha-org/a0", 1.0))))
        request = await served.ask([7, 8, 7, 8], AdapterChoice("org/plain", 2.0), "org/a0")
        assert await tokens_of(request) == generate([7, 8, 7, 8], 8, entries=both)
        await served.at_baseline()


async def test_without_invocation_the_base_serves_the_request() -> None:
    async with serving(FakeShards(sources=hub(1, manifest={"invocation_tokens": [7, 8]}))) as served:
        assert await tokens_of(await served.ask([8, 7], "org/a0")) == generate([8, 7], 8)
        assert served.shards.loads == []
        await served.at_baseline()


async def test_the_spans_are_the_same_after_a_preemption() -> None:
    """Output tokens that look like an invocation do not count."""
    shards = FakeShards(
        make_info(blocks=24, rows=16),
        sources=hub(1, manifest={"invocation_tokens": [3]}),
        step_seconds=0.0005,
    )
    async with serving(shards) as served:
        asked = []
        for index in range(30):
            prompt = [3, 1, index + 10, 3, *range(20, 20 + index % 7)]
            asked.append((await served.ask(prompt, "org/a0", max_tokens=30, seed=index), prompt, index))
        for request, prompt, seed in asked:
            entries = ((3, (("sha-org/a0", 1.0),)),)
            assert await tokens_of(request) == generate(prompt, 30, entries=entries, seed=seed)
        await served.at_baseline()
        assert served.metrics.preemptions > 5
