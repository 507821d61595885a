"""What an engine is: requests in, completions out, scores and weight updates; validation common to all of them."""

from __future__ import annotations

import hashlib
import random
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xbai.engine.detokenizer import Detokenizer
from xbai.engine.files import LM_HEAD, meta_model, weight_shapes
from xbai.engine.scorer import HEAD_PREFIX, PromptTooLong, Scored, Scorer, head_shapes
from xbai.engine.weight_check import HeldWeight, WeightCheck
from xbai.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from xbai.sprm import StepRule


_NO_HEAD = "scores: this engine was loaded without a score head (score_module.pt beside the model)"


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
        first: number of the first sample, so that a request can be made in parts: its `n` are first, first + 1, ...
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
    first: int = 0
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
    """One sampled response; `token_ids` include the token that ends it or completes a stop string.

    Attributes:
        finish_reason: `stop` (end of sequence or turn, or a stop string), `stop_token` (one of `stop_token_ids`), or
            `length`.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    log_probs: list[float] | None = None
    step_scores: list[float] | None = None


@dataclass(frozen=True)
class Sample:
    """One of a request's `n` completions to be: what an implementation schedules.

    Attributes:
        end_ids: tokens that end it and are not in its text.
    """

    request_id: str
    index: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int | None
    return_scores: bool = False
    end_ids: frozenset[int] = frozenset()

    @property
    def key(self) -> str:
        """Unique among the unfinished samples."""
        return f"{self.request_id}/{self.index}"


@dataclass
class _Request:
    samples: list[Sample]
    return_scores: bool
    completions: dict[int, Completion] = field(default_factory=dict)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to where the first of the stop strings begins."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def sample_seed(seed: int, index: int) -> int:
    """The seed of a request's sample `index`: 63 bits, well mixed, the same on every platform."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
    """

    prompt_tokens = 0
    cached_prompt_tokens = 0
    max_num_seqs = 1
    _head_is_fused = False
    """Whether the language model has the score head inside: `_load_weights` then gets the head's weights too."""

    def __init__(
        self,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int,
        scorer: Scorer | None,
        seed: int | None = None,
        trust_remote_code: bool = False,
        end_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.detokenize = Detokenizer(tokenizer)
        self.vocab_size: int = config.vocab_size
        self.max_model_len = max_model_len
        self.scorer = scorer
        self._head_shapes = head_shapes(scorer.head) if scorer else {}
        self._config = config
        self._trust_remote_code = trust_remote_code
        self._end_ids = set(end_ids)
        self._requests: dict[str, _Request] = {}
        self._seeds = None if seed is None else random.Random(seed)

    @property
    def step_rule(self) -> StepRule | None:
        """The rule that finds the steps, None without a score head."""
        return self.scorer.step_rule if self.scorer else None

    def check(self, prompt_ids: list[int], params: SamplingParams, return_scores: bool = False) -> None:
        """Raise what `add_request` would of these."""
        self._check_ids(prompt_ids, most=self.max_model_len - 1)
        if (wrong := self._outside_vocabulary(params.stop_token_ids)) is not None:
            raise UserError(f"stop_token_ids: {wrong} is outside the vocabulary of {self.vocab_size}")
        self.detokenize.stop_ids(params.stop)
        if return_scores and self.step_rule is None:
            raise UserError(_NO_HEAD)

    def add_request(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, return_scores: bool = False
    ) -> None:
        """Queue a request; `step` returns its completions once all `n` are finished.

        Raises:
            PromptTooLong: the prompt leaves no room for a response.
            UserError: an empty prompt, a token outside the vocabulary, a stop string that no text can have, or scores
                asked of an engine without a head.
            ValueError: a request of this id is unfinished.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is still unfinished")
        self.check(prompt_ids, params, return_scores)
        params = replace(params, max_tokens=min(params.max_tokens, self.max_model_len - len(prompt_ids)))
        seed = params.seed
        if seed is None and self._seeds is not None:
            seed = self._seeds.getrandbits(62)
        end_ids = self.detokenize.stop_ids(params.stop) | (set() if params.ignore_eos else self._end_ids)
        # A tokenizer may know more tokens than its model, and vLLM refuses those.
        end_ids = frozenset(i for i in end_ids if i < self.vocab_size)
        samples = [
            Sample(
                request_id,
                i,
                list(prompt_ids),
                params,
                None if seed is None else sample_seed(seed, i),
                return_scores,
                end_ids,
            )
            for i in range(params.first, params.first + params.n)
        ]
        self._enqueue(samples)
        self._requests[request_id] = _Request(samples, return_scores)

    def step(self) -> list[tuple[str, list[Completion]]]:
        """Run one iteration of the scheduler; the requests it finished, with their completions in sample order."""
        finished: list[str] = []
        for sample, completion in self._advance():
            request = self._requests[sample.request_id]
            request.completions[sample.index] = completion
            if len(request.completions) == len(request.samples):
                finished.append(sample.request_id)
        done = {request_id: self._requests.pop(request_id) for request_id in finished}
        self._add_scores([request for request in done.values() if request.return_scores])
        return [(i, [request.completions[s.index] for s in request.samples]) for i, request in done.items()]

    def abort(self, request_id: str) -> None:
        """Forget an unfinished request; unknown and finished ones are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._drop([sample for sample in request.samples if sample.index not in request.completions])

    def has_unfinished(self) -> bool:
        """Whether `step` has work."""
        return bool(self._requests)

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], return_scores: bool = False
    ) -> list[list[Completion]]:
        """Complete all prompts, on an engine with no other requests; one list of `n` completions a prompt.

        One `SamplingParams` with a seed serves every prompt with the same random streams; give a list to vary them.
        """
        if self.has_unfinished():
            raise RuntimeError("generate() needs an engine without unfinished requests; use add_request() and step()")
        each = params if isinstance(params, list) else [params] * len(prompts)
        prefix = uuid.uuid4().hex
        ids = [f"{prefix}-{i}" for i in range(len(prompts))]
        results: dict[str, list[Completion]] = {}
        try:
            for request_id, prompt_ids, chosen in zip(ids, prompts, each, strict=True):
                self.add_request(request_id, prompt_ids, chosen, return_scores)
            while self.has_unfinished():
                results.update(self.step())
        finally:
            for request_id in ids:
                self.abort(request_id)
        return [results[request_id] for request_id in ids]

    def score(self, sequences: list[list[int]], response_starts: list[int]) -> list[Scored]:
        """Step scores of whole sequences (prompt and response); see `Scorer.score`."""
        scorer = self._require_scorer()
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
            RuntimeError: requests are unfinished.
        """
        if self.has_unfinished():
            raise RuntimeError("update_weights() while requests are unfinished would mix two models in one response")
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

    def wake_up(self, parts: Sequence[str] | None = None) -> None:  # noqa: B027
        """Undo `sleep`, save for weights that it dropped; of `weights` and `kv_cache` only those named (None: both)."""

    def watch(self, on_failure: Callable[[], None]) -> None:  # noqa: B027
        """Have `on_failure` called, from any thread, when another process of the engine's has ended."""

    def close(self) -> None:  # noqa: B027
        """Free what the engine holds; it cannot be used afterwards."""

    @abstractmethod
    def _enqueue(self, samples: list[Sample]) -> None:
        """Schedule new samples; those with `return_scores` may come back with scores, or get them by `score`."""

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
        expected = self._weight_shapes | self._head_shapes
        missing = set(self._weight_shapes) - ({LM_HEAD} if self._config.tie_word_embeddings else set())
        for name, tensor in weights:
            is_of_head = name.startswith(HEAD_PREFIX)
            if is_of_head and not self._head_shapes:
                continue
            if expected.get(name) != tensor.shape:
                wanted = f"shape {tuple(expected[name])}" if name in expected else "no such weight"
                raise UserError(f"update_weights: {name} has shape {tuple(tensor.shape)}, the model has {wanted}")
            if self.scorer is not None:
                self.scorer.load_weight(name, tensor)
            missing.discard(name)
            if self._head_is_fused or not is_of_head:
                yield name, tensor
        if missing:
            raise UserError(f"update_weights: {len(missing)} weights were not given, first {min(missing)}")

    @cached_property
    def _weight_shapes(self) -> dict[str, torch.Size]:
        return weight_shapes(meta_model(self._config, self._trust_remote_code))

    def _response_text(self, sample: Sample, token_ids: Sequence[int]) -> str:
        """What a finished sample says: up to its first stop string, or to the token that ended it."""
        has_ended = bool(token_ids) and token_ids[-1] in sample.end_ids
        return cut_at_stop(self.detokenize(token_ids[:-1] if has_ended else token_ids), sample.params.stop)

    def _add_scores(self, requests: list[_Request]) -> None:
        pairs = [(s.prompt_ids, request.completions[s.index]) for request in requests for s in request.samples]
        pairs = [(prompt_ids, completion) for prompt_ids, completion in pairs if completion.step_scores is None]
        if pairs:
            sequences = [prompt_ids + completion.token_ids for prompt_ids, completion in pairs]
            scored = self._require_scorer().score(sequences, [len(prompt_ids) for prompt_ids, _ in pairs])
            for (_, completion), result in zip(pairs, scored, strict=True):
                completion.step_scores = result.step_scores

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

    def _require_scorer(self) -> Scorer:
        if self.scorer is None:
            raise UserError(_NO_HEAD)
        return self.scorer
