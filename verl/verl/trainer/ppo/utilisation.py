"""How much of what the GPUs could compute a training step uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from verl.models.identical_rows import DistinctRows
from verl.models.loading import torch_dtype
from verl.protocol import DataProto
from verl.trainer.config.schema import PPOConfig
from verl.trainer.planning.model_shapes import shape_of
from verl.utils.device_peaks import peak_tflops
from verl.workers.placed_model import Dtypes

# The backward pass makes two products where the forward pass makes one: a matrix's gradient and its input's.
TRAINING = 3


class Utilisation:
    """Model FLOPs of each phase: what real tokens ask of the decoder's matrices and of causal attention.

    Neither padding nor what checkpointing computes again counts, nor do the small heads for scores and values, nor
    ReMax's greedy responses. The LM head counts for response tokens alone, and a prompt once for all its responses in
    the rollout, where the engine keeps it; of identical responses all are sampled, and one is computed in what follows.

    Args:
        config: the trainer's whole configuration; of a kind of model that is not known nothing is counted.
        device_name: of the GPUs, None on CPU.
    """

    def __init__(self, config: PPOConfig, device_name: str | None) -> None:
        self._config, self._device_name = config, device_name
        self._shape = shape_of(config.actor_rollout_ref.model)
        self._critic_shape = shape_of(config.critic.model) if config.has_critic else None

    def metrics(self, batch: DataProto, metrics: Mapping[str, float]) -> dict[str, float]:
        """`perf/generation_share` of the step's time (what is waited for, where sampling is ahead) and, for each phase
        that ran and `step`, `perf/mfu/{phase}`: the share of the peak that model FLOPs reach, or `perf/tflops/{phase}`,
        10^12 of them per second and GPU, where the peak is not known; from `attention_mask`, `response_mask` and
        `kinds` of the step's `batch`, and `timing_s/*` of its `metrics`.
        """
        trainer = self._config.trainer
        seconds = _seconds(metrics, are_colocated=trainer.rollout_gpus == 0)
        waited = seconds.get("rollout_wait", seconds["generate"])
        share = (waited + metrics.get("timing_s/generate_baseline", 0.0)) / seconds["step"]
        devices = {
            "generate": trainer.rollout_gpus or trainer.processes,
            "step": trainer.processes + trainer.rollout_gpus,
        }
        flops = {phase: count for phase, count in self._flops(batch).items() if phase in seconds}
        if flops:
            flops["step"] = sum(flops.values())
        found = {"perf/generation_share": share}
        for phase, count in flops.items():
            tflops = count / 1e12 / seconds[phase] / devices.get(phase, trainer.processes)
            peak = self._peak(phase)
            found |= {f"perf/tflops/{phase}": tflops} if peak is None else {f"perf/mfu/{phase}": tflops / peak}
        return found

    def _flops(self, batch: DataProto) -> dict[str, float]:
        """Of the whole job, by the name of the phase."""
        if self._shape is None:
            return {}
        lengths, responses = batch.batch["attention_mask"].sum(-1), batch.batch["response_mask"].sum(-1)
        root, use = self._config.actor_rollout_ref, self._config.reference_use
        sampled = self._shape.sequence_flops(lengths.tolist(), int(responses.sum()))
        shared = self._shape.sequence_flops((lengths - responses).tolist(), 0) * (1 - 1 / root.rollout.n)
        distinct = DistinctRows.of_kinds(batch.batch["kinds"]).rows
        lengths, responses = lengths[distinct], responses[distinct]
        forward = self._shape.sequence_flops(lengths.tolist(), int(responses.sum()))
        found = {
            "generate": sampled - shared,
            "old_log_prob": forward * (1 + use.full_kl_in_reward),
            "ref": forward,
            "update_actor": forward * (TRAINING + use.full_kl_in_loss) * root.actor.ppo_epochs,
        }
        if self._critic_shape is not None:
            values = self._critic_shape.sequence_flops(lengths.tolist(), 0)
            found |= {"values": values, "update_critic": values * TRAINING * self._config.critic.ppo_epochs}
        return found

    def _peak(self, phase: str) -> float | None:
        if self._config.trainer.device_tflops is not None:
            return self._config.trainer.device_tflops
        return peak_tflops(self._device_name, self._dtype(phase))

    def _dtype(self, phase: str) -> torch.dtype:
        root = self._config.actor_rollout_ref
        if phase == "generate":
            # Checkpoints whose own dtype is taken are in 16 bits.
            return torch.bfloat16 if root.rollout.dtype == "auto" else torch_dtype(root.rollout.dtype)
        critic = self._config.critic.model.fsdp_config
        sections = {"ref": root.ref.fsdp_config, "values": critic, "update_critic": critic}
        section = sections.get(phase, root.actor.fsdp_config)
        return Dtypes.from_config(section, self._device_name is not None).compute


def _seconds(metrics: Mapping[str, float], are_colocated: bool) -> dict[str, float]:
    """By phase; of sampling what the slowest engine takes, without the weights' way to the engines, which engines in
    the policy's processes fetch within it."""
    found = {name.removeprefix("timing_s/"): value for name, value in metrics.items() if name.startswith("timing_s/")}
    return found | {"generate": found["rollout"] - (found["weight_sync"] if are_colocated else 0.0)}
