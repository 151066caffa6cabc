"""Everything at once: ten rows of ten kinds in one batch, each equal to its own PEFT model."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from peft import IA3Config

from .bases import Base
from .bench import Bench, Made, Maker, Reference, lora, peft
from .cases_sums import weighted_sum
from .comparing import TOLERANCE, check_equal, expected_logprobs, largest_difference
from .serving import Ask, Served, Use

_QV = ["q_proj", "v_proj"]

MAKERS: dict[str, Maker] = {
    "lora": lora(r=3),
    "rslora": lora(r=64, use_rslora=True),
    "dora": lora(use_dora=True),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "saved head": lora(modules_to_save=["lm_head"]),
    "tokens": lora(trainable_token_indices=[7, 20, 41, 77, 130, 201]),
    "bias": lora(bias="all", target_modules=_QV),
    "sum": weighted_sum(lora(r=2, target_modules=_QV), lora(r=9, target_modules=["v_proj", "up_proj"])),
    "ia3": peft(
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        )
    ),
}


def _prompts() -> dict[str, tuple[int, ...]]:
    """A prompt of its own for every row, the tokens that are trained among them."""
    dice = random.Random(3)
    return {
        name: (7, 77, *(dice.randrange(296) for _ in range(6 + 2 * index)))
        for index, name in enumerate(["base", *MAKERS])
    }


def test_each_row_of_a_batch_of_all_kinds_equals_its_own_peft_model(
    bases: Callable[[str], Base], serve: Callable[[str], Served], tmp_path: Path
) -> None:
    base, served, prompts = bases("qwen2"), serve("qwen2"), _prompts()
    made = {
        name: replace(make(Bench(base, tmp_path / name, bases, seed=index)), prompt=prompts[name])
        for index, (name, make) in enumerate(MAKERS.items())
    }
    rows = {"base": Made((), Reference(base.fresh), prompts["base"])} | made
    packed = {name: [served.pack(directory) for directory, _ in one.adapters] for name, one in rows.items()}
    with served.resident([adapter for row in packed.values() for adapter in row]) as slots:
        left = iter(slots)
        asks = [
            Ask(one.prompt, tuple(Use(next(left), weight) for _, weight in one.adapters))
            for one in rows.values()
        ]
        answers = dict(zip(rows, served.answer(asks), strict=True))
    assert served.adapters_in_step == len(slots) == len(MAKERS) + 1
    for name, one in rows.items():
        check_equal(answers[name], one, name)
    for name, one in made.items():
        unadapted = expected_logprobs(replace(one, reference=rows["base"].reference), answers[name].tokens)
        assert largest_difference(answers[name].logprobs, unadapted) > 100 * TOLERANCE, name
