"""A shard on a GPU against PEFT and transformers, and the whole server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from loraplex.kernels.load import load
from loraplex.kernels.ops import Entries, route
from loraplex.shard.adapters.upload import CudaUploader

from ..conformance.bases import Base
from ..conformance.bench import Bench, lora
from ..conformance.test_cuda_kernels import (
    ServeOn,
    test_architectures_fused_or_not_equal_transformers,
    test_each_row_of_a_mixed_batch_equals_its_own_peft_model,
)
from ..kernels.cases import batch, table_of
from ..kernels.conftest import MakeAdapter
from ..kernels.target import Target
from .checkout import CHECKOUT, ROOT

__all__ = [
    "test_architectures_fused_or_not_equal_transformers",
    "test_each_row_of_a_mixed_batch_equals_its_own_peft_model",
]


def test_a_graph_captured_with_one_segment_serves_any_other(
    make_adapter: MakeAdapter, target: Target
) -> None:
    """And a change of the resident adapters behind it."""
    dtype, rows = torch.bfloat16, 40
    table = table_of(make_adapter, dtype)
    ops = target.ops()
    site = ops.site_table((40, 16, 24))
    site[2] = target.adapters(table)[2]
    reserved = ops.reserve(rows=rows, slots=16, hidden=rows * 768)
    y, x = batch(rows, dtype)
    fixed_y, fixed_x = y.to(target.device), x.to(target.device)
    assert ops.fill(reserved, route([((2, 1.0),)] * rows), rows)

    def work() -> torch.Tensor:
        out = fixed_y.clone()
        ops.start_lora(fixed_x, reserved, site).add_to(out)
        return out

    work()
    backend = load(target.device)
    assert backend.capture is not None
    captured = backend.capture()(work)
    site.update(target.adapters(table))
    for entries in ([((row % 11, 1.0),) for row in range(rows)], [()] * rows, [((2, 1.0),)] * rows):
        typed: list[Entries] = list(entries)
        assert ops.fill(reserved, route(typed), rows)
        captured.replay()
        eager = fixed_y.clone()
        ops.start_lora(fixed_x, ops.place(route(typed, decode_rows=rows)), site).add_to(eager)
        assert torch.equal(captured.output, eager)


def test_an_adapter_is_whole_when_its_upload_returns(
    bases: Callable[[str], Base], serve_on: ServeOn, tmp_path: Path, device: torch.device
) -> None:
    base = bases("llama")
    (tmp_path / "spool").mkdir()
    served = serve_on(base, tmp_path / "spool")
    made = lora(r=3)(Bench(base, tmp_path / "adapter", bases, seed=1))
    [(directory, _)] = made.adapters
    host = served.read(served.pack(directory), pin=True)
    uploader = CudaUploader(device)
    placed = uploader.upload(host)
    uploader.hand_over(placed)
    assert placed.packed.buffer.is_cuda
    assert torch.equal(placed.packed.buffer.cpu(), host.buffer)


def test_the_demo_mixes_adapters_on_the_gpu(device: torch.device) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "loraplex", "demo"],
        cwd=ROOT,
        env=os.environ | CHECKOUT | {"LORAPLEX_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert int(answer.stdout.strip().splitlines()[-1].removeprefix("adapters in one step: ")) >= 4
