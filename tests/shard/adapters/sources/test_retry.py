from __future__ import annotations

import pytest

from loraplex.shard.adapters.progress import ProgressMeter
from loraplex.shard.adapters.sources.retry import RetryPolicy, TransientFailure, call_with_retry
from loraplex.shard.errors import AdapterFetchFailed, AdapterNotFound


class Flaky:
    """Fails a number of times, then returns 7."""

    def __init__(self, failures: int, retry_after: float | None = None) -> None:
        self.failures = failures
        self.retry_after = retry_after
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise TransientFailure(AdapterFetchFailed(f"failure {self.calls}"), self.retry_after)
        return 7


def test_pauses_double_with_jitter() -> None:
    flaky, pauses = Flaky(3), []
    assert call_with_retry(flaky, RetryPolicy(attempts=4, base_delay=1.0), pauses.append) == 7
    assert flaky.calls == 4
    assert all(base * 0.5 <= pause <= base * 1.5 for base, pause in zip((1, 2, 4), pauses, strict=True))


def test_gives_up_with_the_last_error() -> None:
    flaky, pauses = Flaky(9), []
    with pytest.raises(AdapterFetchFailed, match="failure 4"):
        call_with_retry(flaky, RetryPolicy(attempts=4), pauses.append)
    assert (flaky.calls, len(pauses)) == (4, 3)


@pytest.mark.parametrize(("asked", "paused"), [(5.0, 5.0), (9999.0, 30.0)])
def test_the_servers_wish_is_kept_within_bounds(asked: float, paused: float) -> None:
    pauses: list[float] = []
    call_with_retry(Flaky(1, asked), RetryPolicy(max_delay=30), pauses.append)
    assert pauses == [paused]


def test_other_errors_are_not_retried() -> None:
    calls = []

    def denied() -> None:
        calls.append(1)
        raise AdapterNotFound("no")

    with pytest.raises(AdapterNotFound):
        call_with_retry(denied, RetryPolicy(), lambda pause: None)
    assert len(calls) == 1


def test_progress_is_throttled_but_ends_of_files_are_not() -> None:
    reports: list[tuple[int, int]] = []
    meter = ProgressMeter(lambda done, total: reports.append((done, total)), interval=60)
    meter.total = 300
    for _ in range(100):
        meter.advance(1)
    assert reports == [(1, 300)]
    meter.finish_file(100)
    meter.advance(150)
    meter.restart_file()
    meter.finish_file(200)
    assert reports == [(1, 300), (100, 300), (300, 300)]
