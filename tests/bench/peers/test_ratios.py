"""From turns to ratios and to the table."""

from __future__ import annotations

import json

from bench.peers.ratios import Comparison, Ratio, table
from bench.peers.turns import Turn


def turns(*rates: float) -> list[Turn]:
    return [Turn(rate, first_token=0.25, per_token=0.02) for rate in rates]


def test_a_ratio_is_taken_within_rounds() -> None:
    """The machine was half as fast in the second round, and both were."""
    assert Ratio.of(turns(400, 200, 360), turns(100, 50, 120)) == Ratio(4.0, 3.0, 4.0)


def test_rounds_that_one_of_them_missed_do_not_count() -> None:
    assert Ratio.of(turns(400, 100), turns(100)) == Ratio(4.0, 4.0, 4.0)


def test_the_first_engine_is_not_compared_with_itself_nor_with_one_that_failed() -> None:
    made = Comparison("base", {"ours": turns(300), "slow": turns(100), "failed": []})
    assert made.ratio("ours") is None
    assert made.ratio("failed") is None
    assert made.ratio("slow") == Ratio(3.0, 3.0, 3.0)


def test_nobody_is_compared_with_an_engine_that_failed() -> None:
    assert Comparison("base", {"ours": [], "slow": turns(100)}).ratio("slow") is None


def test_the_table_has_a_row_for_each_engine_and_setting() -> None:
    base = Comparison("base", {"ours": turns(300, 280, 320), "peft": [Turn(70.0), Turn(70.0), Turn(80.0)]})
    mixed = Comparison("mixed", {"ours": turns(200.4), "failed": []})
    assert table([base, mixed]).splitlines()[2:] == [
        "| base | ours | 300.0 (300, 280, 320) | 250.0 | 20.0 |  |",
        "| base | peft | 70.0 (70, 70, 80) |  |  | 4.00 (4.00 to 4.29) |",
        "| mixed | ours | 200.4 (200) | 250.0 | 20.0 |  |",
    ]


def test_every_row_has_the_columns_of_the_head() -> None:
    lines = table([Comparison("base", {"ours": turns(1), "other": turns(2)})]).splitlines()
    assert {line.count("|") for line in lines} == {7}


def test_the_file_has_every_turn() -> None:
    made = Comparison("base", {"ours": turns(300), "slow": [Turn(100.0)]}).json()
    assert json.loads(json.dumps(made)) == {
        "setting": "base",
        "engines": {
            "ours": {
                "turns": [{"tokens_per_second": 300, "first_token": 0.25, "per_token": 0.02}],
                "ratio": None,
            },
            "slow": {
                "turns": [{"tokens_per_second": 100, "first_token": None, "per_token": None}],
                "ratio": {"middle": 3.0, "low": 3.0, "high": 3.0},
            },
        },
    }
