"""What an engine is: samples in, completions out, scores and weight updates; validation common to all of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, count
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from xbai.engine.detokenizer import Detokenizer
from xbai.engine.end_tokens import end_token_ids
from xbai.engine.files import (
    LM_HEAD,
    ModelOptions,
    meta_model,
    read_config,
    resolve_dtype,
    resolve_head_dtype,
    resolve_max_model_len,
    weight_shapes,
)
from xbai.engine.sample import Completion, Sample, SamplingParams
from xbai.engine.scorer import HEAD_PREFIX, PromptTooLong, Scored, Scorer, head_shapes
from xbai.engine.weight_check import HeldWeight, WeightCheck
from xbai.errors import UserError
from xbai.model_folder import load_tokenizer
from xbai.seeds import sample_seed
from xbai.sprm.steps import step_ends

if TYPE_CHECKING:
    from xbai.sprm import StepRule

EnginePart = Literal["weights", "kv_cache"]

_NO_HEAD = "scores: this engine was loaded without a score head (score_module.pt beside the model)"


class Engine(ABC):
    """A model that generates with continuous batching, scores, and takes new weights.

    Not thread-safe: one thread owns an engine.

    Attributes:
        tokenizer: the model's tokenizer.
        detokenize: makes the text of a response.
        max_model_len: most tokens of prompt plus response.
        step_rule: the score head's step rule; None for an engine without scores.
        prompt_tokens: of all samples finished so far.
        cached_prompt_tokens: how many of these were not computed, because another sample's prompt began with them.
        max_num_seqs: most samples at work at once; more than these only wait.
        after_iteration: called after each iteration of the scheduler, by whoever watches the engine.
    """

    prompt_tokens = 0
    cached_prompt_tokens = 0
    max_num_seqs = 1
    after_iteration: Callable[[], None] | None = None

    def __init__(self, model: ModelOptions) -> None:
        """Read all of the folder but weights, which each engine loads its own way."""
        self._options = model
        self._config = read_config(model.model_path, model.trust_remote_code)
        self.tokenizer = load_tokenizer(model.model_path, model.trust_remote_code)
        self.detokenize = Detokenizer(self.tokenizer)
        self.vocab_size: int = self._config.vocab_size
        self.max_model_len = resolve_max_model_len(model.max_model_len, self._config)
        self._dtype = resolve_dtype(model.dtype, self._config)
        self._logits_dtype = resolve_head_dtype(model.head_dtype, self._dtype)
        self._end_ids = set(end_token_ids(model.model_path, self.tokenizer))
        self.scorer: Scorer | None = None
        # Of a score head inside the language model: `_load_weights` then gets the head's weights too.
        self._fused_shapes: dict[str, torch.Size] = {}
        self._request_numbers = count()
        self._unfinished: dict[str, Sample] = {}
        # How many tokens `with_new_step` has looked at.
        self._seen: dict[str, int] = {}
        self._seeds = None if model.seed is None else random.Random(model.seed)

    @property
    def step_rule(self) -> StepRule | None:
        """The rule that finds the steps, None without a score head."""
        return self.scorer.step_rule if self.scorer else None

    def samples(self, prompt_ids: list[int], params: SamplingParams, return_scores: bool = False) -> list[Sample]:
        """The `n` samples of a request, each to be added. Callable from any thread.

        Raises:
            PromptTooLong: the prompt leaves no room for a response.
            UserError: an empty prompt, a token outside the vocabulary, a stop string that no text can have, or scores
                asked of an engine without a head.
        """
        self._check_ids(prompt_ids, most=self.max_model_len - 1)
        if (wrong := self._outside_vocabulary(params.stop_token_ids)) is not None:
            raise UserError(f"stop_token_ids: {wrong} is outside the vocabulary of {self.vocab_size}")
        ends = self.detokenize.stop_ids(params.stop) | (set() if params.ignore_eos else self._end_ids)
        # A tokenizer may know more tokens than its model, and vLLM refuses those.
        end_ids = frozenset(i for i in ends if i < self.vocab_size)
        if return_scores and self.step_rule is None:
            raise UserError(_NO_HEAD)
        prompt_ids = list(prompt_ids)
        params = replace(params, max_tokens=min(params.max_tokens, self.max_model_len - len(prompt_ids)))
        seed = params.seed
        if seed is None and self._seeds is not None:
            seed = self._seeds.getrandbits(62)
        seeds = [None if seed is None else sample_seed(seed, i) for i in range(params.n)]
        request = next(self._request_numbers)
        return [
            Sample(f"{request}/{i}", i, prompt_ids, params, each, return_scores, end_ids)
            for i, each in enumerate(seeds)
        ]

    def add(self, sample: Sample) -> None:
        """Queue a sample; `step` returns its completion once it is finished.

        Raises:
            UserError: the implementation has rules of its own.
            ValueError: it is queued already.
        """
        if sample.key in self._unfinished:
            raise ValueError(f"sample {sample.key} is still unfinished")
        self._enqueue(sample)
        self._unfinished[sample.key] = sample

    def step(self) -> list[tuple[Sample, Completion]]:
        """Run one iteration of the scheduler; the samples it finished, with their completions."""
        finished = self._finished()
        self._add_scores(finished)
        return finished

    def abort(self, samples: Iterable[Sample]) -> None:
        """Forget those of the samples that are unfinished."""
        if dropped := [sample for sample in samples if self._unfinished.pop(sample.key, None)]:
            for sample in dropped:
                self._seen.pop(sample.key, None)
            self._drop(dropped)

    def with_new_step(self, samples: Iterable[Sample]) -> list[Sample]:
        """Those of the samples, unfinished or still to be added, that ended a step since they were last asked for."""
        found = []
        for sample in samples:
            token_ids, seen = self.token_ids(sample), self._seen.get(sample.key, 0)
            if len(token_ids) > seen:
                self._seen[sample.key] = len(token_ids)
                if not self._step_ids.isdisjoint(token_ids[seen:]):
                    found.append(sample)
        return found

    def so_far(self, samples: Sequence[Sample]) -> list[Completion]:
        """What unfinished samples have until now, scores included where they are to have any; the text is empty."""
        found = [(sample, self._so_far(sample)) for sample in samples]
        self._add_scores(found)
        return [completion for _, completion in found]

    def has_unfinished(self) -> bool:
        """Whether `step` has work."""
        return bool(self._unfinished)

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], return_scores: bool = False
    ) -> list[list[Completion]]:
        """Complete all prompts, on an engine with no other samples; one list of `n` completions a prompt.

        One `SamplingParams` with a seed serves every prompt with the same random streams; give a list to vary them.
        """
        if self.has_unfinished():
            raise RuntimeError("generate() needs an engine without unfinished samples; use add() and step()")
        each = params if isinstance(params, list) else [params] * len(prompts)
        requests = [self.samples(ids, chosen, return_scores) for ids, chosen in zip(prompts, each, strict=True)]
        completions: dict[Sample, Completion] = {}
        try:
            for sample in chain.from_iterable(requests):
                self.add(sample)
            while self.has_unfinished():
                completions.update(self._finished())
        finally:
            self.abort(chain.from_iterable(requests))
        self._add_scores(completions.items())
        return [[completions[sample] for sample in samples] for samples in requests]

    def score(self, sequences: list[list[int]], response_starts: list[int]) -> list[Scored]:
        """Step scores of whole sequences (prompt and response); see `Scorer.score`."""
        scorer = self.require_scorer()
        for ids in sequences:
            self._check_ids(ids, most=self.max_model_len)
        return scorer.score(sequences, response_starts)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], check: bool = False) -> None:
        """Take a whole model's weights, streamed under their Hugging Face names; the head's under `score_head.*`.

        Args:
            weights: each is released before the next one is asked for.
            check: compare what the engine then generates with, with what it was given.

        Raises:
            UserError: a name or shape that is not this model's, a weight left out (a tied LM head may be), or one that
                did not arrive as it was sent.
            RuntimeError: samples are unfinished.
        """
        if self.has_unfinished():
            raise RuntimeError("update_weights() while samples are unfinished would mix two models in one response")
        if not check:
            self._load_weights(self._checked(weights))
            return
        weight_check = WeightCheck(self._held_weights())
        self._load_weights(weight_check.watch(self._checked(weights)))
        weight_check.compare()

    def sleep(self, level: int = 2) -> None:  # noqa: B027 (optional, not abstract)
        """Give the accelerator's memory back until `wake_up`. No-op on CPU.

        Args:
            level: 1 keeps the weights in CPU memory, 2 drops them, so that they must be updated after waking up.
        """

    def wake_up(self, parts: Sequence[EnginePart] | None = None) -> None:  # noqa: B027
        """Undo `sleep`, save for weights that it dropped; of the parts only those named (None: both)."""

    def watch(self, on_failure: Callable[[], None]) -> None:  # noqa: B027
        """Have `on_failure` called, from any thread, when another process of the engine's has ended."""

    def close(self) -> None:  # noqa: B027
        """Free what the engine holds; it cannot be used afterwards."""

    @abstractmethod
    def token_ids(self, sample: Sample) -> Sequence[int]:
        """The response tokens of an unfinished sample until now, not to be changed; none of one that was not added."""

    @abstractmethod
    def _so_far(self, sample: Sample) -> Completion:
        """As `so_far`, of one sample; without scores where these take a second forward pass."""

    @abstractmethod
    def _enqueue(self, sample: Sample) -> None:
        """Schedule a new sample; one with `return_scores` may come back with scores, or gets them by `score`."""

    @abstractmethod
    def _advance(self) -> list[tuple[Sample, Completion]]:
        """Run one scheduler iteration; the samples it finished."""

    @abstractmethod
    def _drop(self, samples: list[Sample]) -> None:
        """Forget unfinished samples."""

    @abstractmethod
    def _load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load the language model's weights."""

    @abstractmethod
    def _held_weights(self) -> Mapping[str, HeldWeight]:
        """What the engine (this rank's part of it) holds of each of the language model's weights."""

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        of_head = self._fused_shapes or (head_shapes(self.scorer.head) if self.scorer else {})
        expected = self._weight_shapes | of_head
        missing = set(self._weight_shapes) - ({LM_HEAD} if self._config.tie_word_embeddings else set())
        for name, tensor in weights:
            is_of_head = name.startswith(HEAD_PREFIX)
            if is_of_head and not of_head:
                continue
            if expected.get(name) != tensor.shape:
                wanted = f"shape {tuple(expected[name])}" if name in expected else "no such weight"
                raise UserError(f"update_weights: {name} has shape {tuple(tensor.shape)}, the model has {wanted}")
            if self.scorer is not None:
                self.scorer.load_weight(name, tensor)
            missing.discard(name)
            if self._fused_shapes or not is_of_head:
                yield name, tensor
        if missing:
            raise UserError(f"update_weights: {len(missing)} weights were not given, first {min(missing)}")

    @cached_property
    def _step_ids(self) -> frozenset[int]:
        return frozenset(self.step_rule.step_ids if self.step_rule else ())

    @cached_property
    def _weight_shapes(self) -> dict[str, torch.Size]:
        return weight_shapes(meta_model(self._config, self._options.trust_remote_code))

    def _response_text(self, sample: Sample, token_ids: Sequence[int]) -> str:
        """What a finished sample says: up to its first stop string, or to the token that ended it."""
        has_ended = bool(token_ids) and token_ids[-1] in sample.end_ids
        text = self.detokenize(token_ids[:-1] if has_ended else token_ids)
        return text[: min((text.index(stop) for stop in sample.params.stop if stop in text), default=len(text))]

    def _finished(self) -> list[tuple[Sample, Completion]]:
        """As `step`, but scores that take a second forward pass are still missing."""
        finished = self._advance()
        for sample, _ in finished:
            del self._unfinished[sample.key]
            self._seen.pop(sample.key, None)
        if self.after_iteration is not None:
            self.after_iteration()
        return finished

    def _add_scores(self, finished: Iterable[tuple[Sample, Completion]]) -> None:
        pairs = [(sample, one) for sample, one in finished if sample.return_scores and one.step_scores is None]
        if pairs:
            sequences = [sample.prompt_ids + completion.token_ids for sample, completion in pairs]
            scored = self.require_scorer().score(sequences, [len(sample.prompt_ids) for sample, _ in pairs])
            for (sample, completion), result in zip(pairs, scored, strict=True):
                completion.step_scores = result.step_scores
                completion.step_ends = step_ends(result.positions, len(sample.prompt_ids))

    def _check_ids(self, ids: list[int], most: int) -> None:
        if not ids:
            raise UserError("prompt: at least one token is needed")
        if len(ids) > most:
            raise PromptTooLong(
                f"prompt: {len(ids)} tokens, but at most {most} fit (max_model_len={self.max_model_len})"
            )
        if (wrong := self._outside_vocabulary(ids)) is not None:
            raise UserError(f"prompt: token id {wrong} is outside the vocabulary of {self.vocab_size}")

    def _outside_vocabulary(self, ids: Sequence[int]) -> int | None:
        if not ids or (min(ids) >= 0 and max(ids) < self.vocab_size):
            return None
        return next(i for i in ids if not 0 <= i < self.vocab_size)

    def require_scorer(self) -> Scorer:
        """What `score` scores with, loaded where it was not yet.

        Raises:
            UserError: there is no score head.
        """
        if self.scorer is None:
            raise UserError(_NO_HEAD)
        return self.scorer
