"""The scheduler as a pure function: one state in, one plan out."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest

from loraplex.router.adapters import AdapterRegistry
from loraplex.router.blocks import BlockPool
from loraplex.router.client import AdapterState, Manifest
from loraplex.router.errors import AdapterFetchFailed, AdapterRejected, Overloaded
from loraplex.router.queues import Queues
from loraplex.router.request import Request, SamplingParams, TokenStream
from loraplex.router.residency import Residency
from loraplex.router.scheduler import Demand, Limits, State, plan, plan_adapters
from loraplex.router.sequence import Sequence, SequenceState
from loraplex.router.sources import SourcePolicy


class World:
    """A state to plan on, with sequences placed by hand."""

    def __init__(
        self, *, blocks: int = 100, step_tokens: int = 64, rows: int = 8, slots: int = 2, budget: int = 1000
    ) -> None:
        self.limits = Limits.within(step_tokens=step_tokens, rows=rows, patience=3.0)
        self.queues = Queues()
        self.running: list[Sequence] = []
        self.pool = BlockPool(blocks + 1, 4)
        self.residency = Residency(slots, budget)
        self.registry = AdapterRegistry(SourcePolicy((), ("hub:*",)), base="base", jitter=random.Random(0))
        self.wishes: list[Demand] = []
        self._ticket = 0

    @property
    def state(self) -> State:
        return State(
            self.limits,
            self.queues,
            self.running,
            self.pool,
            self.residency,
            self.registry.get,
            self.wishes,
        )

    def sequence(self, prompt: int, *keys: str, max_output: int = 100, arrival: float = 0.0) -> Sequence:
        self._ticket += 1
        request = Request(
            id=str(self._ticket),
            tenant="",
            adapters=(),
            prompt=[1] * prompt,
            params=SamplingParams(max_tokens=max_output),
            stream=TokenStream(),
            arrival=arrival,
        )
        return Sequence(request, self._ticket, tuple(sorted(keys)), max_output)

    def waiting(self, prompt: int, *keys: str, max_output: int = 100, arrival: float = 0.0) -> Sequence:
        sequence = self.sequence(prompt, *keys, max_output=max_output, arrival=arrival)
        self.queues.add(sequence)
        return sequence

    def decoding(self, length: int, *keys: str, max_output: int = 100) -> Sequence:
        """Running, with `length` positions computed and exactly the blocks these need."""
        sequence = self.sequence(length, *keys, max_output=max_output)
        sequence.state, sequence.computed, sequence.sampled = SequenceState.RUNNING, length, 1
        sequence.blocks = self.pool.allocate(self.pool.blocks_for(length))
        sequence.capacity = len(sequence.blocks) * 4
        self.residency.acquire(keys, 0.0)
        self.running.append(sequence)
        return sequence

    def prompting(self, prompt: int, computed: int) -> Sequence:
        sequence = self.decoding(prompt)
        sequence.computed, sequence.sampled = computed, 0
        return sequence

    def adapter(self, name: str, *, size: int = 100, place: str = "disk", used: float = 0.0) -> str:
        adapter = self.registry.resolve(f"org/{name}", tenant="")
        key = adapter.key
        if place != "absent":
            self.registry.fetched(adapter, 0, Manifest(digest=name, bytes=size), 0.0)
        if place in ("loading", "resident"):
            self.residency.begin_load(key, size)
        if place == "resident":
            self.residency.loaded(key, size, used)
        return key


def test_planning_changes_nothing() -> None:
    world = World(blocks=10)
    key = world.adapter("a")
    world.decoding(4)
    world.decoding(12)
    world.prompting(8, 2)
    world.waiting(5)
    world.waiting(5, key)
    sequences = [*world.running, *world.queues.all()]
    before = deepcopy([(s.computed, s.sampled, s.blocks, s.state) for s in sequences])
    first, second = plan(world.state, 1.0), plan(world.state, 1.0)
    assert first == second
    assert [(s.computed, s.sampled, s.blocks, s.state) for s in sequences] == before
    assert (world.pool.free_count, len(world.queues), world.residency.free_slots) == (10 - 1 - 3 - 2, 2, 2)


def test_every_running_sequence_decodes_and_grows_at_a_block_boundary() -> None:
    world = World()
    full, half = world.decoding(8), world.decoding(6)
    chosen = plan(world.state, 0.0)
    assert chosen.decode == [full, half]
    assert chosen.grow == [full]


def test_the_youngest_is_preempted_and_nothing_admitted_with_it() -> None:
    world = World(blocks=7)
    oldest, middle, youngest = world.decoding(8), world.decoding(8), world.decoding(12)
    world.waiting(1)
    chosen = plan(world.state, 0.0)
    assert chosen.preempt == [youngest]
    assert chosen.decode == chosen.grow == [oldest, middle]
    assert not chosen.admit


def test_preemption_goes_on_until_the_oldest_fits() -> None:
    world = World(blocks=3)
    oldest, _, _ = world.decoding(4), world.decoding(4), world.decoding(4)
    chosen = plan(world.state, 0.0)
    assert chosen.decode == [oldest]
    assert len(chosen.preempt) == 2


def test_a_youngest_amid_its_prompt_is_preempted_too() -> None:
    world = World(blocks=4)
    oldest, youngest = world.decoding(8), world.prompting(8, 3)
    chosen = plan(world.state, 0.0)
    assert (chosen.decode, chosen.preempt, chosen.chunks) == ([oldest], [youngest], [])


def test_prompts_share_what_decode_rows_leave_oldest_first() -> None:
    world = World(step_tokens=16)
    world.decoding(5)
    first, second = world.prompting(30, 20), world.prompting(30, 0)
    chosen = plan(world.state, 0.0)
    assert [(c.sequence, c.start, c.length, c.last) for c in chosen.chunks] == [
        (first, 20, 10, True),
        (second, 0, 5, False),
    ]


@pytest.mark.parametrize("step_tokens", [1, 2, 7, 64, 512])
def test_rows_leave_a_quarter_of_the_step_to_prompts(step_tokens: int) -> None:
    limits = Limits.within(step_tokens=step_tokens, rows=10_000, patience=0)
    assert limits.rows >= 1
    assert step_tokens - limits.rows >= step_tokens // 4


def test_admission_is_by_age_over_all_queues() -> None:
    world = World(rows=3)
    a, b = world.adapter("a", place="resident"), world.adapter("b", place="resident")
    asked = [world.waiting(2, *keys) for keys in ((b,), (), (a,), (b,))]
    assert plan(world.state, 0.0).admit == asked[:3]


def test_admission_ends_with_the_budget_and_the_last_prompt_is_cut() -> None:
    world = World(step_tokens=16)
    first, second, _ = world.waiting(10), world.waiting(10), world.waiting(10)
    chosen = plan(world.state, 0.0)
    assert chosen.admit == [first, second]
    assert [chunk.length for chunk in chosen.chunks] == [10, 6]


def test_admission_needs_blocks_for_the_prompt_and_the_next_token() -> None:
    world = World(blocks=2)
    asked = world.waiting(8)
    assert not plan(world.state, 0.0).admit
    world.queues.remove(asked)
    single = world.waiting(8, max_output=1)
    assert plan(world.state, 0.0).admit == [single]


def test_a_large_prompt_is_not_starved_by_small_ones() -> None:
    world = World(blocks=10)
    world.decoding(20)
    world.waiting(30)
    world.waiting(1)
    assert not plan(world.state, 0.0).admit


def test_some_blocks_stay_free_for_rows_that_run() -> None:
    world = World(blocks=10, rows=20)
    for _ in range(8):
        world.decoding(1)
    world.waiting(1)
    assert not plan(world.state, 0.0).admit
    world.pool.free(world.running.pop().blocks)
    assert len(plan(world.state, 0.0).admit) == 1


def test_a_request_whose_adapter_is_away_holds_up_nobody() -> None:
    world = World()
    world.waiting(2, world.adapter("a", place="absent"))
    world.waiting(2, world.adapter("b"))
    world.waiting(2, world.adapter("c", place="resident"), world.adapter("d", place="loading"))
    ready = world.waiting(2)
    assert plan(world.state, 0.0).admit == [ready]


def test_what_is_wanted_is_fetched_once_and_loaded_when_on_disk() -> None:
    world = World()
    absent, disk = world.adapter("a", place="absent"), world.adapter("b")
    for keys in ((absent,), (absent, disk), (disk,)):
        world.waiting(2, *keys)
    work = plan_adapters(world.state, 0.0)
    assert work.fetches == [absent]
    assert work.loads == [disk]


def test_a_set_is_loaded_when_all_of_it_is_on_disk() -> None:
    world = World()
    a, b = world.adapter("a"), world.adapter("b")
    world.waiting(2, a, b)
    assert sorted(plan_adapters(world.state, 0.0).loads) == [a, b]


def test_nothing_is_fetched_before_its_time() -> None:
    world = World()
    key = world.adapter("a", place="absent")
    adapter = world.registry.get(key)
    assert adapter is not None
    world.registry.absent(adapter, 0, retry_at=5.0)
    world.waiting(2, key)
    assert plan_adapters(world.state, 4.0).fetches == []
    assert plan_adapters(world.state, 5.0).fetches == [key]


def test_a_failed_adapter_is_refused_within_its_backoff_and_fetched_after() -> None:
    world = World()
    key = world.adapter("a", place="absent")
    adapter = world.registry.get(key)
    assert adapter is not None
    world.registry.failed(adapter, 0, AdapterFetchFailed("503"), now=0.0)
    world.waiting(2, key)
    ((demand, error),) = plan_adapters(world.state, 0.1).rejects
    assert demand.keys == (key,)
    assert isinstance(error, AdapterFetchFailed)
    assert plan_adapters(world.state, 10.0).fetches == [key]


def test_the_least_recently_used_idle_adapter_goes() -> None:
    world = World(slots=3)
    world.adapter("busy", place="resident", used=1.0)
    world.residency.acquire([world.registry.resolve("org/busy", tenant="").key], 1.0)
    old, _ = (
        world.adapter("old", place="resident", used=2.0),
        world.adapter("new", place="resident", used=3.0),
    )
    world.waiting(2, world.adapter("wanted"))
    work = plan_adapters(world.state, 4.0)
    assert (work.evictions, work.loads) == ([old], [])


def test_pinned_adapters_and_those_that_older_ones_want_stay() -> None:
    world = World(slots=2)
    wanted, pinned = world.adapter("wanted", place="resident"), world.adapter("pinned", place="resident")
    adapter = world.registry.get(pinned)
    assert adapter is not None
    adapter.pinned = True
    world.waiting(2, wanted)
    world.waiting(2, world.adapter("late"))
    work = plan_adapters(world.state, 0.0)
    assert work.evictions == work.draining == []


def test_room_set_aside_for_an_older_demand_is_not_given_to_a_younger() -> None:
    world = World(slots=2)
    world.adapter("idle", place="resident")
    a, b, c = (world.adapter(name) for name in "abc")
    world.waiting(2, a, b)
    world.waiting(2, c)
    work = plan_adapters(world.state, 0.0)
    assert len(work.evictions) == 1
    assert work.loads == []
    world.residency.begin_unload(work.evictions[0])
    assert plan_adapters(world.state, 0.0).loads == []
    world.residency.remove(work.evictions[0])
    assert sorted(plan_adapters(world.state, 0.0).loads) == [a, b]


def test_eviction_counts_bytes_as_well_as_slots() -> None:
    world = World(slots=8, budget=1000)
    keys = [world.adapter(f"r{i}", size=300, place="resident", used=float(i)) for i in range(3)]
    world.waiting(2, world.adapter("big", size=600))
    assert plan_adapters(world.state, 9.0).evictions == keys[:2]


def test_after_its_patience_the_adapter_with_least_work_is_drained() -> None:
    world = World()
    long, short = world.adapter("long", place="resident"), world.adapter("short", place="resident")
    world.decoding(4, long, max_output=90)
    world.decoding(4, short, max_output=9)
    world.waiting(2, world.adapter("wanted"), arrival=10.0)
    behind = world.waiting(2, short, arrival=10.5)
    base = world.waiting(2, arrival=10.6)
    assert plan(world.state, 12.0).admit == [behind, base]
    chosen = plan(world.state, 13.1)
    assert chosen.adapters.draining == [short]
    assert chosen.admit == [base]


def test_waiting_counts_from_when_the_adapter_is_on_disk() -> None:
    world = World(slots=1)
    busy = world.adapter("busy", place="resident")
    world.decoding(4, busy)
    key = world.adapter("wanted", place="absent")
    adapter = world.registry.get(key)
    assert adapter is not None
    world.registry.fetched(adapter, 0, Manifest(digest="late", bytes=1), 20.0)
    world.waiting(2, key, arrival=0.0)
    assert plan_adapters(world.state, 22.0).draining == []
    assert plan_adapters(world.state, 24.0).draining == [busy]


def test_what_can_never_fit_is_refused() -> None:
    world = World(slots=2, budget=1000)
    world.waiting(2, world.adapter("huge", size=1001))
    world.waiting(2, world.adapter("a", size=600), world.adapter("b", size=600))
    errors = [error for _, error in plan_adapters(world.state, 0.0).rejects]
    assert [type(error) for error in errors] == [AdapterRejected, AdapterRejected]
    assert "org/huge" in errors[0].message


def test_pins_that_leave_no_room_are_named() -> None:
    world = World(slots=1)
    adapter = world.registry.get(world.adapter("pinned", place="resident"))
    assert adapter is not None
    adapter.pinned = True
    world.waiting(2, world.adapter("a"))
    ((_, error),) = plan_adapters(world.state, 0.0).rejects
    assert isinstance(error, Overloaded)
    assert adapter.state is AdapterState.ON_DISK


def test_a_load_by_name_counts_like_a_waiting_request() -> None:
    world = World(slots=1)
    world.adapter("idle", place="resident")
    key = world.adapter("wished")
    world.wishes.append(Demand((key,), 99, 0.0))
    assert len(plan_adapters(world.state, 0.0).evictions) == 1
