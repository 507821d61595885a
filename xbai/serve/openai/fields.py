"""What requests of OpenAI's two interfaces have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from xbai.engine import SamplingParams
from xbai.serve.app import ERRORS, Service
from xbai.serve.errors import ServiceError
from xbai.serve.schemas import MAX_RESPONSES, Budget, GenerateRequest, OpenAIErrorResponse, StopText

UNBOUNDED = 2**31 - 1
"""Most tokens; the model's own limit is lower."""


class LenientModel(BaseModel):
    """Strict types, but any further field, kept in `model_extra`: clients send many, of which most ask for nothing."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class SamplingFields(LenientModel):
    """Those of sampling. Without a value, that of `POST /generate` holds; null is no value.

    The last ones are no fields of OpenAI's; their client sends them from `extra_body`.
    """

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    user: str | None = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    candidates: int | None = Field(None, ge=1, le=MAX_RESPONSES, description="How many think, whatever the effort.")
    budget: Budget | None = Field(None, description="Not all of the candidates, but those that a rule wants.")
    answer_once: bool | None = Field(None, description="Only the best candidate answers (the default), or each.")
    return_candidates: bool | None = Field(None, description="Also return all candidates, with their step scores.")

    def sampling(
        self, candidates: int, max_tokens: int | None, stop: StopText | list[StopText] | None = None
    ) -> SamplingParams:
        """How candidates are sampled."""
        defaults = GenerateRequest.model_fields
        given = {
            name: defaults[name].default if (value := getattr(self, name)) is None else value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        }
        return SamplingParams(
            n=candidates,
            max_tokens=UNBOUNDED if max_tokens is None else max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            # OpenAI's may be any; an engine's is not negative.
            seed=None if self.seed is None else self.seed % 2**63,
            **{**given, "top_k": given["top_k"] or -1},
        )


Count = Annotated[int | None, Field(ge=1, le=UNBOUNDED)]


def described(service: Service, streams: bool = False) -> dict[str, Any]:
    """What the schema says of a route beside its body.

    Args:
        streams: it may answer piece by piece.
    """
    # Bad input is 400 here.
    errors = {status: why for status, why in ERRORS.items() if status != 422} | {404: "no such model"}
    route = service.route(errors, OpenAIErrorResponse)
    if streams:
        content: dict[str, Any] = {"application/json": {"schema": {}}, "text/event-stream": {"schema": {}}}
        route["responses"][200] = {"description": "the answer", "content": content}
    return route


def refusal(field: str, why: str) -> ServiceError:
    """Of a field that is known but cannot act, and must not pass unnoticed."""
    return ServiceError(400, f"{field}: {why}", code="unsupported_parameter", param=field)


def refuse_format(field: str, value: Any) -> None:
    """Refuse any but text.

    Raises:
        ServiceError: 400 that names the field.
    """
    if value and not (isinstance(value, dict) and value.get("type") == "text"):
        raise refusal(field, "answers are text; no other format can be kept to")


def refuse_what_cannot_act(request: LenientModel, reasons: dict[str, str]) -> None:
    """Refuse the fields that a schema does not name, where they ask for something.

    Args:
        reasons: field -> why not.

    Raises:
        ServiceError: 400 that names the first.
    """
    given: dict[str, Any] = request.model_extra or {}
    for field, why in reasons.items():
        if given.get(field):
            raise refusal(field, why)
