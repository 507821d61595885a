"""The service of `xbai serve` as a Ray Serve application: copies of the model on the machines of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from xbai.api_key import ApiKeyOptions
from xbai.errors import UserError, one_line
from xbai.logs import configure_logging
from xbai.model_folder import check_model_folder
from xbai.options import parse_options
from xbai.serve.app import Service
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.options import OnRayOptions
from xbai.serve.policy import create_policy_app, engine_loader
from xbai.serve.server import KEEP_ALIVE_S, listen

logger = logging.getLogger(__name__)

APPLICATION = "xbai"
CANDIDATES = "candidates"
POLL_S = 0.2
CONNECT_TIMEOUT_S = 10.0
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0


@serve.ingress()
class Copy:
    """One copy of the model, in an actor of its own.

    Args:
        options: of its service. Ray listens, on every machine, and not the copy.
    """

    def __init__(self, options: OnRayOptions) -> None:
        configure_logging(options.log_format)
        thread, limits = EngineThread(engine_loader(options)), Limits.of(options)
        self._app = create_policy_app(thread, options.model_path, limits, options.openai, with_score_routes=True)
        self._service: Service = self._app.state.service

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What answers. Its life begins after this, and so does the model's loading."""
        return self._app

    async def check_health(self) -> None:
        """Asked once after the start, without a time limit, before it gets any request; then ever again.

        Raises:
            UserError, ServiceError: the model cannot be loaded, or is dead. Ray then starts another copy.
        """
        thread = self._service.thread
        while thread.alive and not thread.ready:
            await asyncio.sleep(POLL_S)
        if thread.loading_error is not None:
            raise thread.loading_error
        thread.check_ready()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What it is at."""
        return {CANDIDATES: self._service.admission.pending}


def wanted_copies(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """So many that each has `target_candidates` to write. Ray rounds, bounds and delays it.

    Requests are no measure: one may ask for a single candidate, and the next for 32.
    """
    of_copies: Mapping[Any, float] = (context.aggregated_metrics or {}).get(CANDIDATES, {})
    config: AutoscalingConfig = context.config  # type: ignore[assignment]  # Ray hands it to every policy.
    return sum(of_copies.values()) / config.get_target_ongoing_requests(), {}


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application for `serve run xbai.serve.on_ray:build model_path=... replicas=4`, and for its YAML files.

    Args:
        arguments: options of `xbai serve-on-ray`, by name, flags as `no_page=true`. Those of Ray's proxies (ip, port)
            have no effect.

    Raises:
        UserError: one is unknown, or has no such value.
    """
    said = {name: str(value) for name, value in arguments.items() if str(value).lower() != "false"}
    given = [f"--{name}" if value.lower() == "true" else f"--{name}={value}" for name, value in said.items()]
    return application(parse_options(OnRayOptions, given))


def application(options: OnRayOptions) -> serve.Application:
    """Copies of the model, as many as the options say; their GPUs are Ray's to find.

    Raises:
        UserError: of options that cannot be followed.
    """
    check_model_folder(options.model_path)
    gpus = options.gpus_per_replica
    if gpus is None:
        gpus = (options.tensor_parallel_size or 1) if _has_gpus() else 0
    deployment = serve.deployment(
        name="copy",
        **_number_of_copies(options),
        ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": gpus},
        # The service itself refuses, by candidates, what is too much.
        max_ongoing_requests=options.max_pending + 1,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=options.shutdown_timeout,
    )
    # Files with the key are on this machine alone.
    return deployment(Copy).bind(replace(options, api_key=ApiKeyOptions(options.api_key.read())))


def _number_of_copies(options: OnRayOptions) -> dict[str, Any]:
    fewest, most = options.replicas or 1, options.max_replicas
    if most is None:
        return {"num_replicas": fewest}
    if most < fewest:
        raise UserError(f"--max_replicas {most}: fewer than --replicas {fewest}")
    scaled = AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        target_ongoing_requests=options.target_candidates,
        policy=AutoscalingPolicy(policy_function=wanted_copies),
    )
    return {"autoscaling_config": scaled}


def _has_gpus() -> bool:
    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) > 0
    # `serve run` builds the application before it joins the cluster.
    return torch.cuda.is_available()


def run_on_ray(options: OnRayOptions) -> None:
    """Serve on the cluster that `RAY_ADDRESS` names, or on one of this machine alone, until SIGTERM or SIGINT.

    Raises:
        UserError: the port is taken, there is no such cluster, or the model cannot be loaded.
    """
    check_model_folder(options.model_path)
    listen(options.ip, options.port).close()
    with _cluster():
        try:
            _deploy(options)
            logger.info("listening on http://%s:%d, on every machine of the cluster", options.ip, options.port)
            signal.pause()
        except KeyboardInterrupt:
            logger.info("stopping: at most %g s for what is unanswered", options.shutdown_timeout)
        finally:
            serve.delete(APPLICATION)


def _deploy(options: OnRayOptions) -> None:
    http = HTTPOptions(
        host=options.ip,
        port=options.port,
        keep_alive_timeout_s=KEEP_ALIVE_S,
        location=ProxyLocation.EveryNode,
    )
    serve.start(http_options=http)
    try:
        serve.run(application(options), name=APPLICATION, route_prefix="/")
    except (RayServeException, RuntimeError) as error:
        raise UserError(f"Ray Serve: {_why_not_deployed() or one_line(error)}") from error


def _why_not_deployed() -> str:
    """The last line of what the copies died of."""
    state = serve.status().applications.get(APPLICATION)
    messages = [deployment.message for deployment in state.deployments.values()] if state else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ") if lines else ""


@contextmanager
def _cluster() -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").rpartition(":")
    try:
        if port.isdecimal():
            # Ray itself tries for minutes.
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        # Without an address Ray would join any cluster that it finds on this machine.
        ray.init(address or "local", include_dashboard=None if address else False, logging_level=logging.WARNING)
    except Exception as error:
        # Ray raises what it likes.
        where = f"RAY_ADDRESS={address}: no Ray cluster answers" if address else "Ray cannot start"
        raise UserError(f"{where}: {one_line(error)}") from error
    # Instead of Ray's own handler, which leaves at once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if not address:
            serve.shutdown()
        ray.shutdown()
