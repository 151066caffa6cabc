"""The benchmark's figures, tables and plots from records with known times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from loraplex.loadtest.client import Failure, Record
from loraplex.loadtest.measure import Run
from loraplex.loadtest.plan import Point, Sweep, Target
from loraplex.loadtest.plots import draw
from loraplex.loadtest.report import Quantiles, Report, requests_json, summary
from loraplex.loadtest.specs import Closed
from loraplex.loadtest.workloads import Request, Trace

OURS, OTHER = Target("ours", "http://h:1"), Target("other", "http://h:2")
ONE = Sweep(None, (Point(Closed(), 2),))


def record(first: float = 1.0, step: float = 0.5, tokens: int = 5, *, adapter: int | None = None) -> Record:
    """Sent at 100, the first token after `first`, the others `step` apart, each in its own chunk."""
    times = tuple(100 + first + step * index for index in range(tokens))
    return Record(Request(0.0, adapter, 8, tokens), 100.0, times, times[-1], tokens, "length", None)


def failed(kind: str, message: str) -> Record:
    return Record(Request(0.0, 1, 8, 5), 100.0, (), 101.0, None, None, Failure(kind, message))


def run(
    records: Sequence[Record], seconds: float, target: Target = OURS, point: Point = ONE.points[0]
) -> Run:
    trace = Trace(tuple(record.request for record in records), 1)
    return Run(target, point, trace, records=list(records), seconds=seconds, started=100.0)


def test_a_records_times() -> None:
    made = record(first=2.0, step=0.25, tokens=5)
    assert made.first_token == pytest.approx(2.0)
    assert made.per_token == pytest.approx(0.25)
    assert made.longest_gap == pytest.approx(0.25)
    assert made.seconds == pytest.approx(3.0)
    lone = record(tokens=1)
    assert (lone.first_token, lone.per_token, lone.longest_gap) == (1.0, None, None)


def test_time_per_token_counts_tokens_and_not_chunks() -> None:
    """Nine tokens in three chunks: (105 - 101) / 8."""
    made = Record(Request(0.0, None, 8, 9), 100.0, (101.0, 102.0, 105.0), 105.0, 9, "length", None)
    assert made.per_token == pytest.approx(0.5)
    assert made.longest_gap == pytest.approx(3.0)


def test_quantiles_interpolate_and_leave_out_what_is_unknown() -> None:
    made = Quantiles.of([*(float(value) for value in range(101)), None])
    assert (made.p50, made.p90, made.p99) == (50.0, 90.0, 99.0)
    assert Quantiles.of([1.0, 2.0]).p90 == pytest.approx(1.9)
    assert Quantiles.of([None]) == Quantiles(None, None, None)


def test_rates_pool_the_rounds_and_count_only_complete_answers() -> None:
    made = summary([run([record()] * 3, 2.0), run([record(), failed("HTTP 503", "full")], 3.0)], 6.0)
    assert (made.finished, made.failed, made.unsent) == (4, 1, 0)
    assert made.requests_per_second == pytest.approx(4 / 5)
    assert made.tokens_per_second == pytest.approx(20 / 5)
    assert made.tokens_per_second_by_round == pytest.approx((15 / 2, 5 / 3))


def test_attainment_and_satisfaction_count_a_failure_as_missed() -> None:
    records = [record(first=first) for first in (0.0, 3.0, 6.0, 9.0)]
    made = summary([run([*records, failed("silence", "nothing came")], 1.0)], 6.0)
    assert made.attained == pytest.approx(2 / 5)
    assert made.satisfaction == pytest.approx((1 + 0.75 + 0 + 0 + 0) / 5)
    shorter = summary([run(records, 1.0)], 3.5)
    assert shorter.attained == pytest.approx(2 / 4)


def test_failures_are_counted_by_kind_with_their_first_message() -> None:
    kinds = [failed("HTTP 503", "one"), failed("early end", "two"), failed("early end", "three")]
    made = summary([run(kinds, 1.0)], 6.0)
    assert list(made.errors.items()) == [("early end", 2), ("HTTP 503", 1)]
    assert made.first_messages == {"HTTP 503": "one", "early end": "two"}
    text = Report.of(ONE, [run(kinds, 1.0)], 6.0).text()
    assert "ours: 2 × early end, the first: two" in text
    assert "ours: 1 × HTTP 503, the first: one" in text


def test_tables_for_one_server() -> None:
    made = Report.of(ONE, [run([record(adapter=0), record(adapter=1)], 2.0)], 6.0)
    lines = dict(line.rsplit("  ", 1) for line in made.text().splitlines() if line.count("  "))
    rows = {label.strip(): value for label, value in lines.items()}
    assert rows["requests finished"] == "2"
    assert rows["adapters asked for"] == "2"
    assert rows["output tokens/s"] == "5.0"
    assert "first token (TTFT) p50 p90 p99, ms  1000.0  1000.0  1000.0" in made.text()
    assert "per token (TPOT) p50 p90 p99, ms    500.0  500.0  500.0" in made.text()
    assert "first token within 6 s              100.0%" in made.text()
    assert "ratios" not in made.text()
    assert not made.any_without_answer


def test_ratios_are_to_the_first_server() -> None:
    runs = [
        run([record(first=1.0, step=0.5)], 2.0),
        run([record(first=2.0, step=0.25)], 1.0, OTHER),
    ]
    text = Report.of(ONE, runs, 6.0).text()
    assert "ours    1.00      1.00      1.00" in text
    assert "other   2.00      2.00      0.50" in text


def sweeping() -> Report:
    points = (Point(Closed(), 1), Point(Closed(), 8))
    runs = [
        run([record(first=factor)] * 2, factor, target, point)
        for factor, (target, point) in enumerate(
            ((target, point) for target in (OURS, OTHER) for point in points), start=1
        )
    ]
    return Report.of(Sweep("adapters", points), runs, 6.0)


def test_a_sweep_has_a_table_for_each_point_and_says_which() -> None:
    text = sweeping().text()
    assert text.index("adapters 1") < text.index("adapters 8") < text.index("ratios")
    assert "1         other   0.33      3.00      1.00" in text
    assert [entry["value"] for entry in sweeping().json()] == [1, 8]


def test_plots_are_drawn(tmp_path: Path) -> None:
    paths = draw(sweeping(), tmp_path / "new" / "plots")
    assert [path.name for path in paths] == ["throughput.png", "latency.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_leaves_out_a_server_that_answered_nothing(tmp_path: Path) -> None:
    points = (Point(Closed(), 1),)
    runs = [run([record()], 1.0), run([failed("HTTP 500", "")], 1.0, OTHER)]
    for made in runs:
        made.point = points[0]
    report = Report.of(Sweep("adapters", points), runs, 6.0)
    assert report.any_without_answer
    assert all(path.stat().st_size for path in draw(report, tmp_path))
    assert "other   0.00" in report.text()


def test_a_point_that_was_not_reached_is_left_out() -> None:
    interrupted = run([record()] * 10, 1.0)
    del interrupted.records[1:]
    points = (ONE.points[0], Point(Closed(), 8))
    report = Report.of(Sweep("adapters", points), [interrupted], 6.0)
    assert len(report.points) == 1
    assert "cut off                             9\n" in report.text()
    assert Report.of(ONE, [], 6.0).any_without_answer


def test_a_late_client_is_named() -> None:
    late = run([record()], 1.0)
    late.late = 0.5
    assert "ours: the client sent up to 0.50 s late" in Report.of(ONE, [late], 6.0).text()


def test_requests_for_the_file_have_times_from_the_start_of_their_run() -> None:
    [made] = requests_json(ONE, [run([record(adapter=1)], 2.0)])
    [request] = made["requests"]
    assert request["sent"] == 0.0
    assert request["ended"] == pytest.approx(3.0)
    assert (request["adapter"], request["tokens"], request["chunks"], request["failure"]) == (1, 5, 5, None)
