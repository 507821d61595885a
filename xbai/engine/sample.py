"""What an engine is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from xbai.aggregation import aggregate
from xbai.errors import UserError

FinishReason = Literal["stop", "stop_token", "length", "pruned", "not_begun"]
"""End of sequence or turn, or a stop string; one of `stop_token_ids`; no room for more tokens. Of a budget (see
`xbai.search.rule`): given up on the way; never begun."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample `n` completions of a prompt.

    Attributes:
        max_tokens: clamped to what `max_model_len` leaves after the prompt.
        temperature: 0 (greedy) to 2.
        top_k: -1 or 0 keeps every token.
        repetition_penalty: divides (multiplies, when negative) the logits of tokens seen in prompt or response.
        stop: strings that end a completion and are cut from its text; one may be a special token.
        stop_token_ids: tokens that end a completion, or interrupt it: they stay in its text.
        seed: sample i draws from a stream derived from (seed, i); None takes the engine's seed, or a fresh stream.
        log_probs: return each token's log-prob under softmax(logits / temperature), before penalties, top-k and top-p
            (at temperature 0: under softmax(logits)).
    """

    n: int = 1
    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    log_probs: bool = False

    def __post_init__(self) -> None:
        """Reject values that no engine could honour."""
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        for valid, message in (
            (self.n >= 1, f"n={self.n}: at least 1"),
            (self.max_tokens >= 1, f"max_tokens={self.max_tokens}: at least 1"),
            (0 <= self.temperature <= 2, f"temperature={self.temperature}: from 0 (greedy) to 2"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: above 0 and at most 1"),
            (self.top_k >= -1, f"top_k={self.top_k}: a positive count, or -1 for all tokens"),
            (0 < self.repetition_penalty < float("inf"), f"repetition_penalty={self.repetition_penalty}: above 0"),
            (all(self.stop), "stop: an empty string would end every completion"),
        ):
            if not valid:
                raise UserError(f"sampling: {message}")


@dataclass
class Completion:
    """One sampled response.

    Attributes:
        token_ids: with the token that ends it or completes a stop string.
        log_probs: one a token; None where not asked for.
        step_scores: one a step; None where not asked for.
        step_ends: for each step score, how many tokens there are up to and including the step token: ascending.
        discarded: tokens that were generated beyond these (of a pruned response).
        cached_prompt_tokens: how many of the prompt were not computed, because another sample's prompt began with them.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    log_probs: list[float] | None = None
    step_scores: list[float] | None = None
    step_ends: list[int] | None = None
    discarded: int = 0
    cached_prompt_tokens: int = field(default=0, compare=False)

    @property
    def generated(self) -> int:
        """How many tokens it has cost."""
        return len(self.token_ids) + self.discarded

    @property
    def score(self) -> float | None:
        """Of the trajectory; None without step scores, and of one that a budget did not have written to its end."""
        is_whole = self.finish_reason not in ("pruned", "not_begun")
        return aggregate(self.step_scores) if is_whole and self.step_scores is not None else None

    @property
    def step_log_probs(self) -> list[float] | None:
        """K + 1 sums of log-probs: of the tokens of each of the K steps, and of those after the last one (0.0 where
        there are none); None without log-probs or steps."""
        if self.log_probs is None or self.step_ends is None:
            return None
        borders = [0, *self.step_ends, len(self.log_probs)]
        return [sum(self.log_probs[begin:end]) for begin, end in pairwise(borders)]


@dataclass(frozen=True, eq=False)
class Sample:
    """One completion to be, the unit of work of an engine.

    Attributes:
        key: unique among the samples of its engine.
        index: which it is of its request's `n`.
        params: those of the request, `max_tokens` being what there is room for.
        seed: of its own random stream; None for a fresh one.
        return_scores: its completion is to have step scores.
        end_ids: tokens that end it and are not in its text.
    """

    key: str
    index: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int | None
    return_scores: bool = False
    end_ids: frozenset[int] = frozenset()
