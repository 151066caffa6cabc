"""The order of turns, who is out, and what is said and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.errors import BenchFailed
from bench.peers import run
from bench.peers.load import SETTINGS, Load, Setting
from bench.peers.ratios import Comparison
from bench.peers.run import Bench
from bench.peers.turns import Turn


class FakeRunner:
    """Notes its turns; fails from round `fails` on."""

    def __init__(self, name: str, rate: float, log: list[tuple[str, int, bool]], fails: int = 99) -> None:
        self.name = name
        self._rate, self._log, self._fails, self._count = rate, log, fails, 0

    def turn(self, load: Load, *, warm_up: bool) -> Turn:
        self._count += 1
        if self._count >= self._fails:
            raise BenchFailed(f"{self.name}: the device is lost")
        self._log.append((self.name, load.seed, warm_up))
        return Turn(self._rate)


def bench(root: Path, rounds: int = 3) -> Bench:
    return Bench(servers=(), with_peft=False, root=root, rounds=rounds, threads=2, settle=0)


def test_every_round_has_one_turn_of_each_in_alternating_order(tmp_path: Path) -> None:
    log: list[tuple[str, int, bool]] = []
    runners = [FakeRunner("a", 2, log), FakeRunner("b", 1, log)]
    turns = bench(tmp_path)._turns(SETTINGS[0], runners)
    assert [name for name, _, _ in log] == ["a", "b", "b", "a", "a", "b"]
    assert [warm for _, _, warm in log] == [True, True, False, False, False, False]
    seeds = [seed for _, seed, _ in log]
    assert seeds[0::2] == seeds[1::2]
    assert len(set(seeds)) == 3
    assert turns == {"a": [Turn(2)] * 3, "b": [Turn(1)] * 3}


def test_an_engine_that_fails_is_out_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[tuple[str, int, bool]] = []
    runners = [FakeRunner("a", 2, log, fails=2), FakeRunner("b", 1, log)]
    turns = bench(tmp_path)._turns(SETTINGS[0], runners)
    assert {name: len(made) for name, made in turns.items()} == {"a": 1, "b": 3}
    assert capsys.readouterr().err.count("base a is out: a: the device is lost\n") == 1


def test_the_table_is_printed_and_the_file_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(self: Bench, setting: Setting) -> Comparison:
        return Comparison(setting.name, {"loraplex": [Turn(300)], "vllm": [Turn(100)]})

    monkeypatch.setattr(Bench, "compare", compare)
    path = tmp_path / "out.json"
    assert run.main(["--peers", "peft", "--settings", "mixed,base", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| mixed | vllm | 100.0 (100) |  |  | 3.00 (3.00 to 3.00) |" in printed
    content = json.loads(path.read_text())
    assert [each["setting"] for each in content["comparisons"]] == ["mixed", "base"]
    assert content["settings"][0]["load"]["concurrency"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "vllm,sglang"], "there is no peer 'sglang'"),
        (["--settings", "huge", "--peers", "peft"], "there is no setting 'huge'"),
        (
            ["--peers", "vllm,llama.cpp"],
            "python -m bench.peers.install --peers vllm,llama.cpp",
        ),
        (["--peers", "peft", "--rounds", "0"], "--rounds must be at least 1"),
        (["--peers", "peft", "--json", "/nowhere/file"], "--json /nowhere/file: no such folder"),
        (["--peers", "peft", "--root", "/dev/null/x"], "--root /dev/null/x cannot be made: Not a directory"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--root", str(tmp_path), *arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
