"""What the benchmark on a GPU measures, on a CPU and at small sizes: that it is what it is said to be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from bench import gpu, gpu_model, gpu_operators
from bench.gpu_model import Served, decode_batch, llama_8b, prompt_batch, random_adapter
from bench.gpu_operators import SITES, Case, Point, points
from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.cuda import CudaLoraOps
from loraplex.kernels.cuda_decoder import CudaDecoderOps
from loraplex.kernels.load import Backend
from loraplex.kernels.side_stream import InOrder
from loraplex.shard import load
from loraplex.shard.adapters.upload import SharedUploader
from loraplex.shard.batch import Batch

from ..conformance.test_cuda_kernels import Repeated
from ..kernels.emulation.launcher import EmulatedLauncher, missing
from ..shard.test_attention_cuda import PlainVarlen

CPU = torch.device("cpu")
CONTEXT, ROWS = 40, 4
ADAPTERS = 2


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def served() -> Served:
    torch.manual_seed(0)
    served = Served.of(config(), CPU, rows=ROWS, context=CONTEXT, slots=4, adapter_bytes=1 << 24)
    for slot in range(ADAPTERS):
        served.load(slot, random_adapter(served.assembled.layout, 8, CPU))
    return served


def logits(served: Served, batch: Batch) -> torch.Tensor:
    return served.assembled.model.forward(batch).float()


def test_the_shapes_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = gpu_model.LlamaForCausalLM(llama_8b())
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


def test_an_adapter_changes_every_linear_but_the_head_and_has_its_true_size(served: Served) -> None:
    adapter = random_adapter(served.assembled.layout, 8, CPU)
    widths = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 96), "up": (64, 96)}
    values = sum(sum(shape) for shape in [*widths.values(), (96, 64)]) * 8 * 2
    assert adapter.modules == 7 * 2
    assert values * 2 <= adapter.nbytes <= values * 2 + 128 * 22
    assert adapter.is_plain


def test_a_decode_step_after_its_prompts_is_the_next_token_of_each(served: Served) -> None:
    """Same rows in one go: the batches name the same tokens, positions and blocks."""
    entries = [((0, 1.0),), ((1, 1.0),), (), ((0, 1.0),)]
    whole = prompt_batch(entries, CONTEXT)
    together = logits(served, whole)
    decode = decode_batch(entries, CONTEXT)
    last = whole.token_ids.view(ROWS, CONTEXT)[:, -1]
    step = logits(served, replace(decode, token_ids=last))
    torch.testing.assert_close(step, together, rtol=0.1, atol=0.1)
    assert (together[0] - together[3]).abs().max() > 0.1


@pytest.mark.parametrize("make", [decode_batch, prompt_batch])
def test_adapters_show(served: Served, make: type[Batch]) -> None:
    plain = logits(served, make([()] * ROWS, CONTEXT))
    adapted = logits(served, make([((row % ADAPTERS, 1.0),) if row else () for row in range(ROWS)], CONTEXT))
    assert adapted[0].equal(plain[0])
    assert all(not adapted[row].equal(plain[row]) for row in range(1, ROWS))
    assert adapted.isfinite().all()


@pytest.mark.parametrize("adapters", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_form_of_the_operator_computes_the_same(
    parts: int, adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_operators, "CACHE_BYTES", 1)
    monkeypatch.setitem(SITES, "small", (48, 32, parts))
    torch.manual_seed(0)
    case = Case(Point("small", 4, adapters, 8), CpuLoraOps(), CPU)  # type: ignore[arg-type]
    assert case.sets > 1
    want = case.result(case.ours)
    for form in (case.loop, case.peft):
        assert (case.result(form) - want).norm() < 0.02 * want.norm()


def test_the_points_are_the_grid_that_is_asked_for() -> None:
    found = list(points())
    assert {point.rows for point in found} == {1, 8, 32, 128}
    assert {point.rank for point in found} >= {8, 16, 64}
    assert all(point.rows % point.adapters == 0 for point in found)


BESIDES = ("msgspec", "typer", "prometheus_client", "uvloop", "grpc_health", "grpc_reflection", "grpc_status")
"""What the server needs and a measurement does not."""


def test_it_runs_where_little_is_installed() -> None:
    """As far as a machine without a GPU lets it."""
    script = (
        "import os, runpy, sys\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        f"sys.modules.update(dict.fromkeys({BESIDES}))\n"
        "runpy.run_module('bench.gpu', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stderr == "bench.gpu: torch sees no CUDA device\n"
    assert run.returncode == 2


def test_a_run_prints_its_tables_and_yields_every_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernels run on the CPU, where times mean nothing."""
    if (why := missing()) is not None:
        pytest.skip(why)
    launcher = EmulatedLauncher()

    def once(work: Callable[[], object], **_: int) -> float:
        with torch.inference_mode():
            work()
        return 1.0

    def backend(device: torch.device) -> Backend:
        return Backend(CudaLoraOps(launcher, device, InOrder()), CudaDecoderOps(launcher), lambda: Repeated)

    for name, stand_in in {
        "copy_rate": lambda device: 1e9,
        "milliseconds": once,
        "wall_milliseconds": once,
        "llama_8b": lambda layers: config(),
        "CudaUploader": lambda device: SharedUploader(),
        "operators": lambda device: [],
        "CONTEXT": CONTEXT,
        "ROWS": (2, 4),
        "SLOTS": 13,
        "RANK_64": 4,
        "ADAPTED": ((2, 1, 16), (2, 2, 64), (4, 4, 16)),
    }.items():
        monkeypatch.setattr(gpu, name, stand_in)
    monkeypatch.setattr(gpu_model, "load", backend)
    monkeypatch.setattr(load, "flash_attention", PlainVarlen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a CPU")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    figures = dict(gpu.measure(["step", "prefill", "load", "operators"], 2, CPU))
    assert figures.keys() >= {"device", "copy_bytes_per_s", "base_2", "base_4", "base_with_residents"}
    assert figures.keys() >= {"added_2x1r16", "added_2x2r64", "added_4x4r16", "prefill_2048", "load"}
    assert figures["base_4"]["floor_ms"] > figures["base_2"]["floor_ms"] > 0
    assert json.loads(json.dumps(figures)) == figures
    printed = capsys.readouterr().out
    assert "| 4 | 4 | 16 |" in printed
    assert "100.0 % of base" in printed
