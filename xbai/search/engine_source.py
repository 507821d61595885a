"""Continuations by an engine in this process."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

from xbai.engine import Completion, Engine, SamplingParams
from xbai.errors import UserError
from xbai.search.expander import Continuation
from xbai.search.path import Path
from xbai.sprm.steps import ScoredPart, joined_scores
from xbai.sprm.tags import THINK_CLOSE


class EngineLoop:
    """Lets many searches share an engine's batches: requests made before it next runs run together."""

    def __init__(self, engine: Engine) -> None:
        if engine.step_rule is None:
            raise UserError("search: the model has no score head (score_module.pt beside it), which step search needs")
        self.engine = engine
        self._numbers = itertools.count()
        self._requests: dict[str, asyncio.Future[Completion]] = {}
        self._running: asyncio.Task[None] | None = None

    async def generate(self, prompt_ids: list[int], params: SamplingParams) -> Completion:
        """One completion, with the scores of its steps."""
        request_id = f"search-{next(self._numbers)}"
        self.engine.add_request(request_id, prompt_ids, params, return_scores=True)
        future = self._requests[request_id] = asyncio.get_running_loop().create_future()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self.engine.has_unfinished():
                # Every search that can go on makes its requests first.
                await asyncio.sleep(0)
                self._answer(self.engine.step())
        except Exception as error:
            # It is for the searches to hear, none of which will be answered any more.
            futures, self._requests = self._requests, {}
            for future in futures.values():
                if not future.done():
                    future.set_exception(error)

    def _answer(self, finished: list[tuple[str, list[Completion]]]) -> None:
        for request_id, (completion,) in finished:
            future = self._requests.pop(request_id)
            # A search that was cancelled no longer waits.
            if not future.done():
                future.set_result(completion)


class EngineSource:
    """Writes on at the responses to one prompt; steps are found on the tokens that were generated.

    Args:
        loop: around an engine with scores.
        prompt_ids: the prompt.
        params: how to sample; number of samples, length and seed are the search's.
    """

    def __init__(self, loop: EngineLoop, prompt_ids: list[int], params: SamplingParams) -> None:
        self._loop = loop
        self._prompt_ids = list(prompt_ids)
        self._params = params

    async def write_on(self, path: Path, max_tokens: int, to_end: bool, seed: int | None) -> Continuation:
        """See `StepSource`."""
        engine = self._loop.engine
        prompt_ids = [*self._prompt_ids, *path.token_ids]
        if len(prompt_ids) >= engine.max_model_len:
            return Continuation(replace(path, finish_reason="length"), 0)
        step_ids = () if to_end or THINK_CLOSE in path.text else engine.step_rule.step_ids
        params = replace(self._params, n=1, max_tokens=max_tokens, seed=seed, stop_token_ids=step_ids)
        completion = await self._loop.generate(prompt_ids, params)
        before, added = (ScoredPart(part.token_ids, part.step_scores) for part in (path, completion))
        ended = completion.finish_reason == "stop"
        token_ids = (*path.token_ids, *completion.token_ids)
        grown = Path(
            text=path.text + completion.text if ended else engine.detokenize(token_ids),
            token_count=len(token_ids),
            step_scores=tuple(joined_scores(self._prompt_ids, before, added, engine.step_rule)),
            finish_reason="stop" if ended else None,
            token_ids=token_ids,
        )
        return Continuation(grown, len(completion.token_ids))
