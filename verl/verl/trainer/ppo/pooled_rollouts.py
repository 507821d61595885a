"""A step's rollouts out of a pool: what is unfinished goes on in the next step, what has no signal is replaced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from verl.protocol import DataProto
from verl.trainer.config.schema import ROOT, PPOConfig
from verl.trainer.ppo.curriculum import PassRateCurriculum
from verl.trainer.ppo.metrics import timed
from verl.trainer.ppo.rollout_pool import Group, RolloutPool
from verl.workers.batching.seqlen_balancing import balanced_partitions
from verl.workers.reward_manager.manager import NaiveRewardManager
from verl.workers.rollout_worker import SamplingWorkers
from xbai.errors import UserError
from xbai.grading import Grade

Batches = Iterator[Mapping[str, Any]]
"""Columns of prompts, as the loader gives them, without end."""
Rollouts = tuple[DataProto, list[Grade] | None]
"""A step's batch, with the grades of its rows, where it was sampled by them."""


class PooledRollouts:
    """Partial rollouts (Kimi k1.5, arXiv 2501.12599, section 2.6.2) and dynamic sampling (DAPO, arXiv 2503.14476,
    section 3.2), each alone or both.

    With partial rollouts more groups are in flight than a step needs. It samples until it has its groups, trains on the
    oldest finished ones, and leaves the others in the pool as they are. No token of a batch is of a policy more than
    `max_staleness` steps before the one that is trained: a response that would be is ended. With `over_sampling` above
    1 more groups may end so in a step than it takes, and the rest wait for the next one. Without partial rollouts each
    step waits for all that it has begun, and the pool is empty between steps.

    With dynamic sampling, finished groups that are all right or all wrong leave the pool, and others take their place.

    Where rollouts are one step off, a step's are sampled by `fill` while the one before it trains.

    Args:
        config: the trainer's whole configuration.
        pool: what is in flight.
        reward_manager: grades the groups that may have no signal.
        curriculum: chooses the prompts, where there is one, and is told of those that are graded here.
    """

    def __init__(
        self,
        config: PPOConfig,
        pool: RolloutPool,
        reward_manager: NaiveRewardManager,
        curriculum: PassRateCurriculum | None = None,
    ) -> None:
        self._pool, self._reward_manager, self._curriculum = pool, reward_manager, curriculum
        self._rollout, self._filter = config.actor_rollout_ref.rollout, config.algorithm.filter_groups
        self._size, self._is_ahead = config.data.train_batch_size, config.one_step_off
        self._in_flight = self._size + math.ceil(self._rollout.over_sampling * self._size)

    def next(self, batches: Batches, workers: SamplingWorkers, step: int, metrics: dict[str, float]) -> Rollouts:
        """The rollouts that train in `step`, sampled by its policy; adds to `metrics`.

        Raises:
            UserError: too few groups have a signal.
        """
        self.fill(batches, workers, step, step)
        return self.take(step, metrics)

    def is_filled(self, step: int) -> bool:
        """Whether `take` has the rollouts of this step."""
        return self._pool.filled is not None and self._pool.filled[0] == step

    def fill(self, batches: Batches, workers: SamplingWorkers, step: int, version: int) -> None:
        """Have the pool hold the rollouts that train in `step`, by the policy of the step `version`.

        Raises:
            UserError: too few groups have a signal.
        """
        metrics: dict[str, float] = {}
        ended = graded = 0
        dropped: list[Group] = []
        if self._curriculum is not None:
            metrics |= self._curriculum.advance(version)
        while True:
            self._draw(batches, dropped)
            self._sample(workers, version, metrics)
            if self._rollout.carries:
                ended += self._pool.end_older_than(step - self._rollout.max_staleness + 1)
            if self._filter.enable:
                found, without_signal = self._drop_without_signal(version, metrics)
                graded, dropped = graded + found, dropped + without_signal
            if len(ready := self._pool.finished) >= self._size:
                break
            self._check_bound(graded, len(ready))
        workers.end_rollout()
        if self._rollout.carries:
            metrics["rollout/ended_by_staleness"] = float(ended)
        if self._filter.enable:
            metrics["rollout/gen_batches"] = graded / self._size
            metrics["rollout/groups_without_signal"] = float(len(dropped))
        self._pool.filled = step, metrics

    def take(self, step: int, metrics: dict[str, float]) -> Rollouts:
        """Take what `fill` was asked for out of the pool; adds to `metrics`."""
        if self._pool.filled is None or not self.is_filled(step):
            raise RuntimeError(f"the rollouts of step {step} were not sampled")
        (_, sampling), self._pool.filled = self._pool.filled, None
        metrics |= sampling
        groups = self._pool.finished[: self._size]
        batch = self._pool.batch(groups)
        # What a step without partial rollouts has left would be of an older policy in the next one.
        self._pool.remove(groups if self._rollout.carries else self._pool.groups)
        if self._rollout.carries or self._is_ahead:
            metrics |= self._carried(batch, step)
        # A checkpoint has none.
        if any(group.grades is None for group in groups):
            return batch, None
        return batch, [grade for group in groups for grade in group.grades or ()]

    @property
    def _most_in_flight(self) -> int:
        return self._in_flight if self._rollout.carries else len(self._pool.finished) + self._size

    def _draw(self, batches: Batches, dropped: Sequence[Group]) -> None:
        """Have as many groups in flight as may be, of prompts that are not there yet, nor `dropped` in this step."""
        while len(self._pool.groups) < self._most_in_flight:
            if self._curriculum is not None:
                self._curriculum.leave_out(group.prompt["row_index"] for group in (*self._pool.groups, *dropped))
            self._pool.add(next(batches))

    def _sample(self, workers: SamplingWorkers, version: int, metrics: dict[str, float]) -> None:
        """Go on with what is in flight until the groups are there that are missing."""
        pool, ready = self._pool, len(self._pool.finished)
        unfinished = [group for group in pool.groups[: self._most_in_flight] if group.unfinished]
        wanted = max(1, self._size - ready) if self._rollout.carries else len(unfinished)
        work = [len(group.unfinished) for group in unfinished]
        shares = balanced_partitions(work, workers.proceed.shares, equally_many=False)
        parts = [[unfinished[place] for place in share] for share in shares]
        spent: dict[str, float] = {}
        with timed("rollout", spent):
            answers = workers.proceed([pool.requests(part) for part in parts], wanted)
        for part, answer in zip(parts, answers, strict=True):
            pool.extend(part, answer, version)
        add_times(metrics, answers[0].meta_info["metrics"] | spent)

    def _drop_without_signal(self, version: int, metrics: dict[str, float]) -> tuple[int, list[Group]]:
        """Grade the finished groups that have no grades, and drop those whose graded responses are all alike; says how
        many were graded that had not been before, and which were dropped."""
        if not (groups := [group for group in self._pool.finished if group.grades is None]):
            return 0, []
        spent: dict[str, float] = {}
        with timed("filter_groups", spent):
            pending = self._reward_manager.launch(self._pool.batch(groups), "training")
            reward, grades = pending.result(), pending.grades()
        add_times(metrics, spent)
        n = self._rollout.n
        values = reward.correct if self._filter.metric == "acc" else reward.reward_tensor.sum(-1)
        found, without_signal = sum(not group.is_counted for group in groups), []
        for place, group in enumerate(groups):
            rows = slice(place * n, (place + 1) * n)
            if self._curriculum is not None and not group.is_counted:
                prompts = [group.prompt["row_index"]] * n
                self._curriculum.observe(version, prompts, reward.correct[rows], reward.graded[rows])
            group.is_counted = True
            group.grades = grades[rows]
            if len(values[rows][reward.graded[rows]].unique()) < 2:
                without_signal.append(group)
        self._pool.remove(without_signal)
        return found, without_signal

    def _check_bound(self, graded: int, ready: int) -> None:
        most = self._filter.max_num_gen_batches
        if most and graded >= most * self._size:
            raise UserError(
                f"algorithm.filter_groups: of {graded} prompts only {ready} have responses that differ in "
                f"{self._filter.metric}, and a step needs data.train_batch_size={self._size}; take prompts that are "
                f"neither too easy nor too hard, raise {ROOT}.rollout.n={self._rollout.n} or "
                f"algorithm.filter_groups.max_num_gen_batches={most} (0: no bound)"
            )

    def _carried(self, batch: DataProto, step: int) -> dict[str, float]:
        ages = (step - batch.batch["rollout_versions"][batch.batch["response_mask"]]).float()
        begun = [len(one.token_ids) for group in self._pool.groups for one in group.unfinished if len(one.token_ids)]
        return {
            "rollout/staleness_mean": float(ages.mean()),
            "rollout/staleness_max": float(ages.max()),
            "rollout/carried_responses": float(len(begun)),
            "rollout/carried_tokens": float(sum(begun)),
            "rollout/finished_groups_waiting": float(len(self._pool.finished)),
        }


def add_times(metrics: dict[str, float], found: Mapping[str, float]) -> None:
    """Add the seconds in `found` to those in `metrics`, and take of other metrics the latest."""
    for name, value in found.items():
        metrics[name] = value + metrics.get(name, 0.0) if name.startswith("timing_s/") else value
