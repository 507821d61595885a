"""One answer of a reflective model: candidates think, the best by its own scores is chosen, and it alone answers
(arXiv 2507.01951, section 3.3)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from xbai.calibration import ScoreChance
from xbai.engine import Completion, Engine, Sample, SamplingParams
from xbai.search.budget import parse_budget
from xbai.serve.budgeted import complete_budgeted
from xbai.serve.engine_thread import EngineThread
from xbai.serve.progress import Progress, ProgressWatch
from xbai.serve.schemas import Budget
from xbai.serve.thinking import Said, TextStream, ThinkingParser
from xbai.sprm.tags import THINK_CLOSE

Tell = Callable[[Progress | Said], None]
"""Takes what there is to say before the end; called on the event loop."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        prompt, prompt_ids: text and tokens, chat template applied.
        params: how to sample; `n` candidates.
        answer_once: the candidates only think, and the best one answers; where none thinks, all are whole responses.
        budget: not all of the candidates, but those that a rule wants.
        return_scores: also a lone candidate is to have scores.
        client: whose turn it takes.
    """

    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    answer_once: bool = True
    budget: Budget | None = None
    return_scores: bool = False
    client: str = ""

    @property
    def thinks_alone(self) -> bool:
        """Candidates end with their thinking. A rule that compares answers needs them all."""
        compares = self.budget is not None and parse_budget(self.budget.rule).needs_answers
        return self.answer_once and self.params.n > 1 and not compares


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        candidates: in their order, as far as each was written.
        chosen: which of them is the response.
        response: the whole of it.
        said: its thinking and its content.
        answer_tokens: what the chosen one was given after its thinking; None where it was written in one go.
    """

    candidates: list[Completion]
    chosen: int
    response: Completion
    said: Said
    answer_tokens: int | None = None

    @cached_property
    def generated(self) -> int:
        """Tokens of all candidates, and of the answer."""
        return sum(candidate.generated for candidate in self.candidates) + (self.answer_tokens or 0)

    @property
    def is_whole(self) -> bool:
        """It ended by itself, and not for want of room."""
        return self.response.finish_reason != "length"


class _Telling:
    """Parses what the chosen one says, remembers it, and tells it at once where somebody listens."""

    def __init__(self, prompt: str, tell: Tell | None) -> None:
        self._parser = ThinkingParser.after(prompt)
        self._tell = tell
        self.said = Said()

    def push(self, text: str) -> None:
        self._add(self._parser.push(text))

    def end(self) -> None:
        self._add(self._parser.end())

    def _add(self, more: Said) -> None:
        self.said = Said(self.said.reasoning + more.reasoning, self.said.content + more.content)
        if self._tell is not None and (more.reasoning or more.content):
            self._tell(more)


async def reflect(
    thread: EngineThread,
    question: Question,
    own_chance: ScoreChance | None = None,
    tell: Tell | None = None,
    tell_progress: bool = False,
) -> Answer:
    """Answer a question. Cancelling the awaiting task aborts the work.

    Args:
        own_chance: of the calibration beside the model, for budgets.
        tell: gets thinking and content of the response as soon as they are certain, piece by piece.
        tell_progress: and before that, now and then, how far the candidates are.

    Raises:
        ServiceError: as of `EngineThread` and `complete_budgeted`.
    """
    telling = _Telling(question.prompt, tell)
    if question.params.n == 1:
        samples = thread.samples(question.prompt_ids, question.params, question.return_scores)
        response = await _written(thread, samples, question, telling, is_live=tell is not None)
        return Answer([response], 0, response, telling.said)
    params = _ends_with_thinking(question.params, thread.model) if question.thinks_alone else question.params
    samples = thread.samples(question.prompt_ids, params, return_scores=True)
    watch = _progress_watch(tell) if tell is not None and tell_progress else None
    request = await complete_budgeted(thread, samples, question.budget, own_chance, question.client, watch)
    candidates, chosen = request.results(), request.choose()
    best = candidates[chosen]
    if not (question.thinks_alone and _has_thought(best, thread.model)):
        telling.push(best.text)
        telling.end()
        return Answer(candidates, chosen, best, telling.said)
    thinking = thread.model.detokenize(best.token_ids)
    telling.push(thinking)
    rest = await _answered(thread, samples[chosen], best, question, telling, is_live=tell is not None)
    response = replace(
        best,
        token_ids=[*best.token_ids, *rest.token_ids],
        text=thinking + rest.text,
        finish_reason=rest.finish_reason,
        log_probs=None if best.log_probs is None else [*best.log_probs, *(rest.log_probs or ())],
    )
    return Answer(candidates, chosen, response, telling.said, len(rest.token_ids))


def _progress_watch(tell: Tell) -> ProgressWatch:
    loop = asyncio.get_running_loop()

    def tell_from_its_thread(progress: Progress) -> None:
        _call_on(loop, tell, progress)

    return ProgressWatch(tell_from_its_thread)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """From the engine's thread, which may outlive the loop."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)


def _ends_with_thinking(params: SamplingParams, engine: Engine) -> SamplingParams:
    close_id = engine.step_rule.think_close_id if engine.step_rule else None
    if close_id is not None and close_id < engine.vocab_size:
        return replace(params, stop_token_ids=(*params.stop_token_ids, close_id))
    return replace(params, stop=(*params.stop, THINK_CLOSE))


def _has_thought(candidate: Completion, engine: Engine) -> bool:
    """It ended with its thinking, and not with its answer, another stop, or for want of room."""
    if candidate.finish_reason not in ("stop", "stop_token"):
        return False
    # A tag with a token of its own stays in the text; one that is a stop string is cut from it.
    text = candidate.text.removesuffix(THINK_CLOSE) if candidate.finish_reason == "stop_token" else candidate.text
    return engine.detokenize(candidate.token_ids).startswith(text + THINK_CLOSE)


async def _answered(
    thread: EngineThread, sample: Sample, thinking: Completion, question: Question, telling: _Telling, is_live: bool
) -> Completion:
    """What follows the thinking of a candidate, whose prefix the engine may still have in its cache."""
    left = sample.params.max_tokens - len(thinking.token_ids)
    if left < 1:
        telling.end()
        return Completion([], "", "length")
    params = replace(question.params, n=1, max_tokens=left, seed=sample.seed)
    samples = thread.samples([*question.prompt_ids, *thinking.token_ids], params)
    return await _written(thread, samples, question, telling, is_live)


async def _written(
    thread: EngineThread, samples: list[Sample], question: Question, telling: _Telling, is_live: bool
) -> Completion:
    """The completion of a lone sample, told while it is written where that is wanted."""
    loop, stream = asyncio.get_running_loop(), TextStream(thread.model.detokenize, question.params.stop)
    (sample,), seen = samples, 0

    def after_step(engine: Engine, finished: Mapping[Sample, Completion]) -> Mapping[Sample, Completion]:
        nonlocal seen
        token_ids = () if finished else engine.token_ids(sample)
        if len(token_ids) > seen:
            new, seen = list(token_ids[seen:]), len(token_ids)
            _call_on(loop, lambda: telling.push(stream.push(new)))
        return {}

    (completion,) = await thread.complete(samples, question.client, after_step if is_live else None)
    telling.push(stream.end(completion.text))
    telling.end()
    return completion
