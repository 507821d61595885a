"""Start a service: check everything cheap first, take the port, load the model behind it, serve until told to stop."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import uvicorn
from fastapi import FastAPI

from xbai.engine import Scorer, load_engine
from xbai.engine.files import check_model_folder, load_tokenizer, read_config, resolve_max_model_len
from xbai.engine.tensor_parallel import check_tensor_parallel_size, largest_tensor_parallel_size
from xbai.errors import UserError
from xbai.serve.app import Service
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.policy import create_policy_app
from xbai.serve.protocol import TimedProtocol
from xbai.serve.score import create_score_app
from xbai.serve.scorer_thread import ScoreModel, ScorerThread
from xbai.sprm.head import SCORE_MODULE_FILE

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
LISTEN_BACKLOG = 2048
SEND_TIMEOUT_S = 5
"""How long clients may take over the last answers, once no more are to come."""


def serve_policy(
    model_path: str, ip: str, port: int, limits: Limits, *, engine: str, with_scores: bool | None, **options: Any
) -> None:
    """Run the policy service until SIGTERM or SIGINT.

    Args:
        model_path, ip, port, limits: what to serve, where, and how much of it.
        engine: as `load_engine` takes it.
        with_scores: load the score head too; None where the folder has one.
        **options: further ones of `load_engine`; None leaves its default.

    Raises:
        UserError: the port is taken, or the model cannot be loaded.
    """
    config = check_model_folder(model_path)
    if with_scores and not (Path(model_path) / SCORE_MODULE_FILE).is_file():
        raise UserError(f"--with_scores: {model_path} has no {SCORE_MODULE_FILE}; leave it out, or serve another model")
    given = {name: value for name, value in options.items() if value is not None}
    if engine != "hf" and find_spec("vllm") is not None:
        if (size := given.get("tensor_parallel_size")) is not None:
            check_tensor_parallel_size(size, config, f"--tensor_parallel_size {size}")
        given["tensor_parallel_size"] = size or _gpus_that_share(config)
    with listen(ip, port) as listener:
        thread = EngineThread(lambda: load_engine(engine, model_path, with_scores=with_scores, **given))
        _run(create_policy_app(thread, model_path, limits), listener)


def _gpus_that_share(config: Mapping[str, Any]) -> int:
    """How many of the GPUs that CUDA_VISIBLE_DEVICES gives this service; one where it is not set."""
    visible = max(1, torch.cuda.device_count()) if "CUDA_VISIBLE_DEVICES" in os.environ else 1
    size = largest_tensor_parallel_size(visible, config)
    if size < visible:
        logger.warning(
            "%d of the %d GPUs in CUDA_VISIBLE_DEVICES share the model: its heads and MLP do not divide among more",
            size,
            visible,
        )
    return size


def serve_score(
    model_path: str,
    ip: str,
    port: int,
    limits: Limits,
    *,
    score_model_dim: int | None,
    lang: str | None,
    dtype: str,
    max_model_len: int | None,
    max_batch_tokens: int | None,
) -> None:
    """Run the score service until SIGTERM or SIGINT.

    Raises:
        UserError: the port is taken, `score_model_dim` is not the model's, or the model cannot be loaded.
    """
    config = check_model_folder(model_path)
    hidden_size = config.get("hidden_size")
    if score_model_dim is not None and score_model_dim != hidden_size:
        raise UserError(f"--score_model_dim {score_model_dim}: {model_path} has hidden_size {hidden_size}")
    with listen(ip, port) as listener:
        thread = ScorerThread(lambda: _load_scorer(model_path, lang, dtype, max_model_len, max_batch_tokens))
        _run(create_score_app(thread, model_path, limits), listener)


def _load_scorer(
    model_path: str, lang: str | None, dtype: str, max_model_len: int | None, max_batch_tokens: int | None
) -> ScoreModel:
    scorer = Scorer.from_folder(model_path, dtype=dtype, lang=lang, max_batch_tokens=max_batch_tokens)
    length = resolve_max_model_len(max_model_len, read_config(model_path))
    return ScoreModel(scorer, load_tokenizer(model_path), length)


def listen(ip: str, port: int) -> socket.socket:
    """A listening socket: from here on the port is ours, before the slow part begins. `::` is all of IPv4, too.

    Raises:
        UserError: the address cannot be had.
    """
    if not ip:
        raise UserError("--ip '': no address; 127.0.0.1 is this machine alone, 0.0.0.0 all of IPv4, :: that and IPv6")
    try:
        # Of a name that has both, IPv4.
        family = min(family for family, *_ in socket.getaddrinfo(ip, port, type=socket.SOCK_STREAM))
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        if ip == "::" and not both:
            logger.warning("--ip ::: this system has no sockets for both, so that IPv4 is not served")
        return socket.create_server((ip, port), family=family, backlog=LISTEN_BACKLOG, dualstack_ipv6=both)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--ip {ip} --port {port}: cannot listen there ({_why_not(error)})") from None


def _why_not(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        return f"{os.strerror(error.errno)}; choose another --port"
    # A resolver's errors have numbers of their own.
    reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
    return f"{reason}; --ip is an address of this machine, 0.0.0.0 all of IPv4, :: that and IPv6"


def server_config(app: FastAPI) -> uvicorn.Config:
    """How HTTP is spoken."""
    return uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SEND_TIMEOUT_S,
    )


class _Server(uvicorn.Server):
    """Answers until the model dies or a signal comes, and then, for a while, what it had accepted before.

    It keeps listening meanwhile, so that clients and load balancers read that it is stopping.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal, end the process at the second."""
        if self._service.stopping:
            _leave(128 + sig)
        if self._service.thread.loading:
            logger.info("stopping: nothing is accepted yet, and loading cannot be interrupted")
            _leave(0)
        logger.info("stopping: at most %g s for what is unanswered", self._service.limits.shutdown_timeout_s)
        self._service.stop()

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down; asked ten times a second."""
        return await super().on_tick(counter) or self._service.finished()


def _run(app: FastAPI, listener: socket.socket) -> None:
    """Serve on `listener`. Returns after a graceful stop; ends the process with status 1 when the engine died.

    Raises:
        UserError: the model could not be loaded, for a reason the user can mend.
    """
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    service: Service = app.state.service
    _Server(server_config(app), service).run(sockets=[listener])
    thread = service.thread
    if thread.loading_error is not None:
        raise thread.loading_error
    if thread.error is not None or thread.running:
        # At once: cleaning up a broken engine can take as long as its workers please.
        logger.warning("leaving without cleaning up the model")
        sys.stdout.flush()
        sys.stderr.flush()
        _leave(0 if thread.error is None else 1)


def _leave(status: int) -> NoReturn:
    """End this process and its workers, which would keep their GPUs if they hang or are still loading."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)
