"""Step features of files with responses, made once by a model and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from xbai.engine.feature_extractor import EncodedResponse, FeatureExtractor, resolve_layers
from xbai.engine.files import read_config, resolve_dtype
from xbai.engine.packed_batch import PackedBatch
from xbai.engine.weight_files import check_weights, load_pretrained
from xbai.errors import UserError
from xbai.measure.graded_responses import GradedResponse, read_graded_responses
from xbai.measure.options import FeatureOptions
from xbai.model_folder import load_tokenizer
from xbai.model_identity import is_same_model, model_identity
from xbai.sprm import SPRMConfig, StepRule, load_sprm_config
from xbai.sprm.step_features import FORMAT, SUFFIX, FeatureSource, StepFeatures
from xbai.sprm.steps import step_positions
from xbai.sprm.tags import THINK_OPEN

logger = logging.getLogger(__name__)


class FeatureFiles:
    """Finds the features of files in a folder, and makes those that are missing.

    Attributes:
        hidden_size: c of the model.
        sprm_config: that travels with the model, or the published form.

    Raises:
        UserError: no model folder, no step rule for its tokenizer, layers that it does not have.
    """

    def __init__(self, options: FeatureOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        config = read_config(options.model_path, options.trust_remote_code)
        check_weights(options.model_path, config)
        self.tokenizer = load_tokenizer(options.model_path, options.trust_remote_code)
        self.hidden_size = config.hidden_size
        self._max_length = config.max_position_embeddings
        self.sprm_config: SPRMConfig = load_sprm_config(options.model_path, self.tokenizer, options.lang)
        self.source = FeatureSource(
            model_identity(options.model_path, with_head=False),
            self.sprm_config.step_rule,
            resolve_layers(options.layers, config.num_hidden_layers),
            resolve_dtype(options.dtype, config),
        )

    def of(self, path: Path) -> Path:
        """The file with the features of the responses in `path`, which may be such a file itself.

        Raises:
            UserError: the file holds no graded responses, a response that is too long for the model, or features of
                another model; the features cannot be written.
        """
        if path.suffix == SUFFIX:
            self._check(path)
            return path
        stored = self.folder / f"{path.stem}-{self._digest(path)}{SUFFIX}"
        if stored.exists():
            logger.info("%s: the features of %s by this model are there already", stored, path)
        else:
            self._make(path, stored)
        return stored

    def _check(self, path: Path) -> None:
        found = StepFeatures.open(path).source
        if not is_same_model(found.model, self.source.model):
            raise UserError(
                f"{path}: features of another model, {found.model}, not of {self.options.model_path} "
                f"({self.source.model})"
            )
        if found.step_rule.to_dict() != self.source.step_rule.to_dict():
            raise UserError(f"{path}: features at the steps of another rule, lang={found.step_rule.lang}")
        missing = [str(layer) for layer in self.source.layers if layer not in found.layers]
        if missing:
            raise UserError(f"{path}: has no features of layer {', '.join(missing)}, only of {found.layers}")

    def _digest(self, path: Path) -> str:
        """Of all that decides the features and grades of a file."""
        try:
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            raise UserError(f"{path}: no such file") from None
        source = self.source.to_dict() | {"model": self.source.model.rpartition(":")[2]}
        return hashlib.sha256(json.dumps([FORMAT, source, self.options.task, content]).encode()).hexdigest()[:12]

    def _make(self, path: Path, stored: Path) -> None:
        responses = read_graded_responses(path, self.options.task)
        if not responses:
            raise UserError(f"{path}: no responses")
        _check_prompts(path, responses, self.source.step_rule)
        encoded = self._encode(path, responses)
        steps = [len(response.positions) for response in encoded]
        with StepFeatures.create(stored, self.source, steps, self.hidden_size) as found:
            prompts = [_number(hashlib.sha256(response.prompt.encode())) for response in responses]
            found.questions.copy_(torch.tensor(prompts))
            found.correct.copy_(torch.tensor([response.correct for response in responses]))
            found.graded.copy_(torch.tensor([response.graded for response in responses]))
            found.tokens.copy_(torch.tensor([len(response.ids) - response.start for response in encoded]))
            found.states.copy_(torch.tensor([state for response in encoded for state in step_states(response)]))
            self._extract(path, encoded, found)
        logger.info(
            "%s: features of %d steps of %d responses to %d prompts",
            stored, sum(steps), len(steps), len(found.questions.unique()),
        )  # fmt: skip

    def _encode(self, path: Path, responses: Sequence[GradedResponse]) -> list[EncodedResponse]:
        encoded = [encode_response(self.tokenizer, self.source.step_rule, response) for response in responses]
        longest = max(range(len(encoded)), key=lambda number: len(encoded[number].ids))
        if len(encoded[longest].ids) > self._max_length:
            raise UserError(
                f"{path}: response {longest + 1} has {len(encoded[longest].ids)} tokens with its prompt, but the "
                f"context of {self.options.model_path} holds {self._max_length} (max_position_embeddings)"
            )
        return encoded

    @cached_property
    def _extractor(self) -> FeatureExtractor:
        model = load_pretrained(
            AutoModelForCausalLM,
            self.options.model_path,
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=self.source.dtype,
            trust_remote_code=self.options.trust_remote_code,
        )
        return FeatureExtractor(model, self.source.layers, self.options.max_batch_tokens)

    def _extract(self, path: Path, encoded: Sequence[EncodedResponse], into: StepFeatures) -> None:
        # Responses to a prompt one after the other: a batch computes it once. Equal ones, of which a confident model
        # samples many, are computed once too.
        equal: dict[tuple[int, int], list[int]] = {}
        for number in into.questions.argsort(stable=True).tolist():
            ids = hashlib.sha256(array("q", encoded[number].ids))
            equal.setdefault((encoded[number].start, _number(ids)), []).append(number)
        starts = into.starts.tolist()
        with _progress(path, sum(len(encoded[numbers[0]].ids) for numbers in equal.values())) as advance:
            for batch, copies in self._batches(encoded, list(equal.values())):
                responses = [encoded[numbers[0]] for numbers in copies]
                for numbers, found in zip(copies, self._extractor.run(batch, responses), strict=True):
                    for number in numbers:
                        into.features[starts[number] : starts[number] + len(found.features)] = found.features
                        into.mean_log_prob[number] = found.mean_log_prob
                advance(sum(len(response.ids) for response in responses))

    def _batches(
        self, encoded: Sequence[EncodedResponse], equal: Sequence[list[int]]
    ) -> Iterator[tuple[PackedBatch, list[list[int]]]]:
        """Full batches, each with the numbers of those that are equal to each of its responses."""
        batch = self._extractor.new_batch()
        copies: list[list[int]] = []
        for numbers in equal:
            if not batch.add(encoded[numbers[0]].ids):
                yield batch, copies
                batch, copies = self._extractor.new_batch(), []
                batch.add(encoded[numbers[0]].ids)
            copies.append(numbers)
        yield batch, copies


def encode_response(tokenizer: PreTrainedTokenizerBase, rule: StepRule, response: GradedResponse) -> EncodedResponse:
    """The tokens that the score service scores, and where the features of its steps are."""
    prompt_ids, ids = (
        tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in (response.prompt, response.response)
    )
    whole, start = [*prompt_ids, *ids], len(prompt_ids)
    return EncodedResponse(whole, start, step_positions(whole, start, rule))


def step_states(response: EncodedResponse) -> Iterator[int]:
    """Of each step a number of all tokens up to it."""
    hashed, start = hashlib.sha256(), 0
    for position in response.positions:
        hashed.update(array("q", response.ids[start : position + 1]))
        start = position + 1
        yield _number(hashed)


def _number(hashed: hashlib._Hash) -> int:
    return int.from_bytes(hashed.digest()[:8], "big", signed=True)


def _check_prompts(path: Path, responses: Sequence[GradedResponse], rule: StepRule) -> None:
    header = rule.generation_prompt.partition(THINK_OPEN)[0]
    foreign = sum(header not in response.prompt for response in responses)
    if foreign:
        logger.warning(
            "%s: %d of %d prompts lack what the model's chat template puts before a response (%r): "
            "were they written for another model?",
            path, foreign, len(responses), header,
        )  # fmt: skip


@contextmanager
def _progress(path: Path, tokens: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("features of {task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()) as progress:
        task = progress.add_task(path.name, total=tokens)
        yield lambda count: progress.advance(task, count)
