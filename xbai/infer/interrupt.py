"""Ctrl-C in an asyncio program."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from typing import Any

EXIT_STATUS = 128 + signal.SIGINT


def run_until_interrupted(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run` whose task is cancelled by Ctrl-C; a second Ctrl-C ends the process at once.

    Raises:
        KeyboardInterrupt: after the cancelled task has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        asyncio.run(main)
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        asyncio.run(_cancel_on_interrupt(main))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


async def _cancel_on_interrupt(main: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(main)

    def interrupt() -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_STATUS))
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
    await task
