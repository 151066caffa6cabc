"""A shard whose forward pass is that of a GPU, its kernels run on the CPU, against PEFT and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraplex.kernels.cuda import CudaLoraOps
from loraplex.kernels.cuda_decoder import CudaDecoderOps
from loraplex.kernels.load import Backend
from loraplex.kernels.side_stream import InOrder

from ..kernels.emulation.launcher import EmulatedLauncher, missing
from .bases import Base
from .bench import Bench, Maker, Reference, lora
from .cases_sums import weighted_sum
from .comparing import check_equal
from .serving import Ask, Served, Use

MAKERS: dict[str, Maker] = {
    "lora": lora(r=3),
    "rslora": lora(r=16, use_rslora=True),
    "dora": lora(use_dora=True),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "bias": lora(bias="all", target_modules=["q_proj", "v_proj"]),
    "head": lora(target_modules=["lm_head", "down_proj"]),
    "sum": weighted_sum(
        lora(r=2, target_modules=["q_proj"]), lora(r=9, target_modules=["v_proj", "up_proj"])
    ),
    "saved norm": lora(modules_to_save=["norm"]),
}


class Repeated:
    """`Capture` where there is nothing to record on: the function runs again, into the same output."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self._work = work
        self.output = work()

    def replay(self) -> None:
        self.output.copy_(self._work())


ServeOn = Callable[[Base, Path], Served]


@pytest.fixture
def serve_on() -> ServeOn:
    """Loads a base for the device under test."""
    if (why := missing()) is not None:
        pytest.skip(why)
    launcher = EmulatedLauncher()
    ops = CudaLoraOps(launcher, torch.device("cpu"), InOrder())
    backend = Backend(ops, CudaDecoderOps(launcher), lambda: Repeated)
    return lambda base, spool: Served(base.directory, spool, backend=backend)


def test_each_row_of_a_mixed_batch_equals_its_own_peft_model(
    serve_on: ServeOn, bases: Callable[[str], Base], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = bases("llama")
    (tmp_path / "spool").mkdir()
    with caplog.at_level("INFO"):
        served = serve_on(base, tmp_path / "spool")
    assert "the forward pass is fused" in caplog.text
    assert "captured" in caplog.text
    made = {
        name: make(Bench(base, tmp_path / name, bases, seed=index))
        for index, (name, make) in enumerate(MAKERS.items())
    }
    packed = {name: [served.pack(directory) for directory, _ in one.adapters] for name, one in made.items()}
    with served.resident([adapter for row in packed.values() for adapter in row]) as slots:
        left = iter(slots)
        asks = [
            Ask(one.prompt, tuple(Use(next(left), weight) for _, weight in one.adapters))
            for one in made.values()
        ]
        plain = [ask for ask, name in zip(asks, made, strict=True) if name != "saved norm"]
        prompt = next(iter(made.values())).prompt
        together = served.answer([*asks, Ask(prompt)])
        graphed = served.answer([*plain, Ask(prompt)])
    for answer, (name, one) in zip(together, made.items(), strict=False):
        check_equal(answer, one, name)
    reference = Reference(base.fresh)
    for answers in (together, graphed):
        check_equal(answers[-1], type(made["lora"])((), reference, prompt), "base")
    kept = [answer for answer, name in zip(together, made, strict=False) if name != "saved norm"]
    for answer, before, name in zip(graphed, kept, plain, strict=False):
        assert answer.tokens == before.tokens, name


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2", "mixtral"])
def test_architectures_fused_or_not_equal_transformers(
    kind: str, serve_on: ServeOn, bases: Callable[[str], Base], tmp_path: Path
) -> None:
    base = bases(kind)
    (tmp_path / "spool").mkdir()
    served = serve_on(base, tmp_path / "spool")
    made = lora(r=5)(Bench(base, tmp_path / "adapter", bases, seed=1))
    [(directory, _)] = made.adapters
    with served.resident([served.pack(directory)]) as [slot]:
        adapted, plain = served.answer([Ask(made.prompt, (Use(slot),)), Ask(made.prompt)])
    check_equal(adapted, made, kind)
    check_equal(plain, type(made)((), Reference(base.fresh), made.prompt), kind)
