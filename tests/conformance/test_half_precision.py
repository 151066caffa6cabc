"""Row 59: adapters in fp16, bf16 and fp32 files on a bf16 base, against the same weights computed in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from .bases import Base
from .bench import PROMPT, Bench, Maker, Reference, Tensors, altered, lora
from .comparing import expected_logprobs
from .serving import Ask, Served, Use

_PROMPTS = (PROMPT, tuple(reversed(PROMPT)), tuple(range(20, 60, 3)), tuple(range(250, 20, -17)))
_FACTOR = 1.5
"""How many times the base model's own rounding an adapter's rows may be away from fp32."""

MAKERS = {
    "lora": lora(),
    "dora": lora(use_dora=True, r=8),
    "embedding-and-head": lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "saved-head": lora(modules_to_save=["lm_head"]),
}


@dataclass(frozen=True)
class Half:
    """A base whose weights are bf16: computed in fp32 for reference, and served in bf16."""

    base: Base
    served: Served
    own_error: float
    """Of the base in bf16 as transformers computes it."""


@pytest.fixture(scope="module")
def half(bases: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory) -> Half:
    root = tmp_path_factory.mktemp("half")
    directory, spool = root / "llama", root / "spool"
    spool.mkdir()
    bases("llama").fresh().bfloat16().save_pretrained(directory)  # type: ignore[operator]
    bases("llama").tokenizer().save_pretrained(directory)
    base = Base("llama", directory)
    exact, rounded = Reference(base.fresh), Reference(lambda: base.fresh().bfloat16())
    pairs = [(rounded.logits(prompt, []), exact.logits(prompt, [])) for prompt in _PROMPTS]
    return Half(base, Served(directory, spool), relative_error(pairs))


def relative_error(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Relative L2 distance of (computed, exact) logits over all pairs. Logprobs will do for logits: they
    differ by a constant for each token, which is taken out."""
    got, exact = (torch.cat([_centred(matrix) for matrix in side]) for side in zip(*pairs, strict=True))
    return float((got - exact).norm() / exact.norm())


def _centred(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.double() - matrix.double().mean(-1, keepdim=True)


def _stored_as(dtype: torch.dtype, maker: Maker) -> Maker:
    def cast(tensors: Tensors) -> Tensors:
        return {key: value.to(dtype) for key, value in tensors.items()}

    return altered(maker, cast, reload=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_a_row_in_bf16_is_as_near_to_fp32_as_the_base_is(
    maker: Maker, dtype: torch.dtype, half: Half, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    made = _stored_as(dtype, maker)(Bench(half.base, tmp_path / "adapter", bases))
    with half.served.resident([half.served.pack(made.directory)]) as [slot]:
        answers = half.served.answer([Ask(prompt, (Use(slot),)) for prompt in _PROMPTS])
    pairs = [
        (answer.logprobs, expected_logprobs(replace(made, prompt=prompt), answer.tokens))
        for prompt, answer in zip(_PROMPTS, answers, strict=True)
    ]
    assert relative_error(pairs) <= _FACTOR * half.own_error


def test_the_base_in_bf16_is_as_near_to_fp32_as_transformers_is(half: Half) -> None:
    exact = Reference(half.base.fresh)
    pairs = []
    for prompt, answer in zip(_PROMPTS, half.served.answer([Ask(p) for p in _PROMPTS]), strict=True):
        pairs.append((answer.logprobs, exact.logits(prompt, answer.tokens)[:-1]))
    assert 0 < half.own_error < 0.1
    assert relative_error(pairs) <= _FACTOR * half.own_error
