"""Failures as HTTP answers: a status code and a JSON body, never a 200.

The body is `{"detail": ...}`, and under `/v1/` what OpenAI's clients expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MAX_PROBLEMS = 20
MAX_PROBLEM_CHARS = 200
OPENAI_PREFIX = "/v1/"
TOO_LONG = "context_length_exceeded"
"""The code of a prompt that is too long for the model."""


class ServiceError(Exception):
    """An answer other than success.

    Attributes:
        status: its HTTP status code.
        detail: what the client reads.
        retry_after_s: when it may try again.
        code: what OpenAI's clients know such an error by.
        param: the field of the request that it is about.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        retry_after_s: int | None = None,
        *,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.code = code
        self.param = param

    def to_response(self, path: str) -> JSONResponse:
        """The HTTP answer to a request for this path."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if not path.startswith(OPENAI_PREFIX):
            return JSONResponse({"detail": self.detail}, self.status, headers)
        status = 400 if self.status == 422 or self.code == TOO_LONG else self.status
        return JSONResponse(self.to_openai(), status, headers)

    def to_openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients expect."""
        if self.status == 429:
            kind, code = "rate_limit_error", "rate_limit_exceeded"
        elif self.status >= 500:
            kind, code = "server_error", None
        else:
            kind, code = "invalid_request_error", "invalid_api_key" if self.status == 401 else None
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code or code}}


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
        return error.to_response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        # The rejected values are not sent back: they may be megabytes, or NaN, which JSON cannot carry.
        places = [".".join(map(str, item["loc"][1:])) for item in error.errors()]
        problems = [f"{place or 'body'}: {item['msg']}" for place, item in zip(places, error.errors(), strict=True)]
        param = list_problems(places[:1]) or None
        refusal = ServiceError(422, list_problems(problems), code="invalid_value", param=param)
        return refusal.to_response(request.url.path)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI turns whatever goes wrong while it reads a body into a 400, and keeps the reason as the cause.
        refusal = ServiceError(error.status_code, str(error.detail))
        if isinstance(error.__cause__, ServiceError):
            refusal = error.__cause__
        elif isinstance(error.__cause__, UnicodeDecodeError):
            refusal = ServiceError(422, "body: not valid UTF-8")
        response = refusal.to_response(request.url.path)
        response.headers.update(error.headers or {})
        return response
