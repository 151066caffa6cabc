"""Trying again: exponential backoff with jitter, bounded in tries and in time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from ...errors import ShardError

Result = TypeVar("Result")


class RetryPolicy(msgspec.Struct, frozen=True):
    """How often and how soon a failed request is made again."""

    attempts: int = 4
    base_delay: float = 0.5
    """Seconds before the second try; doubles with each further one."""
    max_delay: float = 30.0
    """Seconds, also where the server asks for a longer pause."""

    def delay(self, failures: int, asked: float | None) -> float:
        """Seconds to wait after this many failures; `asked` is the server's Retry-After."""
        backoff = self.base_delay * 2.0 ** (failures - 1) * random.uniform(0.5, 1.5)
        return min(self.max_delay, max(backoff, asked or 0.0))


class TransientFailure(Exception):
    """A request failed in a way that may pass. `error` is what to raise when it does not."""

    def __init__(self, error: ShardError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


def call_with_retry(
    operation: Callable[[], Result], policy: RetryPolicy, sleep: Callable[[float], None] = time.sleep
) -> Result:
    """Call `operation` until it returns, fails for good, or has failed `policy.attempts` times."""
    for failures in range(1, policy.attempts):
        try:
            return operation()
        except TransientFailure as failure:
            sleep(policy.delay(failures, failure.retry_after))
    try:
        return operation()
    except TransientFailure as failure:
        raise failure.error from failure
