"""The policy service as several copies behind one port: `--replicas`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from fastapi import FastAPI

from xbai.api_key import ApiKeyOptions
from xbai.client.pool import open_client
from xbai.serve.front.app import create_front_app
from xbai.serve.front.copies import Copies
from xbai.serve.front.copy_process import CopyProcess
from xbai.serve.front.gpus import gpu_shares
from xbai.serve.limits import Admission, Limits
from xbai.serve.monitoring import Metrics
from xbai.serve.options import PolicyOptions
from xbai.serve.server import DrainingServer, listen

KILL_AFTER_S = 30.0
"""What still runs so long after the shutdown time-out hangs."""


def run_replicated_service(options: PolicyOptions, replicas: int, with_score_routes: bool) -> None:
    """Run `replicas` copies of the policy service behind one port until SIGTERM or SIGINT.

    Raises:
        UserError: there are too few GPUs, the port is taken, or the model cannot be loaded.
    """
    shares = gpu_shares(replicas, options.tensor_parallel_size or 1)
    limits = Limits.of(options)
    of_a_copy = replace(options, api_key=ApiKeyOptions(limits.api_key))
    client = open_client(limits.api_key)
    starts = [partial(CopyProcess.start, of_a_copy, with_score_routes, gpus) for gpus in shares]
    with listen(options.ip, options.port) as listener:
        admission = Admission(replicas * limits.max_pending)
        service = ReplicatedService(Copies(starts, limits.max_pending, client), limits, admission)
        app = create_front_app(
            service.copies.replicas,
            client,
            limits,
            admission,
            service.metrics,
            options.openai.effort,
            service.lifespan,
            options.openai.page,
        )
        DrainingServer(app, service).run_on(listener)
    if service.error is not None:
        raise service.error from None


class ReplicatedService:
    """The life of the copies, and of the front with them.

    Attributes:
        error: why they have ended unasked.
    """

    def __init__(self, copies: Copies, limits: Limits, admission: Admission) -> None:
        self.copies = copies
        self.limits = limits
        self._admission = admission
        self.metrics = Metrics()
        self.metrics.watch("xbai_replicas_up", "Copies that are ready", lambda: len(copies.replicas.all))
        self.metrics.watch("xbai_replica_restarts", "Copies started again", lambda: copies.restarts)
        self.error: BaseException | None = None
        self._deadline: float | None = None
        self._told = False

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the copies."""
        self._running = asyncio.create_task(self.copies.run())
        yield
        await asyncio.wait({self._running})
        self.error = self._running.exception()

    def stop(self) -> None:
        """Take no more work. What there is may go on for the shutdown time-out, which the copies see to."""
        self._admission.closed = True
        self._deadline = time.monotonic() + self.limits.shutdown_timeout_s + KILL_AFTER_S

    @property
    def stopping(self) -> bool:
        """`stop` was called."""
        return self._deadline is not None

    def finished(self) -> bool:
        """All copies have ended: each after its last answer."""
        if self._deadline is not None and not self._told:
            self._told = True
            self.copies.stop()
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.copies.kill()
        return self._running.done()
