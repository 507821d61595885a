"""The processes behind the front: started, watched, and started again when they have died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import httpx

from xbai.client.replicas import Replica, Replicas
from xbai.errors import first_error
from xbai.serve.front.copy_process import CopyProcess

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
QUICK_S = 60.0
"""Who dies within so much of being ready, or was never, has died quickly."""
POLL_S = 0.2
POLL_TIMEOUT_S = 10.0

StartCopy = Callable[[], Awaitable[CopyProcess]]


class Copies:
    """Keeps copies running.

    Args:
        starts: of each copy, what starts it.
        max_in_flight: requests that one is given at once.
        client: has the API key.

    Attributes:
        replicas: those that are ready.
        restarts: how often one was started again.
    """

    def __init__(self, starts: Sequence[StartCopy], max_in_flight: int, client: httpx.AsyncClient) -> None:
        self.replicas = Replicas([], max_in_flight)
        self.restarts = 0
        self._starts = starts
        self._max_in_flight = max_in_flight
        self._client = client
        self._running: set[CopyProcess] = set()
        self._ready_once = False
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`, and all have ended.

        Raises:
            UserError: the model cannot be loaded, so that none was ever ready.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for number, start in enumerate(self._starts):
                    group.create_task(self._keep_running(str(number), start))
        except ExceptionGroup as errors:
            raise first_error(errors) from None

    def stop(self) -> None:
        """Have all end what they have begun."""
        self._stopping.set()
        for process in self._running:
            process.stop()

    def kill(self) -> None:
        """End them at once."""
        for process in self._running:
            process.kill()

    async def _keep_running(self, name: str, start: StartCopy) -> None:
        quick_deaths = 0
        while not self._stopping.is_set():
            lived_s = await self._live(name, start)
            if self._stopping.is_set():
                return
            quick_deaths = quick_deaths + 1 if lived_s < QUICK_S else 0
            pause = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (quick_deaths - 1)) if quick_deaths else 0.0
            logger.warning("replica %s is started again in %g s", name, pause)
            await self._pause(pause)
            self.restarts += not self._stopping.is_set()

    async def _live(self, name: str, start: StartCopy) -> float:
        """One life of a copy: seconds that it was ready."""
        try:
            process = await start()
        except OSError as error:
            logger.error("replica %s cannot be started: %s", name, error)
            return 0.0
        self._running.add(process)
        if self._stopping.is_set():
            process.stop()
        replica = Replica(process.base_url, self._max_in_flight, name)
        clock = asyncio.get_running_loop().time
        welcoming = asyncio.create_task(self._welcome(replica))
        try:
            status = await process.wait()
        finally:
            welcoming.cancel()
            self._running.remove(process)
            if replica in self.replicas.all:
                self.replicas.all.remove(replica)
        if not self._stopping.is_set():
            why = process.user_error()
            if why is not None and not self._ready_once:
                raise why
            logger.error("replica %s has ended with status %d%s", name, status, f": {why}" if why else "")
        return clock() - welcoming.result() if welcoming.done() and not welcoming.cancelled() else 0.0

    async def _welcome(self, replica: Replica) -> float:
        """Have it take part as soon as it is ready; when that was."""
        while not await self._is_ready(replica):
            await asyncio.sleep(POLL_S)
        logger.info("replica %s is ready", replica.name)
        self._ready_once = True
        self.replicas.all.append(replica)
        return asyncio.get_running_loop().time()

    async def _is_ready(self, replica: Replica) -> bool:
        try:
            return (await self._client.get(f"{replica.base_url}/ready", timeout=POLL_TIMEOUT_S)).is_success
        except httpx.TransportError:
            return False

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return
