"""The groups that are in flight between the steps of a run: prompts with what there is of their responses."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl.models.identical_rows import DistinctRows
from verl.protocol import DataProto
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.data import PromptData
from verl.workers.rollout.response_batch import padded, response_batch
from xbai.grading import Grade
from xbai.seeds import derived_seed
from xbai.sprm import aggregate

logger = logging.getLogger(__name__)

PROMPT_TENSORS = ("input_ids", "attention_mask", "position_ids")
PER_TOKEN = ("token_ids", "log_probs", "versions")
"""Arrays of a response with a value for each of its tokens."""


_no_integers, _no_numbers = partial(np.empty, 0, np.int32), partial(np.empty, 0, np.float32)


@dataclass
class Response:
    """What there is of a response. Arrays are replaced, never changed."""

    token_ids: np.ndarray = field(default_factory=_no_integers)
    log_probs: np.ndarray = field(default_factory=_no_numbers)
    """Of each token under the policy that sampled it."""
    versions: np.ndarray = field(default_factory=_no_integers)
    """Which policy that was: the step that trains it."""
    step_scores: np.ndarray = field(default_factory=_no_numbers)
    """Of its steps, by the heads of those policies, where the engine has them."""
    has_ended: bool = False


@dataclass
class Group:
    """A prompt with its n responses."""

    prompt: dict[str, Any]
    """As the data set gives it, with `seed` and `uid`."""
    occasion: int
    """Which batch of prompts it came in, from 1."""
    responses: list[Response]
    grades: list[Grade] | None = None
    """Of its responses, where they were asked for."""
    is_counted: bool = False
    """Among the groups that were graded, perhaps before a checkpoint, which has no grades."""

    @property
    def unfinished(self) -> list[Response]:
        """Those of its responses that have not ended."""
        return [one for one in self.responses if not one.has_ended]

    @property
    def oldest_version(self) -> float:
        """Of its tokens; infinite where there is none."""
        return min((int(one.versions[0]) for one in self.responses if len(one.versions)), default=math.inf)


class RolloutPool:
    """Groups in the order in which their prompts came; each leaves it whole, in a batch, or without a signal.

    Args:
        config: reads `data.train_batch_size` and, of `actor_rollout_ref.rollout`, `n`, `response_length` and the keys
            of partial rollouts.
        data: where a checkpoint's prompts are found again.

    Attributes:
        groups: all of them.
        drawn: how many batches of prompts have come.
        filled: the step whose rollouts are all here, where they were sampled ahead of it, and the metrics of that.
    """

    def __init__(self, config: PPOConfig, data: PromptData) -> None:
        rollout = config.actor_rollout_ref.rollout
        self._data, self._shape = data, (rollout.n, rollout.response_length)
        self.groups: list[Group] = []
        self.drawn = 0
        self.filled: tuple[int, dict[str, float]] | None = None
        self._has_scores = False

    def add(self, columns: Mapping[str, Any]) -> None:
        """Take the next batch of prompts, as the loader gives it."""
        self.drawn += 1
        prompts = self._data.seeded(columns, self.drawn)
        kept = prompts.batch["attention_mask"].bool()
        for row in range(len(prompts)):
            prompt = {key: prompts.batch[key][row][kept[row]] for key in PROMPT_TENSORS}
            prompt |= {key: values[row] for key, values in prompts.non_tensor_batch.items()}
            self.groups.append(Group(prompt, self.drawn, [Response() for _ in range(self._shape[0])]))

    @property
    def finished(self) -> list[Group]:
        """The groups whose responses have all ended, oldest first."""
        return [group for group in self.groups if not group.unfinished]

    def remove(self, groups: Sequence[Group]) -> None:
        """Let groups go."""
        gone = set(map(id, groups))
        self.groups = [group for group in self.groups if id(group) not in gone]

    def requests(self, groups: Sequence[Group]) -> DataProto:
        """The unfinished responses of these groups, in a row each, as `EngineRollout.proceed` takes them.

        An engine's random streams begin with a sample, so that each part of a response has a seed of its own.
        """
        rows: dict[str, list[Any]] = {key: [] for key in ("uid", "prompt_ids", "token_ids", "step_scores", "seed")}
        for group in groups:
            prompt_ids = group.prompt["input_ids"].numpy().astype(np.int32)
            for index, one in enumerate(group.responses):
                if not one.has_ended:
                    seed = derived_seed(group.prompt["seed"], index, len(one.token_ids))
                    row = (group.prompt["uid"], prompt_ids, one.token_ids, one.step_scores, seed)
                    for values, value in zip(rows.values(), row, strict=True):
                        values.append(value)
        return DataProto.from_dict(rows)

    def extend(self, groups: Sequence[Group], answers: DataProto, version: int) -> None:
        """Take what `EngineRollout.proceed` has added to the unfinished responses of these groups under the policy of
        this `version`."""
        added, responses = answers.non_tensor_batch, [one for group in groups for one in group.unfinished]
        for row, one in enumerate(responses):
            token_ids = added["token_ids"][row]
            one.token_ids = np.concatenate([one.token_ids, token_ids])
            one.log_probs = np.concatenate([one.log_probs, added["log_probs"][row]])
            one.versions = np.concatenate([one.versions, np.full(len(token_ids), version, np.int32)])
            one.has_ended = bool(added["has_ended"][row])
            if "step_scores" in added:
                one.step_scores, self._has_scores = added["step_scores"][row], True

    def end_older_than(self, version: int) -> int:
        """End the responses of unfinished groups with a token from before this policy's `version`, but those that have
        no token yet; says how many."""
        old = [one for group in self.groups if group.oldest_version < version for one in group.unfinished]
        ended = [one for one in old if len(one.token_ids)]
        for one in ended:
            one.has_ended = True
        return len(ended)

    def batch(self, groups: Sequence[Group]) -> DataProto:
        """Rollouts of finished groups, with `rollout_versions` [B, R], -1 on padding; see `verl.protocol`."""
        prompts = DataProto.from_dict(self._data.collated([group.prompt for group in groups]))
        responses = [one for group in groups for one in group.responses]
        ids, mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        n, length = self._shape
        token_ids, log_probs = [one.token_ids for one in responses], [one.log_probs for one in responses]
        batch = response_batch(ids, mask, token_ids, log_probs, length, self._data.pad_token_id)
        columns = batch.batch
        versions = [one.versions for one in responses]
        columns["rollout_versions"] = padded(versions, columns["response_mask"], np.int32, -1)
        if self._has_scores:
            columns["rollout_scores"] = torch.tensor([aggregate(one.step_scores.tolist()) for one in responses])
        columns["kinds"] = DistinctRows.of(columns).kinds
        return DataProto(non_tensor_batch=prompts.non_tensor_batch).repeat(n).union(batch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain values, prompts by their place in the data. Grades are asked for
        again."""
        responses = [one for group in self.groups for one in group.responses]
        return {
            "drawn": self.drawn,
            "filled": self.filled,
            "shape": self._shape,
            "has_scores": self._has_scores,
            "rows": torch.tensor([group.prompt["row_index"] for group in self.groups], dtype=torch.long),
            "occasions": torch.tensor([group.occasion for group in self.groups], dtype=torch.long),
            "are_counted": torch.tensor([group.is_counted for group in self.groups], dtype=torch.bool),
            "has_ended": torch.tensor([one.has_ended for one in responses], dtype=torch.bool),
            **{name: _flat(responses, name) for name in (*PER_TOKEN, "step_scores")},
            "lengths": torch.tensor([len(one.token_ids) for one in responses], dtype=torch.long),
            "steps": torch.tensor([len(one.step_scores) for one in responses], dtype=torch.long),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave; of a run whose responses were of another number or length the prompts are
        left out, which is said."""
        self.drawn = state["drawn"]
        if tuple(state["shape"]) != self._shape:
            logger.warning(
                "the %d prompts in flight are left out: they had n=%d responses of up to %d tokens, and now n=%d, %d",
                *(len(state["rows"]), *state["shape"], *self._shape),
            )
            return
        self.filled, self._has_scores = state["filled"], state["has_scores"]
        tokens = [_cut(state[name], state["lengths"]) for name in PER_TOKEN]
        parts = zip(*tokens, _cut(state["step_scores"], state["steps"]), state["has_ended"].tolist(), strict=True)
        responses = [Response(*part) for part in parts]
        rows, n = state["rows"].tolist(), self._shape[0]
        items, occasions, are_counted = self._data.training_items(rows), state["occasions"], state["are_counted"]
        for place, (item, occasion) in enumerate(zip(items, occasions.tolist(), strict=True)):
            prompt = self._data.seeded(self._data.collated([item]), occasion).non_tensor_batch
            own = {key: prompt[key][0] for key in ("seed", "uid")}
            group = Group(item | own, occasion, responses[place * n : (place + 1) * n])
            group.is_counted = bool(are_counted[place])
            self.groups.append(group)


def _flat(responses: Sequence[Response], name: str) -> Tensor:
    return torch.from_numpy(np.concatenate([getattr(one, name) for one in (Response(), *responses)]))


def _cut(values: Tensor, lengths: Tensor) -> list[np.ndarray]:
    return [part.numpy() for part in values.split(lengths.tolist())]
