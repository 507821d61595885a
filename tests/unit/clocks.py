"""Time in tests: how long they wait for what is to come, and what work costs."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 60.0
"""For what takes a second or two."""


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as `condition` holds; a test that waits in vain fails with `what` was to hold."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.01)


def cpu_seconds(work: Callable[..., object], *arguments: object) -> float:
    """CPU time of this thread that `work(*arguments)` takes: what others do on the machine hardly adds to it."""
    started = time.thread_time()
    work(*arguments)
    return time.thread_time() - started
