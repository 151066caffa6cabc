"""The step's benchmark on the bundled model: that it runs, and that adapters really are in its steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.shard.engine import StepEngine

cpu_step = pytest.importorskip("bench.cpu_step", exc_type=ImportError)
DEMO = Path(cpu_step.__file__).resolve().parents[1] / "loraplex/demo"
ADAPTERS = [str(path) for path in sorted((DEMO / "adapters").iterdir())[:2]]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_step, "STEPS", 3)
    torch.set_num_threads(1)


def test_steps_hold_the_rows_and_adapters_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    run = StepEngine.run
    monkeypatch.setattr(StepEngine, "run", lambda self, plan: results.append(run(self, plan)) or results[-1])
    shard = cpu_step.Shard(str(DEMO / "model"), ADAPTERS)
    times = shard.measure(4, 2, 8)
    assert 0 < times.decode_best <= times.decode_median
    assert times.prefill > 0
    assert {(result.row_count, result.adapter_count) for result in results} == {(4, 2)}
    assert len(results) == 3 + 3
    results.clear()
    shard.measure(2, 0, 8)
    assert {(result.row_count, result.adapter_count) for result in results} == {(2, 0)}


def test_the_profile_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    cpu_step.print_profile(cpu_step.Shard(str(DEMO / "model"), ADAPTERS), 2, 2, 8)
    lines = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.split("|---:|\n")[1].splitlines()
    ]
    spent = {line[0]: float(line[1]) for line in lines if len(line) == 3}
    total = spent.pop("in all")
    assert {*cpu_step.PIECES, "everything between"} == set(spent)
    assert abs(sum(spent.values()) - total) < 0.1
    for piece in ("products with the base's weights", "adapters", "attention", "norms"):
        assert spent[piece] > 0, piece
