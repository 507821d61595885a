"""Two training steps of each recipe, cut to the GPUs at hand: the whole trainer, its metrics, memory and leftovers."""

from __future__ import annotations

import json
import os
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

from verl.bringup.machine import ROOT, used_mib
from verl.bringup.step import GIB, CheckFailed, Context, require, step
from verl.bringup.workload import model_folder_made_apart

STEPS = 2
MISMATCH, LOG_PROB_DIFF = 5e-3, 0.06
"""Of actor and engine, which round differently: at the recipe's temperature of 0.6, log-probs of 28 layers of random
weights are 0.03 from float32 in bfloat16, those of trained ones less."""
MEMORY_ERROR = 0.15
PHASES = {"update": "update_actor", "log-prob": "old_log_prob"}
"""Of the dry run, and what the metrics call them."""
OF_VLLM = ("KV cache", "engine weights", "engine work space", "CUDA graphs")
NEEDS = ("ray", "vllm", "hydra", "datasets")
MEANS = (
    "The whole trainer does not get through two steps of the recipe here, although its parts do, or its engine and its "
    "actor disagree: the log of this step is the trainer's. Out of memory: `--dry-run` says what to change. "
)
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(sum(map(ord, solution_str)) % 2)
"""
"""Random text gets it half of the time, so that there are advantages."""
LEFT_MIB = 1024
PATIENCE_S = 20.0


@step(means=MEANS, needs=NEEDS, limit_s=900)
def run_of_the_1_5b_recipe(context: Context) -> str:
    """scripts/run_single_node.sh on all GPUs of this machine, responses cut short."""
    recipe = [f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={min(2, context.process_count)}"]
    return _run(context, "run_single_node.sh", model_folder_made_apart(context, None), recipe)


@step(means=MEANS + "Here one engine spans GPUs, as does a sequence.", needs=[*NEEDS, "2 devices"], limit_s=900)
def run_of_the_32b_recipe(context: Context) -> str:
    """scripts/run_multi_node.sh on this machine alone, the shape of 32B cut to a few layers, responses cut short."""
    shared = context.process_count
    recipe = [
        "trainer.nnodes=1",
        f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={shared}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={shared}",
    ]
    return _run(context, "run_multi_node.sh", model_folder_made_apart(context, shape="QwQ-32B"), recipe)


@step(means=MEANS + "Here with a critic (PPO with GAE).", needs=NEEDS, limit_s=900)
def run_with_a_critic(context: Context) -> str:
    """The recipe of 1.5B with `algorithm.adv_estimator=gae`."""
    recipe = ["actor_rollout_ref.actor.ulysses_sequence_parallel_size=1", "algorithm.adv_estimator=gae"]
    return _run(context, "run_single_node.sh", model_folder_made_apart(context, None), recipe)


@step(
    means="Memory of a GPU is still taken after all processes of the steps have ended: `nvidia-smi` names who has it. "
    "A worker that outlives its run makes the next one fail for want of memory.",
    needs=["gpu", "memory in use"],
    quick=True,
)
def memory_is_free(context: Context) -> str:
    """Every GPU has as much free memory as before the first step."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := _left_mib(context)) > LEFT_MIB and time.monotonic() < deadline:
        time.sleep(0.5)
    require(left <= LEFT_MIB, f"{left} MiB more are in use than before the first step")
    return f"{left} MiB more in use than before the first step"


def _left_mib(context: Context) -> int:
    return max(0, *(after - before for after, before in zip(used_mib(), context.used_mib, strict=True)))


def _run(context: Context, script: str, model: Path, recipe: list[str]) -> str:
    from xbai.benchmarks.make10 import SplitSizes, write_splits

    folder = context.work / f"run_{len(list(context.work.glob('run_*')))}"
    data = write_splits(folder, sizes=SplitSizes(sft_problems=8, sft=8, train=64, validation=8, test=8))
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    overrides = [
        *_small(context),
        *recipe,
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={data['train.parquet']}",
        f"custom_reward_function.path={folder / 'reward.py'}",
        f"trainer.default_local_dir={folder / 'out'}",
    ]
    # An empty address: no cluster that happens to be here is joined.
    environment = {**os.environ, "RAY_ADDRESS": ""}
    command = ["bash", str(ROOT / "scripts" / script)]
    status = subprocess.run([*command, *overrides], env=environment).returncode
    require(status == 0, f"the trainer ended with status {status}")
    last = _last_metrics(folder / "out")
    difference, mismatch = last["rollout/log_prob_diff_mean"], last["rollout/mismatch_kl"]
    require(last["actor/skipped_updates"] == 0, "a gradient is not finite")
    require(last["actor/grad_norm"] > 0, "the policy has no gradient")
    require(difference < LOG_PROB_DIFF, f"rollout/log_prob_diff_mean {difference:.2g}; at most {LOG_PROB_DIFF}")
    require(abs(mismatch) < MISMATCH, f"rollout/mismatch_kl {mismatch:.2g}; at most {MISMATCH}")
    figure = f"the second step {last['timing_s/step']:.1f} s; log-probs {difference:.2g} off the engine's"
    if not context.on_gpu:
        return figure
    printed = subprocess.run([*command, "--cfg", *overrides], check=True, env=environment, stdout=subprocess.PIPE)
    return f"{figure}; {_memory(printed.stdout.decode(), model, last)}"


def _small(context: Context) -> list[str]:
    """Overrides of a run of a minute."""
    computes = [f"actor_rollout_ref.{name}.fsdp_config.compute_dtype=bfloat16" for name in ("actor", "ref")]
    return [
        f"trainer.device={context.device}",
        f"trainer.n_gpus_per_node={context.process_count}",
        f"trainer.total_training_steps={STEPS}",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "data.val_files=null",
        "data.train_batch_size=8",
        "data.max_prompt_length=64",
        f"data.max_response_length={1024 if context.on_gpu else 32}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        "actor_rollout_ref.rollout.check_weight_sync=true",
        *computes,
    ]


def _last_metrics(folder: Path) -> dict[str, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "timing_s/step" in row]
    require(len(rows) == STEPS, f"{len(rows)} of {STEPS} steps ended")
    return rows[-1]


def _memory(config: str, model: Path, metrics: dict[str, float]) -> str:
    """What torch took at most, beside the dry run's estimate of the same configuration (YAML)."""
    from omegaconf import OmegaConf

    from verl.trainer.config.machine import smallest_gpu
    from verl.trainer.config.schema import YAML, PPOConfig
    from verl.trainer.config.validation import validated
    from verl.trainer.planning.memory_phases import PhaseMemory
    from verl.trainer.planning.model_shapes import ModelShape
    from xbai.engine.files import read_config

    shape = ModelShape.from_config(read_config(model))
    typed = validated(PPOConfig, OmegaConf.create(config), YAML)
    if (gpu_bytes := smallest_gpu()) is None:
        raise CheckFailed("no GPU is there any more")
    memory = PhaseMemory(typed, shape, shape, gpu_bytes)
    found = {}
    for phase, name in PHASES.items():
        expected = sum(size for part, size in memory.phases[phase].items() if part not in OF_VLLM) / GIB
        found[phase] = (metrics[f"perf/{name}_memory_gib"], expected)
    return judged_memory(found, is_most=find_spec("liger_kernel") is not None)


def judged_memory(found: dict[str, tuple[float, float]], is_most: bool = False) -> str:
    """The figure of GiB at the peak and as estimated, by phase; raises where they are too far apart.

    Where it `is_most`, it may be less, as with Liger's kernels, which save less for the backward pass than is counted.
    """
    figure = ", ".join(f"{phase} {peak:.1f} GiB, estimated {expected:.1f}" for phase, (peak, expected) in found.items())
    off = {phase: peak / expected - 1 for phase, (peak, expected) in found.items()}
    wrong = [phase for phase, share in off.items() if (share if is_most else abs(share)) > MEMORY_ERROR]
    require(not wrong, f"{figure}; at most {MEMORY_ERROR:.0%} apart is wanted")
    return figure
