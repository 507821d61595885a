"""Groups in flight between steps: none is lost, cut short or trained twice, with simulated engines of any speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ppo_config

from verl.checkpoints.folder import read_state, write_state
from verl.models.loading import load_tokenizer
from verl.protocol import DataProto
from verl.trainer.config.fields import with_values
from verl.trainer.config.schema import PPOConfig
from verl.trainer.ppo.curriculum import PassRateCurriculum
from verl.trainer.ppo.data import PromptData
from verl.trainer.ppo.pooled_rollouts import PooledRollouts
from verl.trainer.ppo.rollout_pool import RolloutPool
from verl.workers.reward_manager.reward import PendingReward, make_reward
from xbai.errors import UserError
from xbai.grading import Grade

ROLLOUT = "actor_rollout_ref.rollout"
SIZE, LONGEST, ROOM = 3, 12, 9
UNGRADED = 5


class Engines:
    """Each gives a token a step to its first unfinished responses, as many as it has slots. A response's first token
    says how many it wants, the others count; all are as likely as their policy's `version` says."""

    def __init__(self, shares: int, slots: int) -> None:
        self.shares, self._slots, self.version = shares, slots, 0
        self.most_groups = 0

    def __call__(self, parts: list[DataProto], wanted: int) -> list[DataProto]:
        assert len(parts) == self.shares
        rows = [self._rows(part) for part in parts]
        groups = {row["uid"] for part in rows for row in part}
        self.most_groups = max(self.most_groups, len(groups))
        assert sum(len({row["uid"] for row in part}) for part in rows) == len(groups), "a group is on two engines"
        while any(not row["ended"] for part in rows for row in part):
            for part in rows:
                for row in [row for row in part if not row["ended"]][: self._slots]:
                    self._extend(row)
            open_groups = {row["uid"] for part in rows for row in part if not row["ended"]}
            if len(groups) - len(open_groups) >= wanted:
                break
        return [self._answer(part) for part in rows]

    def _rows(self, part: DataProto) -> list[dict[str, Any]]:
        columns = part.non_tensor_batch
        rows = [{key: columns[key][i] for key in columns} | {"added": [], "ended": False} for i in range(len(part))]
        for row in rows:
            assert row["token_ids"][1:].tolist() == list(range(1, len(row["token_ids"])))
        return rows

    def _extend(self, row: dict[str, Any]) -> None:
        before = [*row["token_ids"], *row["added"]]
        row["added"].append(len(before) or 1 + row["seed"] % LONGEST)
        row["ended"] = len(before) + 1 == min((*before, *row["added"])[0], ROOM)

    def _answer(self, part: list[dict[str, Any]]) -> DataProto:
        added = [np.array(row["added"], np.int32) for row in part]
        columns = {
            "token_ids": added,
            "log_probs": [np.full(len(ids), -self.version, np.float32) for ids in added],
            "has_ended": [row["ended"] for row in part],
            "step_scores": [np.full(len(row["token_ids"]) + len(row["added"]), 0.5, np.float32) for row in part],
        }
        return DataProto.from_dict(columns, meta_info={"metrics": {"timing_s/generate": 1.0}})


class Graders:
    """An odd first token is right, one of them cannot be graded; `asked` has the outcomes of all that were."""

    def __init__(self) -> None:
        self.asked: dict[str, list[bool | None]] = {}

    def launch(self, batch: DataProto, purpose: str, grades: list[Grade] | None = None) -> PendingReward:
        first = batch.batch["responses"][:, 0].tolist()
        values = [None if token == UNGRADED else float(token % 2) for token in first]
        for uid, value in zip(batch.non_tensor_batch["uid"], values, strict=True):
            self.asked.setdefault(uid, []).append(value)
        done: Future[list[Grade]] = Future()
        done.set_result([Grade(value) for value in values])
        mask = batch.batch["response_mask"]
        return PendingReward(
            [done], lambda found: make_reward(found, mask, lambda lengths, _: torch.zeros(len(lengths)))
        )


class Run:
    """Steps of a run without a model; what it draws and trains on."""

    def __init__(self, config: PPOConfig, data: PromptData, engines: Engines) -> None:
        self.config, self._data, self.engines, self.graders = config, data, engines, Graders()
        self.pool, self.step = RolloutPool(config, data), 0
        self.curriculum = PassRateCurriculum(data.train, SIZE, half_life=50, seed=0)
        self._rollouts = PooledRollouts(config, self.pool, self.graders, self.curriculum)
        self._batches, self.drawn = self._draw(), []
        self.metrics: dict[str, float] = {}

    def _draw(self) -> Iterator[dict[str, Any]]:
        rows, number = len(self._data.train), 0
        while True:
            number += 1
            chosen = [(number * SIZE + place) % rows for place in range(SIZE)]
            columns = self._data.collated([self._data.train[row] for row in chosen])
            self.drawn += [f"{number}/{row}" for row in columns["row_index"]]
            yield columns

    def next(self) -> tuple[DataProto, list[Grade] | None]:
        self.step += 1
        self.engines.version = self.step
        self.metrics = {}
        workers = SimpleNamespace(proceed=self.engines, end_rollout=lambda: None)
        return self._rollouts.next(self._batches, workers, self.step, self.metrics)

    def resumed(self) -> Run:
        """From a checkpoint, in another process, as it were."""
        other = Run(self.config, self._data, Engines(self.engines.shares, self.engines._slots))
        with TemporaryDirectory() as folder:
            write_state({"pool": self.pool.state_dict()}, Path(folder))
            other.pool.load_state_dict(read_state(Path(folder))["pool"])
        for _ in range(self.pool.drawn):
            next(other._batches)
        other.step = self.step
        return other


@pytest.fixture(scope="module")
def data(training_files: Path, tiny_model_dir: Path) -> tuple[PPOConfig, PromptData]:
    """A configuration that a test changes, and its 8 prompts."""
    overrides = [f"data.train_files={training_files}/train.parquet", "data.max_prompt_length=64"]
    overrides += [f"data.max_response_length={ROOM}", f"data.train_batch_size={SIZE}"]
    config = ppo_config([*overrides, f"actor_rollout_ref.model.path={tiny_model_dir}"])
    return config, PromptData(config, load_tokenizer(tiny_model_dir))


settings_of_runs = st.fixed_dictionaries(
    {
        f"{ROLLOUT}.mode": st.sampled_from(["sync", "partial"]),
        f"{ROLLOUT}.n": st.integers(2, 4),
        f"{ROLLOUT}.over_sampling": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        f"{ROLLOUT}.max_staleness": st.integers(1, 3),
        "algorithm.filter_groups.enable": st.booleans(),
        "algorithm.filter_groups.metric": st.sampled_from(["acc", "reward"]),
        "algorithm.filter_groups.max_num_gen_batches": st.just(0),
        "trainer.seed": st.integers(0, 9),
    }
)
engines = st.builds(Engines, st.integers(1, 3), st.integers(1, 30))


def first_tokens(batch: DataProto) -> list[int]:
    return batch.batch["responses"][:, 0].tolist()


@given(chosen=settings_of_runs, engines=engines)
@settings(deadline=None, max_examples=60)
def test_every_prompt_is_trained_on_once_and_whole(data, chosen, engines) -> None:
    config, prompts = with_values(data[0], chosen), data[1]
    rollout, filters = config.actor_rollout_ref.rollout, config.algorithm.filter_groups.enable
    run, n, gone, graded = Run(config, prompts, engines), rollout.n, [], 0.0
    for _ in range(6):
        batch, grades = run.next()
        uids, columns = batch.non_tensor_batch["uid"].tolist(), batch.batch
        mask, versions = columns["response_mask"], columns["rollout_versions"]
        assert uids == [uid for uid in uids[::n] for _ in range(n)] and len(set(uids)) == SIZE
        # Whole, or ended because it would have become too old; each token under the policy that sampled it.
        oldest = torch.where(mask, versions, 99).amin(1).view(-1, n).amin(1).repeat_interleave(n)
        assert (run.step - versions[mask]).max() <= (rollout.max_staleness if rollout.carries else 0)
        assert torch.equal(columns["rollout_log_probs"][mask], -versions[mask].float())
        for row in range(len(batch)):
            ids = columns["responses"][row][mask[row]].tolist()
            assert ids[1:] == list(range(1, len(ids)))
            is_whole = len(ids) == min(ids[0], ROOM)
            assert is_whole or (rollout.carries and oldest[row] == run.step - rollout.max_staleness)
            assert sorted(versions[row][mask[row]].tolist()) == versions[row][mask[row]].tolist()
        assert torch.allclose(columns["rollout_scores"], torch.tensor(0.5))
        # The oldest ones that are finished, in their order; nothing is lost, nothing twice.
        places = [run.drawn.index(uid) for uid in uids[::n]]
        assert places == sorted(places)
        waiting = [run.drawn.index(group.prompt["uid"]) for group in run.pool.finished]
        assert not waiting or max(places) < min(waiting)
        gone += uids[::n]
        left = [group.prompt["uid"] for group in run.pool.groups]
        alike = [uid for uid, values in run.graders.asked.items() if len({*values} - {None}) < 2]
        assert len(gone) == len(set(gone)) and not {*gone, *left} & {*alike}
        surplus = set() if rollout.carries else {*run.graders.asked} - {*gone, *alike}
        assert sorted([*gone, *left, *alike, *surplus]) == sorted(run.drawn)
        if filters:
            assert [grade.value for grade in grades] == [g for uid in uids[::n] for g in run.graders.asked[uid]]
            graded += run.metrics["rollout/gen_batches"] * SIZE
            assert len(run.graders.asked) == pytest.approx(graded)
        else:
            assert grades is None and not run.graders.asked
        if rollout.carries:
            begun = [one for group in run.pool.groups for one in group.unfinished if len(one.token_ids)]
            assert run.metrics["rollout/carried_responses"] == len(begun)
            assert run.metrics["rollout/carried_tokens"] == sum(len(one.token_ids) for one in begun)
            assert run.metrics["rollout/finished_groups_waiting"] == len(run.pool.finished)
            assert run.metrics["rollout/staleness_mean"] == pytest.approx(
                float((run.step - versions[mask]).float().mean())
            )
        else:
            assert not run.pool.groups
    if rollout.carries:
        assert engines.most_groups <= SIZE + math.ceil(rollout.over_sampling * SIZE)


@given(chosen=settings_of_runs, engines=engines, before=st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_a_run_goes_on_from_a_checkpoint_exactly(data, chosen, engines, before: int) -> None:
    run = Run(with_values(data[0], chosen), data[1], engines)
    for _ in range(before):
        run.next()
    resumed = run.resumed()
    for _ in range(3):
        (expected, _), (found, _) = run.next(), resumed.next()
        assert found.non_tensor_batch["uid"].tolist() == expected.non_tensor_batch["uid"].tolist()
        assert found.non_tensor_batch["reward_model"].tolist() == expected.non_tensor_batch["reward_model"].tolist()
        assert found.batch.keys() == expected.batch.keys()
        assert all(torch.equal(found.batch[key], expected.batch[key]) for key in expected.batch.keys())  # noqa: SIM118
        counts = [
            {key: value for key, value in metrics.items() if key.startswith("rollout/")}
            for metrics in (run.metrics, resumed.metrics)
        ]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("mode", ["sync", "partial"])
def test_the_curriculum_is_told_once_of_all_that_is_graded(data, mode: str) -> None:
    changes = {"algorithm.filter_groups.enable": True, f"{ROLLOUT}.n": 2, f"{ROLLOUT}.mode": mode}
    run = Run(with_values(data[0], changes), data[1], Engines(1, 9))
    told, dropped = [], 0.0
    run.curriculum.observe = lambda step, rows, correct, graded: told.append((rows[0], correct[graded].tolist()))
    while not dropped or (mode == "partial" and not run.pool.finished):
        run.next()
        dropped += run.metrics["rollout/groups_without_signal"]
    # A checkpoint has no grades, so that what waits is graded again.
    resumed = run.resumed()
    resumed.curriculum.observe = run.curriculum.observe
    again = {group.prompt["uid"] for group in run.pool.finished}
    resumed.next()
    asked = [*run.graders.asked.items(), *((uid, v) for uid, v in resumed.graders.asked.items() if uid not in again)]
    expected = [(int(uid.split("/")[1]), [value for value in values if value is not None]) for uid, values in asked]
    assert sorted(told) == sorted(expected)


def test_a_prompt_is_in_flight_once_while_there_are_others(data) -> None:
    changes = {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.max_num_gen_batches": 0}
    run = Run(with_values(data[0], changes | {f"{ROLLOUT}.mode": "partial", f"{ROLLOUT}.n": 2}), data[1], Engines(2, 1))
    dropped, before = [], 0

    def leave_out(rows: Iterable[int]) -> None:
        nonlocal dropped
        in_step = list(run.graders.asked.items())[before:]
        dropped = [int(uid.split("/")[1]) for uid, values in in_step if len({*values} - {None}) < 2]
        assert list(rows) == [*(group.prompt["row_index"] for group in run.pool.groups), *dropped]

    run.curriculum.leave_out = leave_out
    while not dropped:
        before = len(run.graders.asked)
        run.next()


def test_responses_of_another_shape_are_left_out(data, caplog: pytest.LogCaptureFixture) -> None:
    partial = {f"{ROLLOUT}.mode": "partial", f"{ROLLOUT}.n": 4}
    run = Run(with_values(data[0], partial), data[1], Engines(1, 2))
    run.next()
    other = RolloutPool(with_values(data[0], partial | {f"{ROLLOUT}.n": 2}), data[1])
    other.load_state_dict(run.pool.state_dict())
    assert other.groups == [] and other.drawn == run.pool.drawn
    assert f"the {len(run.pool.groups)} prompts in flight are left out" in caplog.text


def test_too_few_groups_with_a_signal_end_the_run(data, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.max_num_gen_batches": 2}
    run = Run(with_values(data[0], changes), data[1], Engines(1, 9))
    monkeypatch.setattr("test_rollout_pool.UNGRADED", None)
    monkeypatch.setattr(Engines, "_extend", lambda _, row: row.update(added=[1], ended=True))
    with pytest.raises(UserError, match=r"of 6 prompts only 0 have responses that differ in acc, and a step needs"):
        run.next()
