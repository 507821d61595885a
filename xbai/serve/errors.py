"""Failures as HTTP answers: a status code and a JSON `detail`, never a 200."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MAX_PROBLEMS = 20
MAX_PROBLEM_CHARS = 200


class ServiceError(Exception):
    """An answer other than success: its HTTP status code, what the client reads, and when it may try again."""

    def __init__(self, status: int, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s

    def to_response(self) -> JSONResponse:
        """The HTTP answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"detail": self.detail}, self.status, headers)


def list_problems(problems: Sequence[str], separator: str = "; ") -> str:
    """The first `MAX_PROBLEMS`, each of at most `MAX_PROBLEM_CHARS`, and how many more there are."""
    most = MAX_PROBLEM_CHARS
    shown = [one if len(one) <= most else f"{one[:most]}..." for one in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        shown.append(f"and {len(problems) - MAX_PROBLEMS} more")
    # A key may hold half a surrogate pair, which no answer can.
    return separator.join(shown).encode(errors="backslashreplace").decode()


def install_error_handlers(app: FastAPI) -> None:
    """Make every refusal of `app` a JSON answer; a bug's is `RequestMiddleware`'s."""

    @app.exception_handler(ServiceError)
    async def on_service_error(request: Request, error: ServiceError) -> JSONResponse:
        return error.to_response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        # The rejected values are not sent back: they may be megabytes, or NaN, which JSON cannot carry.
        problems = [f"{'.'.join(map(str, item['loc'][1:])) or 'body'}: {item['msg']}" for item in error.errors()]
        return JSONResponse({"detail": list_problems(problems)}, 422)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI turns whatever goes wrong while it reads a body into a 400, and keeps the reason as the cause.
        if isinstance(error.__cause__, ServiceError):
            return error.__cause__.to_response()
        if isinstance(error.__cause__, UnicodeDecodeError):
            return JSONResponse({"detail": "body: not valid UTF-8"}, 422)
        return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)
