"""The wire format of both services. Fields beyond the published ones are optional and change none of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from xbai.errors import UserError
from xbai.search.budget import parse_budget

MAX_RESPONSES = 1024
MAX_BATCH_TEXTS = 1024
MAX_STOP_TOKENS = 4096


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode: it holds a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]


class WireModel(BaseModel):
    """Strict types, no NaN or infinity, no unknown field (a misspelt one must not pass unnoticed)."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


def _budget_rule(text: str) -> str:
    try:
        return str(parse_budget(text))
    except UserError as error:
        raise ValueError(str(error)) from None


class Chance(WireModel):
    """The calibrated probability that a response is right: sigmoid(slope * log-odds of its score + intercept)."""

    slope: float = Field(gt=0)
    intercept: float


class Budget(WireModel):
    """Which of `response_num` responses are sampled, and how far; see docs/evaluation.md."""

    rule: Annotated[str, Field(max_length=256), AfterValidator(_budget_rule)] = Field(
        description="stop:0.9/2, posterior:0.9/2, majority:0.9/2, prune:0.5@1,2,3 or prune:0.5@1,2,3+stop:0.9/8"
    )
    chance: Chance | None = Field(None, description="By default that of the calibration beside the model.")
    data_source: str | None = Field(None, max_length=256, description="How answers are compared, where a rule does.")


class GenerateRequest(WireModel):
    """Body of `POST /generate`."""

    prefix_prompt: Text = Field(min_length=1, description="The whole prompt, chat template applied.")
    max_tokens: int = Field(1024, ge=1, le=2**31 - 1)
    response_num: int = Field(8, ge=1, le=MAX_RESPONSES)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="Texts that end a response and are cut from it; a special token only alone."
    )
    stop_token_ids: list[Annotated[int, Field(ge=0, le=2**31 - 1)]] | None = Field(
        None,
        max_length=MAX_STOP_TOKENS,
        description="Tokens that end a response but stay in its text; its finish reason is then stop_token.",
    )
    temperature: float = Field(0.8, ge=0, le=2, description="0 is greedy.")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="Response i uses a seed derived from (seed, i).")
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, le=2**31 - 1, description="-1 or 0: no limit.")
    repetition_penalty: float = Field(1.05, ge=0.01, le=10)
    budget: Budget | None = Field(None, description="Not all of the responses, but those that a rule wants.")
    answer_once: bool = Field(
        False, description="Responses end with their thinking, and the one that scores highest goes on to its answer."
    )
    return_scores: bool = Field(False, description="Also return trajectory and step scores, and where steps end.")
    return_log_probs: bool = Field(False, description="Also return mean log-probs; with scores also those of steps.")

    def stop_texts(self) -> tuple[str, ...]:
        """`stop` in its long form."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class GenerateResponse(WireModel):
    """Answer of `POST /generate`; item i of every list belongs to response i. Scores and log-probs come when asked for.

    A mean log-prob is over the generated tokens, each under softmax(logits / temperature), before penalties, top-k and
    top-p; null for a response without a token. `step_ends` counts the tokens up to and including the one that ends a
    step, for each of `step_scores`. `step_log_probs` are sums of log-probs: of each step, and of what follows the last.

    With a budget, `finish_reasons` has `pruned`, a response that was given up and is told up to the step that decided
    it, and `not_begun`; neither has a score. `token_counts` are of all that was generated.

    With `answer_once`, `chosen` is the response that was written to its end.
    """

    results: list[str]
    finish_reasons: list[str]
    token_counts: list[int]
    scores: list[float | None] | None = None
    step_scores: list[list[float]] | None = None
    mean_log_probs: list[float | None] | None = None
    step_ends: list[list[int]] | None = None
    step_log_probs: list[list[float]] | None = None
    chosen: int | None = None


class ScoreRequest(WireModel):
    """Body of `POST /score`."""

    text: Text = Field(min_length=1, description="Prompt and response.")
    return_all_scores: bool = False
    prompt: Text | None = Field(
        None, description="The prompt that `text` starts with; without it, the response follows the last chat header."
    )


class ScoreResponse(WireModel):
    """Answer of `POST /score`; the lists come only with `return_all_scores`. Positions index `token_ids`."""

    value: float
    all_scores: list[float] | None = None
    token_ids: list[int] | None = None
    score_positions: list[int] | None = None


class ScoreBatchRequest(WireModel):
    """Body of `POST /score_batch`."""

    texts: list[Annotated[Text, Field(min_length=1)]] = Field(
        min_length=1, max_length=MAX_BATCH_TEXTS, description="Each a prompt and a response."
    )
    return_all_scores: bool = False
    prompt: Text | None = Field(None, description="The prompt that all texts start with; see `POST /score`.")


class ScoreBatchResponse(WireModel):
    """Answer of `POST /score_batch`; item i of every list belongs to text i. Only `values` comes unasked."""

    values: list[float]
    all_scores: list[list[float]] | None = None
    token_ids: list[list[int]] | None = None
    score_positions: list[list[int]] | None = None


class ErrorResponse(BaseModel):
    """Body of every refusal and failure."""

    detail: str


class OpenAIError(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorResponse(BaseModel):
    """Body of every refusal and failure of a route under `/v1/`."""

    error: OpenAIError


class StateResponse(BaseModel):
    """Answer of `GET /health` and `GET /ready`."""

    status: Literal["alive", "ready"]
    model: str = Field(description="The model's folder; to those without the key its name alone.")
    identity: str = Field(description="Folder name and digest of the weights, of which the digest tells models apart.")
    scores: bool = Field(description="Whether this service returns scores.")
    lang: str | None = Field(description="The rule by which it finds the steps that it scores.")
    log_probs: bool = Field(description="Whether this service returns mean log-probs.")
