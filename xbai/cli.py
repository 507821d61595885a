"""The command line: `xbai serve-policy | serve-score | infer | metric | plot | summary`.

The scripts under `test/` are these commands under the names that users of XBai o4 know.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer

from xbai.errors import exit_on_user_error

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.splitlines()[0])

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

ModelPath = Annotated[str, typer.Option("--model_path", help="A Hugging Face model folder.")]
Ip = Annotated[str, typer.Option("--ip", help="Address to listen on; 0.0.0.0 for every interface.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 picks a free one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
MaxModelLen = Annotated[int | None, typer.Option("--max_model_len", min=2, help="Longest prompt plus response.")]
RequestTimeout = Annotated[float, typer.Option("--request_timeout", min=0.001, help="Seconds to an answer; then 504.")]
MaxBody = Annotated[int, typer.Option("--max_body_mb", min=1, help="Largest request body in MiB; beyond it 413.")]
ShutdownTimeout = Annotated[int, typer.Option("--shutdown_timeout", min=0, help="Seconds to finish after SIGTERM.")]


def _command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command; a `UserError` in it is one line and exit status 2."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def logged(*args: Any, **kwargs: Any) -> Any:
            logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
            # One line per request of the driver would drown its progress.
            logging.getLogger("httpx").setLevel(logging.WARNING)
            return function(*args, **kwargs)

        return app.command(name)(exit_on_user_error(logged))

    return register


@_command("serve-policy")
def serve_policy(
    model_path: ModelPath,
    ip: Ip = "127.0.0.1",
    port: Port = 8000,
    engine: Annotated[str, typer.Option("--engine", help="vllm, hf, or auto.")] = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    max_pending: Annotated[int, typer.Option("--max_pending", min=1, help="Responses queued; beyond it 429.")] = 4096,
    request_timeout: RequestTimeout = 3600.0,
    max_body_mb: MaxBody = 16,
    shutdown_timeout: ShutdownTimeout = 60,
) -> None:
    """Serve a model's responses: POST /generate."""
    from xbai.serve.limits import Limits
    from xbai.serve.run import serve_policy

    limits = Limits(max_pending, request_timeout, max_body_mb << 20, shutdown_timeout)
    serve_policy(model_path, ip, port, limits, engine=engine, dtype=dtype, max_model_len=max_model_len)


@_command("serve-score")
def serve_score(
    model_path: ModelPath,
    score_model_dim: Annotated[
        int | None, typer.Option("--score_model_dim", help="The model's hidden size, checked where given.")
    ] = None,
    lang: Annotated[
        str | None, typer.Option("--lang", help="Step rule: en or zh; by default the one that travels with the model.")
    ] = None,
    ip: Ip = "127.0.0.1",
    port: Port = 8001,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    max_batch_tokens: Annotated[
        int, typer.Option("--max_batch_tokens", min=1, help="Most tokens of one forward pass, padding included.")
    ] = 16384,
    max_pending: Annotated[int, typer.Option("--max_pending", min=1, help="Texts queued; beyond it 429.")] = 1024,
    request_timeout: RequestTimeout = 3600.0,
    max_body_mb: MaxBody = 16,
    shutdown_timeout: ShutdownTimeout = 60,
) -> None:
    """Serve a model's judgement: POST /score."""
    from xbai.serve.limits import Limits
    from xbai.serve.run import serve_score

    serve_score(
        model_path,
        ip,
        port,
        Limits(max_pending, request_timeout, max_body_mb << 20, shutdown_timeout),
        score_model_dim=score_model_dim,
        lang=lang,
        dtype=dtype,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
    )
