"""Starting processes where other programs may have used up what a user or the machine may have of them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 30.0
UNABLE = 71
"""Exit status of who could not fork: EX_OSERR of sysexits.h."""
_SHORTAGES = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
"""That may pass: of processes, memory, open files."""


def patiently(start: Callable[[], T], wait: Callable[[float], object] = time.sleep) -> T:
    """Call `start` until there is room for its process.

    Args:
        start: starts a process.
        wait: for so many seconds between two tries; what it returns, if true, says that there shall be no other.

    Raises:
        OSError: there was no room for `PATIENCE_S`, or something else is wrong.
    """
    deadline, pause = time.monotonic() + PATIENCE_S, 0.01
    while True:
        try:
            return start()
        except OSError as error:
            if error.errno not in _SHORTAGES or time.monotonic() > deadline or wait(pause):
                raise
            pause = min(2 * pause, 1.0)


def fork() -> int:
    """`os.fork`, patiently; ends this process with `UNABLE` where there stays no room."""
    try:
        return patiently(os.fork)
    except OSError:
        os._exit(UNABLE)
