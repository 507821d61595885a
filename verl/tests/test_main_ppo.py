"""`python -m verl.trainer.main_ppo` from end to end: two processes, a tiny random model, both engines, and SIGKILL."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import lasting

from verl.trainer.plot import TRAINING_PANELS
from verl.utils.tracking import METRICS_FILE

pytestmark = pytest.mark.slow

EXPECTED = [
    "reward/mean",
    "reward/pass_rate",
    "reward/ungraded",
    "actor/entropy",
    "actor/kl_loss",
    "actor/pg_clipfrac",
    "actor/grad_norm",
    "score/grad_norm",
    "score/loss",
    "score/steps_per_response",
    "rollout/log_prob_diff_mean",
    "rollout/log_prob_diff_max",
    "response_length/mean",
    "response_length/truncated",
    "timing_s/step",
    "timing_s/generate",
    "timing_s/old_log_prob",
    "timing_s/ref",
    "timing_s/update_actor",
    "timing_s/weight_sync",
    "perf/generate_tokens_per_s",
    "perf/old_log_prob_tokens_per_s",
    "perf/ref_tokens_per_s",
    "perf/update_actor_tokens_per_s",
    "perf/generation_share",
    "perf/tflops/generate",
    "perf/tflops/update_actor",
    "perf/tflops/step",
]


@pytest.fixture(scope="module")
def overrides(small_run: list[str]) -> list[str]:
    """Five steps over two epochs and a half, saving after steps 2, 4 and 5, validating at the end."""
    return [*small_run, "trainer.total_training_steps=5", "trainer.save_freq=2", "trainer.test_freq=5"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, overrides: list[str], start_run: Callable[..., Any]) -> Any:
    """The run that all others are compared with; alone of them it is watched."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    kept = f"trainer={{rollout_data_dir: {folder}/samples, log_samples_freq: 3, log_samples: 5, profile_steps: [2]}}"
    return start_run(folder, [*overrides, kept, "trainer.logger=[console,file,tensorboard]"]).finish()


def test_every_metric_is_logged_and_engine_agrees_with_actor(uninterrupted):
    rows = uninterrupted.metrics()
    assert sorted(rows) == [0, 1, 2, 3, 4, 5]
    logged = {name for row in rows.values() for name in row}
    assert set(EXPECTED) <= logged
    assert rows[1]["rollout/log_prob_diff_mean"] < 1e-3
    assert rows[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-6) and rows[3]["actor/kl_loss"] > 0
    assert {"val/pass@1", "val/auc", "val/best_of_2"} <= set(rows[5])
    drawn = {name.replace("best_of_8", "best_of_2") for panel in TRAINING_PANELS for name in panel.lines}
    assert drawn <= logged, "the figure leaves out what is not logged"
    samples = [
        json.loads(line)
        for line in (uninterrupted.folder / "samples" / "3.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(samples) == 16
    assert samples[0]["prompt"].startswith("<|im_start|>user\nMake 10 from")
    assert samples[0]["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert sum(sample["correct"] for sample in samples) / 16 == rows[3]["reward/pass_rate"]


def test_profiled_steps_have_a_trace_of_each_phase_and_rank(uninterrupted):
    folder = uninterrupted.folder / "profile"
    phases = ("weight_sync", "generate", "old_log_prob", "ref", "update_actor")
    expected = {f"step_2/rank_{rank}_{phase}.json.gz" for rank in range(2) for phase in phases}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.gz")} == expected
    assert f"traces of step 2, for ui.perfetto.dev or chrome://tracing: {folder}/step_2" in uninterrupted.log()
    for phase, operation in (("generate", "aten::linear"), ("update_actor", "autograd::engine::evaluate_function")):
        with gzip.open(folder / "step_2" / f"rank_1_{phase}.json.gz", "rt", encoding="utf-8") as trace:
            assert operation in trace.read()


def test_some_samples_are_in_the_loggers_tables(uninterrupted):
    events = EventAccumulator(str(uninterrupted.folder / "tensorboard")).Reload()
    (table,) = events.Tensors("samples/text_summary")
    shown = table.tensor_proto.string_val[0].decode()
    assert table.step == 3
    assert shown.count("**response**") == shown.count("**step_scores**") == 5


def test_killed_during_a_save_it_goes_on_exactly(uninterrupted, overrides, tmp_path, start_run):
    run = start_run(tmp_path, overrides)
    run.kill_when(lambda: any(tmp_path.glob(".global_step_4.*.tmp")))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "2"
    assert any(tmp_path.glob(".global_step_4.*.tmp"))
    # What was logged after the checkpoint is logged anew.
    assert max(run.metrics()) == 4

    resumed = start_run(tmp_path, overrides).finish()
    assert "going on from" in resumed.log()
    assert not any(tmp_path.glob(".global_step_*.tmp"))
    expected = {step: lasting(row) for step, row in uninterrupted.metrics().items()}
    assert {step: lasting(row) for step, row in resumed.metrics().items()} == expected
    assert [
        json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    ] == [*range(6)]


def test_nothing_left_to_do(uninterrupted, overrides, start_run):
    before = uninterrupted.metrics()
    assert "nothing left to do: step 5 of 5" in start_run(uninterrupted.folder, overrides).finish().log()
    assert uninterrupted.metrics() == before


def test_one_rank_gives_the_metrics_of_two(uninterrupted, overrides, tmp_path, start_run):
    changes = ["trainer.n_gpus_per_node=1", "trainer.total_training_steps=1", "trainer.val_before_train=false"]
    one = start_run(tmp_path, [*overrides, *changes]).finish().metrics()[1]
    two = uninterrupted.metrics()[1]
    for name in ("actor/loss", "actor/pg_loss", "actor/kl_loss", "score/loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6)
    for name in ("actor/grad_norm", "score/grad_norm", "actor/entropy", "reward/mean"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)


@pytest.mark.long
def test_vllm_rollout_follows_the_actor(overrides, tmp_path, start_run):
    rows = start_run(tmp_path, [*overrides, "actor_rollout_ref.rollout.name=vllm"]).finish().metrics()
    assert sorted(rows) == [0, 1, 2, 3, 4, 5]
    # After two updates at this learning rate an engine with stale weights would be off by far more.
    assert max(rows[step]["rollout/log_prob_diff_mean"] for step in range(1, 6)) < 1e-3
    assert rows[3]["actor/ref_kl"] > 0.01
    # The engine scores its samples with the head that is trained.
    scored = [row for row in rows.values() if "rollout/score_mean" in row]
    means = [[row[name] for name in ("score/score_right", "score/score_wrong") if name in row] for row in scored]
    assert min(map(len, means)) == 1, "no batch whose mean is known"
    for row, known in zip(scored, means, strict=True):
        assert min(known) - 1e-4 <= row["rollout/score_mean"] <= max(known) + 1e-4
