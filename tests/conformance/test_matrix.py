"""The conformance matrix: every way people make adapters, served as PEFT computes it or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from loraplex.shard.adapters.pack import PackedDirectory
from loraplex.shard.errors import AdapterRejected

from . import cases_files, cases_kinds, cases_lora, cases_sums, cases_variants
from .bases import Base
from .bench import PROMPT, Bench, Made, lora
from .case import Case, ids
from .comparing import ask_for, check_equal, check_moves, check_same
from .serving import Answer, Ask, Served, Use

CASES = (
    *cases_lora.CASES,
    *cases_variants.CASES,
    *cases_kinds.CASES,
    *cases_files.CASES,
    *cases_sums.CASES,
)
SERVED = [case for case in CASES if not case.refused]
REFUSED = [case for case in CASES if case.refused]

ROWS = range(1, 69)
LATER = {65: "quantised bases are not served yet"}
ELSEWHERE = {
    59: "test_half_precision.py",
    62: "test_traits.py",
}
"""Rows that have tests of their own beside this file."""

_COMPANION_SLOT = 31


@dataclass(frozen=True)
class Company:
    """What every case shares its batch with: the base, and a fixed adapter."""

    served: Served
    base: Answer
    companion: Answer

    @property
    def companion_ask(self) -> Ask:
        return Ask(PROMPT, (Use(_COMPANION_SLOT),))

    def base_on(self, prompt: tuple[int, ...]) -> Answer:
        """The base's answer; ids that it does not know become others."""
        if prompt == PROMPT:
            return self.base
        return self.served.answer([Ask(tuple(token % self.served.vocab_size for token in prompt))])[0]


@pytest.fixture(scope="session")
def company(
    bases: Callable[[str], Base], serve: Callable[[str], Served], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Company]:
    """By base. The companion stays resident, and is PEFT's equal itself."""

    def build(name: str) -> Company:
        served = serve(name)
        bench = Bench(bases(name), tmp_path_factory.mktemp("companion") / name, bases, seed=99)
        targets = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}.get(name, ["q_proj", "v_proj"])
        made = lora(r=5, target_modules=targets)(bench)
        served.load(_COMPANION_SLOT, served.pack(made.directory))
        [base] = served.answer([Ask(PROMPT)])
        [companion] = served.answer([Ask(PROMPT, (Use(_COMPANION_SLOT),))])
        check_equal(companion, made, f"companion on {name}")
        return Company(served, base, companion)

    return cache(build)


@pytest.fixture
def bench(tmp_path: Path, bases: Callable[[str], Base]) -> Callable[[str, int], Bench]:
    """A bench for a base, by number."""
    return lambda base, index: Bench(bases(base), tmp_path / f"adapter{index}", bases, seed=index)


@pytest.mark.parametrize("case", SERVED, ids=ids(SERVED))
def test_served_as_peft_computes_it(
    case: Case, company: Callable[[str], Company], bench: Callable[[str, int], Bench]
) -> None:
    """Alone, and all of a case's adapters in one batch with the base and another adapter."""
    among = company(case.base)
    served = among.served
    made = [make(bench(case.base, index)) for index, make in enumerate(case.makes)]
    packed = [[served.pack(directory) for directory, _ in one.adapters] for one in made]
    for adapter in (adapter for row in packed for adapter in row):
        check_traits(case, adapter)
    with served.resident([adapter for row in packed for adapter in row]) as slots:
        asks = _asks(made, packed, slots)
        alone = [served.answer([ask])[0] for ask in asks]
        for index, (answer, one) in enumerate(zip(alone, made, strict=True)):
            label = f"adapter {index} alone"
            check_equal(answer, one, label)
            unadapted = among.base_on(one.prompt)
            check_moves(answer, unadapted, case.moves, label)
            if case.exact:
                assert answer.logprobs.equal(unadapted.logprobs)
        base, *rows, companion = served.answer([Ask(PROMPT), *asks, among.companion_ask])
    check_same(base, among.base, "the base in the batch")
    check_same(companion, among.companion, "the other adapter in the batch")
    for index, (answer, one) in enumerate(zip(rows, made, strict=True)):
        check_equal(answer, one, f"adapter {index} in the batch")
        check_same(answer, alone[index], f"adapter {index} in the batch")


def _asks(
    made: Sequence[Made], packed: Sequence[Sequence[PackedDirectory]], slots: Sequence[int]
) -> list[Ask]:
    left = iter(slots)
    return [
        ask_for(one, [next(left) for _ in row], [adapter.traits.invocation_tokens for adapter in row])
        for one, row in zip(made, packed, strict=True)
    ]


def check_traits(case: Case, packed: PackedDirectory) -> None:
    warnings = packed.traits.warnings
    if case.warns:
        assert any(re.search(case.warns, warning) for warning in warnings), warnings
    else:
        assert warnings == ()
    assert re.search(case.kind, packed.traits.kind)
    assert packed.traits.kind
    assert packed.modules > 0


@pytest.mark.parametrize("case", REFUSED, ids=ids(REFUSED))
def test_refused_by_name(
    case: Case, company: Callable[[str], Company], bench: Callable[[str, int], Bench]
) -> None:
    """The message says what is wrong and what to do; nothing is left behind; the base is served as before."""
    among = company(case.base)
    [make] = case.makes
    made = make(bench(case.base, 0))
    spooled = among.served.spooled()
    with pytest.raises(AdapterRejected) as refusal:
        among.served.pack(made.directory, max_rank=case.max_rank)
    for pattern in case.refused:
        assert re.search(pattern, str(refusal.value)), str(refusal.value)
    assert among.served.spooled() == spooled
    base, companion = among.served.answer([Ask(PROMPT), among.companion_ask])
    check_same(base, among.base, "the base afterwards")
    check_same(companion, among.companion, "the other adapter afterwards")


def test_every_row_is_covered() -> None:
    here = {case.row for case in CASES}
    assert not here & LATER.keys()
    assert here | ELSEWHERE.keys() | LATER.keys() == set(ROWS)
    for name in ELSEWHERE.values():
        assert (Path(__file__).parent / name).exists(), name


def test_names_of_cases_are_unique() -> None:
    assert len(set(ids(CASES))) == len(CASES)
