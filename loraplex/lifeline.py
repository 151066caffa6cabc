"""A child's side of the lifeline: when its launcher is gone, however it ended, the child ends too."""

from __future__ import annotations

import os
import signal
import threading
import time

VARIABLE = "LORAPLEX_LIFELINE"
"""Set to 1 by the launcher, which then holds the other end of the child's stdin."""
GRACE = 3.0
"""Seconds between SIGTERM to oneself and the hard exit."""


def watch() -> None:
    """Start a thread that ends this process at the end of stdin. Does nothing without a launcher."""
    if os.environ.get(VARIABLE) == "1":
        threading.Thread(target=_end_with_launcher, name="lifeline", daemon=True).start()


def _end_with_launcher() -> None:
    stdin = 0
    while os.read(stdin, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
