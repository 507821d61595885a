"""An engine that says what a test wants, a token a step, with the scores that the test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from xbai.engine import Completion, Engine
from xbai.engine.files import ModelOptions
from xbai.engine.sample import FinishReason, Sample
from xbai.engine.weight_check import HeldWeight
from xbai.sprm import StepRule
from xbai.sprm.steps import step_ends, step_positions

Script = Callable[[str, int], tuple[str, float]]
"""Prompt and number of a candidate -> what it says, and the score of each of its steps."""


class ScriptedEngine(Engine):
    """Goes on while `gate` is open; `begun` are all samples that it was given, `running` those that it is at."""

    def __init__(self, folder: Path, script: Script, scores: bool = True) -> None:
        super().__init__(ModelOptions(folder))
        self._script = script
        self._rule = StepRule.from_tokenizer(self.tokenizer) if scores else None
        self.max_num_seqs = 64
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[Sample] = []
        self.running: dict[Sample, list[int]] = {}
        self._written: dict[Sample, list[int]] = {}

    @property
    def step_rule(self) -> StepRule | None:
        return self._rule

    def token_ids(self, sample: Sample) -> Sequence[int]:
        return self._written.get(sample, [])

    def _enqueue(self, sample: Sample) -> None:
        text, _ = self._script(self.tokenizer.decode(sample.prompt_ids), sample.index)
        self.running[sample] = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        self._written[sample] = []
        self.begun.append(sample)

    def _advance(self) -> list[tuple[Sample, Completion]]:
        if not self.gate.wait(0.01):
            return []
        finished = []
        for sample, script in list(self.running.items()):
            written = self._written[sample]
            written.append(script[len(written)])
            if (reason := self._end_of(sample, written)) is not None:
                finished.append((sample, self._completion(sample, reason)))
                self._drop([sample])
        return finished

    def _end_of(self, sample: Sample, written: list[int]) -> FinishReason | None:
        text = self.detokenize(written)
        if written[-1] in sample.end_ids or any(stop in text for stop in sample.params.stop):
            return "stop"
        if written[-1] in sample.params.stop_token_ids:
            return "stop_token"
        return "length" if len(written) >= sample.params.max_tokens else None

    def _so_far(self, sample: Sample) -> Completion:
        return self._completion(sample, "pruned")

    def _completion(self, sample: Sample, reason: FinishReason) -> Completion:
        token_ids = list(self._written[sample])
        completion = Completion(token_ids, self._response_text(sample, token_ids), reason)
        if sample.params.log_probs:
            completion.log_probs = [-0.5] * len(token_ids)
        if sample.return_scores and self._rule is not None:
            _, score = self._script(self.tokenizer.decode(sample.prompt_ids), sample.index)
            start = len(sample.prompt_ids)
            completion.step_ends = step_ends(step_positions([*sample.prompt_ids, *token_ids], start, self._rule), start)
            completion.step_scores = [score] * len(completion.step_ends)
        return completion

    def _drop(self, samples: list[Sample]) -> None:
        for sample in samples:
            del self.running[sample], self._written[sample]

    def _load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        raise RuntimeError("there are no weights")

    def _held_weights(self) -> dict[str, HeldWeight]:
        return {}
