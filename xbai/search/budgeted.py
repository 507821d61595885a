"""The samples of a request, of which a rule says how many are written, and how far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from xbai.aggregation import aggregate, running_scores
from xbai.engine import Completion, Engine, Sample, SamplingParams
from xbai.search.group import CandidateGroup
from xbai.search.rule import Candidate, Rule

Chance = Callable[[float], float]
"""A trajectory score -> the calibrated probability that the response is right."""

Answers = Callable[[Sequence[str]], Sequence[str | None]]
"""Responses to one question -> what each answers, the same for equal answers; None where it does not answer."""


class BudgetedSamples:
    """A `CandidateGroup` over an engine's samples, which are to have scores.

    Whoever owns the engine adds the samples of each wave, calls `prune` after each of its steps where the rule prunes,
    and `end` when none of the wave is at work.
    """

    def __init__(self, samples: Sequence[Sample], rule: Rule, chance: Chance | None = None) -> None:
        self._samples = samples
        self._group = CandidateGroup(rule, len(samples), chance)
        self._wave: list[Sample] = []
        self._so_far: dict[Sample, Completion] = {}
        self._completions: dict[Sample, Completion] = {}

    def begin(self) -> list[Sample]:
        """The next wave; empty at the end."""
        self._wave = [self._samples[number] for number in self._group.begin()]
        self._so_far = {}
        return self._wave

    def prune(self, engine: Engine, finished: Mapping[Sample, Completion]) -> dict[Sample, Completion]:
        """The samples of the wave that are given up now, finished or not, with what is left of them.

        To be called on the thread that owns the engine; `finished` has those given up before, too.
        """
        news = {sample: one for sample, one in finished.items() if self._so_far.get(sample) is not one}
        grown = engine.with_new_step(sample for sample in self._wave if sample not in finished)
        if not news and not grown:
            return {}
        self._so_far |= {**news, **dict(zip(grown, engine.so_far(grown), strict=True))}
        pruned = {}
        for number in self._group.prune([self._candidate(sample, sample in finished) for sample in self._wave]):
            sample = self._samples[number]
            written = len(finished[sample].token_ids if sample in finished else engine.token_ids(sample))
            pruned[sample] = _cut(engine, self._so_far[sample], self._group.pruned[number], written)
        self._so_far |= pruned
        return pruned

    def end(self, completions: Mapping[Sample, Completion], answers: Answers | None = None) -> None:
        """Those of the wave. `answers` is asked where the rule asks for answers."""
        self._completions |= completions
        # Nobody asks for the running scores of what has ended.
        self._group.end([Candidate((), aggregate(completions[sample].step_scores or [])) for sample in self._wave])
        ended = self._group.ended
        if answers is not None and self._group.rule.needs_answers:
            texts = [self._completions[self._samples[number]].text for number in ended]
            for number, answer in zip(list(ended), answers(texts), strict=True):
                ended[number] = replace(ended[number], answer=answer)

    def choose(self) -> int:
        """Which sample is the response; one without room for its end only where all that ended are such."""
        ended = self._group.ended
        whole = [n for n in ended if self._completions[self._samples[n]].finish_reason != "length"]
        return self._group.choose(whole or None)

    def results(self) -> list[Completion]:
        """A completion of each sample, in their order."""
        return [self._completions.get(sample) or _not_begun(sample) for sample in self._samples]

    def _candidate(self, sample: Sample, has_ended: bool) -> Candidate:
        completion = self._so_far.get(sample)
        scores = (completion.step_scores or []) if completion else []
        return Candidate(running_scores(scores), aggregate(scores) if has_ended else None)


def _not_begun(sample: Sample) -> Completion:
    return Completion([], "", "not_begun", [] if sample.params.log_probs else None, [], [])


def _cut(engine: Engine, completion: Completion, steps: int, written: int) -> Completion:
    """What is left of a response after so many steps: the same, however far it was `written` when that was decided."""
    ends = (completion.step_ends or [])[:steps]
    token_ids = completion.token_ids[: ends[-1]]
    return Completion(
        token_ids,
        engine.detokenize(token_ids),
        "pruned",
        completion.log_probs[: ends[-1]] if completion.log_probs is not None else None,
        (completion.step_scores or [])[:steps],
        ends,
        discarded=written - len(token_ids),
    )


def generate_budgeted(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    rule: Rule,
    chance: Chance | None = None,
    answers: Answers | None = None,
) -> list[list[Completion]]:
    """As `Engine.generate` with scores, but of each prompt's `n` samples those that the rule wants, as far as it does.

    Raises:
        RuntimeError: the engine has other samples.
    """
    if engine.has_unfinished():
        raise RuntimeError("generate_budgeted() needs an engine without unfinished samples")
    requests = [BudgetedSamples(engine.samples(ids, params, True), rule, chance) for ids in prompts]
    waves = [request.begin() for request in requests]
    done: list[dict[Sample, Completion]] = [{} for _ in requests]
    number_of = {sample: number for number, wave in enumerate(waves) for sample in wave}
    try:
        for sample in number_of:
            engine.add(sample)
        while engine.has_unfinished():
            for sample, completion in engine.step():
                done[number_of[sample]][sample] = completion
            for number in [number for number, wave in enumerate(waves) if wave]:
                request = requests[number]
                if rule.prunes:
                    pruned = request.prune(engine, done[number])
                    engine.abort(pruned)
                    done[number] |= pruned
                if len(done[number]) == len(waves[number]):
                    request.end(done[number], answers)
                    waves[number], done[number] = request.begin(), {}
                    for sample in waves[number]:
                        number_of[sample] = number
                        engine.add(sample)
    finally:
        engine.abort(number_of)
    return [request.results() for request in requests]
