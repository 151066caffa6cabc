"""Order and bounds of what waits."""

from __future__ import annotations

import pytest

from loraplex.router.errors import Overloaded, TooManyRequests
from loraplex.router.queues import QueueBounds, Queues
from loraplex.router.request import Request, SamplingParams, TokenStream
from loraplex.router.sequence import Sequence


def sequence(ticket: int, *keys: str, prompt: int = 1, tenant: str = "") -> Sequence:
    request = Request(
        id=str(ticket),
        tenant=tenant,
        adapters=(),
        prompt=[1] * prompt,
        params=SamplingParams(max_tokens=4),
        stream=TokenStream(),
        arrival=0.0,
    )
    return Sequence(request, ticket, keys, 4)


def everything(keys: tuple[str, ...]) -> bool:
    return True


def test_by_age_merges_queues_and_passes_over_the_rest() -> None:
    queues = Queues()
    made = [sequence(1, "a"), sequence(2), sequence(3, "a", "b"), sequence(4), sequence(5, "a")]
    for each in made:
        queues.add(each)
    assert list(queues.by_age(everything)) == made
    assert list(queues.by_age(lambda keys: "b" not in keys)) == [made[0], made[1], made[3], made[4]]
    assert {head.ticket for head in queues.heads()} == {1, 2, 3}
    assert (len(queues), queues.waiting("a"), queues.waiting("b"), queues.waiting("c")) == (5, 3, 1, 0)
    assert queues.naming("b") == [made[2]]


def test_removal_anywhere_leaves_no_empty_queue() -> None:
    queues = Queues()
    first, second = sequence(1, "a"), sequence(2, "a")
    queues.add(first)
    queues.add(second)
    queues.remove(first)
    assert queues.heads() == [second]
    assert first not in queues
    assert second in queues
    queues.remove(second)
    assert (queues.heads(), len(queues), queues.waiting("a")) == ([], 0, 0)
    with pytest.raises(KeyError):
        queues.remove(second)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_what_is_put_back_stands_in_front_by_age(order: tuple[int, ...]) -> None:
    queues = Queues()
    made = {ticket: sequence(ticket) for ticket in range(1, 6)}
    queues.add(made[4])
    queues.add(made[5])
    for ticket in order:
        queues.put_back(made[ticket])
    assert [s.ticket for s in queues.by_age(everything)] == [1, 2, 3, 4, 5]
    assert queues.heads() == [made[1]]


def test_one_adapter_gets_half_and_the_whole_is_bounded() -> None:
    bounds = QueueBounds(4, 10_000)
    taken = [sequence(1, "a"), sequence(2, "a"), sequence(3, "b"), sequence(4)]
    for each in taken[:2]:
        bounds.take(each)
    with pytest.raises(TooManyRequests, match="adapter") as caught:
        bounds.take(sequence(9, "a"))
    assert caught.value.retry_after
    for each in taken[2:]:
        bounds.take(each)
    with pytest.raises(Overloaded) as full:
        bounds.take(sequence(9, "c"))
    assert full.value.retry_after
    for each in taken:
        bounds.give_back(each)
        bounds.give_back(each)
    assert not bounds._shares
    bounds.take(sequence(9, "c"))


def test_a_named_tenant_gets_half_an_unnamed_one_all() -> None:
    bounds = QueueBounds(4, 10_000)
    bounds.take(sequence(1, "a", tenant="t"))
    bounds.take(sequence(2, "b", tenant="t"))
    with pytest.raises(TooManyRequests, match="tenant"):
        bounds.take(sequence(3, "c", tenant="t"))
    bounds.take(sequence(4, "c"))
    bounds.take(sequence(5, "d"))


def test_tokens_are_bounded_but_a_lone_request_always_fits() -> None:
    bounds = QueueBounds(100, 100)
    long = sequence(1, "a", prompt=500)
    bounds.take(long)
    with pytest.raises(Overloaded):
        bounds.take(sequence(2, prompt=1))
    bounds.give_back(long)
    bounds.take(sequence(3, "a", prompt=30))
    with pytest.raises(TooManyRequests):
        bounds.take(sequence(4, "a", prompt=30))
    bounds.take(sequence(5, "b", prompt=30))


def test_a_refused_sequence_is_not_counted() -> None:
    bounds = QueueBounds(2, 100)
    bounds.take(sequence(1, "a"))
    refused = sequence(2, "a")
    with pytest.raises(TooManyRequests):
        bounds.take(refused)
    bounds.give_back(refused)
    bounds.take(sequence(3, "b"))
    with pytest.raises(Overloaded):
        bounds.take(sequence(4, "c"))
