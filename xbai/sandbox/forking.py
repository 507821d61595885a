"""Starting processes where others of the same user may have used up what it may have of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 20.0
UNABLE = 71
"""Exit status of who could not fork: EX_OSERR of sysexits.h."""


def patiently(start: Callable[[], T]) -> T:
    """Call `start` until there is room for its process.

    Raises:
        BlockingIOError: there was none for `PATIENCE_S`.
    """
    deadline, pause = time.monotonic() + PATIENCE_S, 0.01
    while True:
        try:
            return start()
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


def fork() -> int:
    """`os.fork`, patiently; ends this process with `UNABLE` where there stays no room."""
    try:
        return patiently(os.fork)
    except BlockingIOError:
        os._exit(UNABLE)
