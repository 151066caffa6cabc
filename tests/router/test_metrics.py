"""What a scrape shows."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from loraplex.proto import shard_pb2
from loraplex.router.group import Step
from loraplex.router.metrics import Histogram, Metrics, Snapshot
from loraplex.router.steps import Settled


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_steps_are_counted_by_the_shards_figures() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for rows, adapters, decode in ((10, 4, 8), (3, 2, 3), (5, 0, 0)):
        result = shard_pb2.StepResult(
            last=True, row_count=rows, adapter_count=adapters, device_micros=500_000
        )
        metrics.answered(result, Step(1, {}, {}, [], decode), Settled(tokens=rows, steady=rows), 0.02)
    assert sample(registry, "loraplex_step_rows_max") == 10
    assert sample(registry, "loraplex_step_adapters_max") == 4
    assert sample(registry, "loraplex_steps_total") == 3
    assert sample(registry, "loraplex_decode_steps_total") == 2
    assert sample(registry, "loraplex_decode_rows_total") == 11
    assert sample(registry, "loraplex_step_rows_total") == 18
    assert sample(registry, "loraplex_device_seconds_total") == pytest.approx(1.5)
    assert sample(registry, "loraplex_generated_tokens_total") == 18
    assert sample(registry, "loraplex_inter_token_latency_seconds_count") == 18
    assert sample(registry, "loraplex_inter_token_latency_seconds_sum") == pytest.approx(18 * 0.02)


def test_a_part_of_an_answer_is_no_step() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.answered(shard_pb2.StepResult(row_count=3), Step(1, {}, {}, [], 1), Settled(), 0.1)
    assert sample(registry, "loraplex_steps_total") == 0


def test_busy_time_is_time_with_a_step_in_flight() -> None:
    metrics = Metrics(CollectorRegistry())
    for in_flight, now in ((True, 1.0), (True, 2.0), (False, 4.0), (False, 9.0), (True, 10.0), (False, 10.5)):
        metrics.busy(in_flight, now)
    assert metrics.busy_seconds == pytest.approx(3.5)


def test_gauges_are_read_at_the_scrape() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.snapshot = lambda: Snapshot(running=3, waiting=2, blocks_free=75, blocks_used=25, ready=True)
    assert sample(registry, "loraplex_requests_running") == 3
    assert sample(registry, "loraplex_requests_waiting") == 2
    assert sample(registry, "loraplex_kv_usage_ratio") == 0.25
    assert sample(registry, "loraplex_ready") == 1


def test_outcomes_are_labelled_and_nothing_else_is_unbounded() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.outcomes["stop"] += 2
    metrics.refusals["overloaded"] += 1
    text = generate_latest(registry).decode()
    assert 'loraplex_requests_finished_total{outcome="stop"} 2.0' in text
    assert sample(registry, "loraplex_requests_refused_total", code="overloaded") == 1
    labels = {part.split("=")[0] for line in text.splitlines() if "{" in line for part in line.split("{")[1:]}
    assert labels <= {"outcome", "code", "le", "stage"}


def test_histogram_bounds_are_inclusive_and_cumulative() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, times)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 3), ("+Inf", 6)]
    assert histogram.total == pytest.approx(30.5)
