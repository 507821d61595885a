"""One copy of the policy service in a process of its own: how the front starts it, and what runs in it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Self

import xbai
from xbai.errors import UserError
from xbai.logs import configure_logging
from xbai.serve.front.gpus import VISIBLE_GPUS
from xbai.serve.options import PolicyOptions
from xbai.serve.server import leave, listen

USER_ERROR = 2
"""Exit status of commands after a `UserError`."""
HERE = "127.0.0.1"

logger = logging.getLogger(__name__)


class CopyProcess:
    """A copy that has been started.

    Attributes:
        base_url: where it answers.
    """

    def __init__(self, base_url: str, process: asyncio.subprocess.Process, line: Connection) -> None:
        self.base_url = base_url
        self._process = process
        self._line = line

    @classmethod
    async def start(cls, options: PolicyOptions, with_score_routes: bool, gpus: str | None) -> Self:
        """Start one.

        Args:
            options: of the service; a copy listens on a port of its own all the same.
            with_score_routes: see `run_policy_service`.
            gpus: its `CUDA_VISIBLE_DEVICES`; None leaves what this process has.
        """
        ours, theirs = Pipe()
        search_path = [str(Path(xbai.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))}
        # It inherits the socket: nobody else can take the port, and once the copy has died, the port refuses.
        with theirs, listen(HERE, 0) as listener:
            fds = theirs.fileno(), listener.fileno()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", f"from xbai.serve.front.copy_process import main; main{fds}"),
                pass_fds=fds,
                stdin=asyncio.subprocess.DEVNULL,
                # A group of its own: Ctrl-C is the front's to handle, and what the copy has started dies with it.
                start_new_session=True,
                env=environment if gpus is None else {**environment, VISIBLE_GPUS: gpus},
            )
            ours.send((options, with_score_routes))
            return cls(f"http://{HERE}:{listener.getsockname()[1]}", process, ours)

    async def wait(self) -> int:
        """Its exit status, and nothing of it is left. Cancelled, it kills it."""
        try:
            return await self._process.wait()
        finally:
            self.kill()

    def stop(self) -> None:
        """Have it end what it has begun, and itself."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it, and its workers, which would keep their GPUs."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def user_error(self) -> UserError | None:
        """Why it could not serve, once it has ended, where that is the user's to mend."""
        with suppress(EOFError, OSError):
            if self._line.poll():
                return UserError(self._line.recv())
        return None


def main(line: int, listener: int) -> None:
    """Serve on the inherited listener until a signal comes, or until the front is gone."""
    front = Connection(line)
    options, with_score_routes = front.recv()
    Thread(target=_end_with, args=(front,), daemon=True).start()
    configure_logging(options.log_format)
    from xbai.serve.policy import run_policy_service

    try:
        run_policy_service(options, with_score_routes, socket.socket(fileno=listener))
    except UserError as error:
        front.send(str(error))
        sys.exit(USER_ERROR)


def _end_with(front: Connection) -> None:
    """However the front ends, its end of the line closes."""
    with suppress(EOFError, OSError):
        front.recv()
    logger.error("the front is gone")
    leave(1)
