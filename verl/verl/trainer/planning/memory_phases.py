"""The memory that each phase of a training step takes of one GPU, and what to change where it is too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import or_
from typing import Any

from verl.models.loading import torch_dtype
from verl.models.log_probs import LOGITS_PER_CHUNK
from verl.models.lora import ALL_LINEAR, target_modules
from verl.trainer.config.fields import value_at, with_values
from verl.trainer.config.schema import ACTOR, ROOT, PPOConfig, RolloutConfig
from verl.trainer.planning.memory_estimate import (
    CHECKPOINT_BYTES,
    CONTEXT_BYTES,
    CPU_CACHE_BYTES,
    CUDA_GRAPHS_BYTES,
    FRAGMENTATION,
    HF_CACHE_SLOTS,
    Components,
    Placement,
    forward_peak,
    training_peak,
)
from verl.trainer.planning.model_shapes import ModelShape, config_of, shape_of
from verl.trainer.planning.passes import Pass, passes
from verl.workers.weight_transfer import BUCKET_BYTES

GPUS_GIB = {
    "24 GB (RTX 4090, L4)": 23.5,
    "40 GB (A100)": 39.4,
    "48 GB (L40S, A6000)": 44.4,
    "80 GB (A100, H100)": 79.1,
    "96 GB (H20)": 95.1,
    "141 GB (H200)": 139.8,
    "180 GB (B200)": 178.3,
}
"""What torch reports as the whole memory of common GPUs."""

COMMON_GPU = "80 GB (A100, H100)"

# How much more than estimated an update may take that `enable_gradient_checkpointing=auto` lets keep its activations.
MARGIN = 0.15


@dataclass(frozen=True)
class PhaseMemory:
    """Every phase's memory on one GPU."""

    config: PPOConfig
    shape: ModelShape
    """Of policy and reference."""
    critic_shape: ModelShape
    """Unused without a critic."""
    gpu_bytes: float
    """Memory of the GPU; for a run on CPU what a process may take."""

    @classmethod
    def from_config(cls, config: PPOConfig, gpu_bytes: float) -> PhaseMemory | None:
        """Of the models that a configuration names; None where a policy of its kind is not counted, or is not known."""
        if (shape := shape_of(config.actor_rollout_ref.model)) is None:
            return None
        critic_shape = shape
        if config.has_critic:
            section = config.critic.model
            if (critic := config_of(section.path, section.trust_remote_code)) is not None:
                critic_shape = ModelShape.from_config(critic)
        return cls(config, shape, critic_shape, gpu_bytes)

    @cached_property
    def checkpointing(self) -> bool:
        """`enable_gradient_checkpointing` of the policy; `auto` leaves it out where updates fit without, with room to
        spare."""
        chosen = self.config.actor_rollout_ref.model.enable_gradient_checkpointing
        if chosen != "auto":
            return chosen
        if not self.on_gpu:
            return True
        return self.without_checkpointing[1] * (1 + MARGIN) > self.gpu_bytes

    @cached_property
    def without_checkpointing(self) -> tuple[str, float]:
        """The update that takes most without checkpointing, and its bytes."""
        key = "model.enable_gradient_checkpointing"
        changes = {f"{ROOT}.{key}": False}
        if self.config.critic.model.enable_gradient_checkpointing == "auto":
            changes[f"critic.{key}"] = False
        peaks = replace(self, config=with_values(self.config, changes)).peaks
        return max(
            ((phase, peaks[phase]) for phase in ("update", "critic update") if phase in peaks), key=lambda one: one[1]
        )

    @property
    def is_separate(self) -> bool:
        """Whether rollouts have GPUs of their own."""
        return self.config.trainer.rollout_gpus > 0

    @property
    def on_gpu(self) -> bool:
        """Whether the run is one on GPUs."""
        return self.config.trainer.device != "cpu"

    @cached_property
    def models(self) -> dict[str, Placement]:
        """Those that there are, by name; the policy without its score head."""
        root, critic = self.config.actor_rollout_ref, self.config.critic
        sizes, policy = (self.config.trainer.processes, self.on_gpu), root.actor
        found = {
            "policy": Placement.from_config(
                self.shape, policy.fsdp_config, policy.optim, *sizes, adapters=self.adapter_parameters
            )
        }
        if any(self.config.reference_use) and not self.adapter_parameters:
            found["reference"] = Placement.from_config(self.shape, root.ref.fsdp_config, None, *sizes)
        if self.config.has_critic:
            found["critic"] = Placement.from_config(
                self.critic_shape, critic.model.fsdp_config, critic.optim, *sizes, has_lm_head=False
            )
        return found

    @property
    def adapter_parameters(self) -> int:
        """Parameters of the policy's adapters; 0 without any."""
        model = self.config.actor_rollout_ref.model
        names = target_modules(model)
        return self.shape.adapter_parameters(model.lora_rank, None if names == ALL_LINEAR else names)

    @cached_property
    def passes(self) -> dict[str, Pass]:
        """Of a training step, by phase."""
        return passes(self.config)

    @cached_property
    def phases(self) -> dict[str, Components]:
        """Bytes by phase and component, each phase at its highest moment; where rollouts have GPUs of their own, the
        first one is of those."""
        use, own = self.config.reference_use, self.config.critic.model.enable_gradient_checkpointing
        # The largest tensor, gathered, beside the pieces that it is put together from.
        tensor = {"tensor on its way": 2.0 * self.shape.embedding_parameters * self._engine_width}
        if self.is_separate:
            tensor["bucket"] = float(BUCKET_BYTES)
            found = {
                "rollout": self._engine(with_cache=True) | tensor,
                "weight sync": self._resident("policy") | tensor,
            }
        else:
            found = {
                "rollout": self._resident() | self._engine(with_cache=True),
                "weight sync": self._resident("policy") | self._engine(with_cache=False) | tensor,
            }
        if self.passes["log-prob"].per_step:
            found["log-prob"] = self._forward("log-prob", "policy")
        found["update"] = self._update("update", "policy", self.checkpointing)
        if use.full_kl_in_reward:
            found["log-prob"] |= self._full_kl("log-prob")
        if use.full_kl_in_loss:
            found["update"] |= self._full_kl("update")
        if use.log_probs:
            found["reference"] = self._forward("reference", "policy" if self.adapter_parameters else "reference")
        if self.config.has_critic:
            found["values"] = self._forward("values", "critic")
            checkpointing = self.checkpointing if own == "auto" else own
            found["critic update"] = self._update("critic update", "critic", checkpointing)
        if self.is_separate:
            return found
        kept = self._cuda_graphs() if self._engine_sleeps else self._engine(with_cache=True)
        return {phase: components | kept for phase, components in found.items()}

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes by phase, with what torch, CUDA and NCCL keep for themselves."""
        processes = 2 if self.config.has_critic else 1
        context = CONTEXT_BYTES * processes if self.on_gpu else 0
        return {
            phase: sum(components.values()) + context + FRAGMENTATION * self._from_torch(components)
            for phase, components in self.phases.items()
        }

    @property
    def excess(self) -> float:
        """Bytes that all phases together are over what there is, and the KV cache under what one sequence takes."""
        lacking = max(0.0, 1.0 - self.cached_sequences) * self._cache_per_token * self._longest
        return lacking + sum(max(0.0, peak - self.gpu_bytes) for peak in self.peaks.values())

    @property
    def cached_sequences(self) -> float:
        """How many sequences of full length the KV cache of one engine holds."""
        return self._engine(with_cache=True)["KV cache"] / (self._cache_per_token * self._longest)

    def _from_torch(self, components: Components) -> float:
        # vLLM takes its blocks once and for all.
        of_vllm = ("KV cache", "engine weights", "CUDA graphs")
        return sum(size for name, size in components.items() if name not in of_vllm)

    @property
    def _longest(self) -> int:
        return self.config.data.longest

    def _resident(self, used: str = "", trains: bool = False) -> Components:
        """What of the models is on the GPU while the phase of the model `used` runs."""
        found: Components = {}
        for name, model in self.models.items():
            weights, states = model.resident(name == used, name == used and trains)
            found |= {f"{name} weights": weights}
            if model.states:
                found |= {f"{name} optimiser": states}
            if name == used and trains:
                found["gradients"] = 0.0 if model.config.offload_policy else model.trained_weights
        if self.config.actor_rollout_ref.use_score:
            found["score head"] = self._score_head(used == "policy" and trains)
        return found

    def _score_head(self, trains: bool) -> float:
        # Weights and two moments in float32 wherever the policy's are; in an update the gradients and the whole head.
        head, shards = self.shape.score_head_parameters, self.models["policy"].shards
        weights, states = self.models["policy"].resident(trains, trains)
        resident = 4 * head / shards * (bool(weights) + 2 * bool(states))
        return resident + (4 * head / shards + 4 * 3 * head if trains else 0)

    def tokens(self, phase: str) -> int:
        """Of one GPU in the largest micro-batch of a phase."""
        return self.passes[phase].most_tokens(self._longest)

    def chunk(self, phase: str) -> int:
        """Logits that exist at once where these tokens go through the LM head."""
        return min(LOGITS_PER_CHUNK, self.tokens(phase) * self.shape.vocabulary)

    def _forward(self, phase: str, name: str) -> Components:
        model, packed = self.models[name], self.passes[phase].packed
        logits = self.chunk(phase) if model.has_lm_head else 0
        return self._resident(name) | forward_peak(model, self.tokens(phase), self._longest, packed, logits)

    def _update(self, phase: str, name: str, checkpointing: bool) -> Components:
        model, packed = self.models[name], self.passes[phase].packed
        logits = self.chunk(phase) if model.has_lm_head else 0
        peak = training_peak(model, self.tokens(phase), self._longest, checkpointing, packed, logits)
        return self._resident(name, trains=True) | peak

    def _full_kl(self, phase: str) -> Components:
        """What the reference has on the GPU while the policy computes the same tokens."""
        states: Components = {"reference's states": 4 * self.tokens(phase) * self.shape.hidden}
        if (reference := self.models.get("reference")) is None:
            return states
        return {
            "reference weights": reference.resident(in_use=True)[0],
            "reference's LM head": reference.gathered(in_flight=0),
            **states,
        }

    @property
    def _rollout(self) -> RolloutConfig:
        return self.config.actor_rollout_ref.rollout

    @property
    def _engine_width(self) -> int:
        return CHECKPOINT_BYTES if self._rollout.dtype == "auto" else torch_dtype(self._rollout.dtype).itemsize

    @property
    def _engine_sleeps(self) -> bool:
        is_awake = self.is_separate or not self._rollout.free_cache_engine
        return self.on_gpu and self._rollout.name == "vllm" and not is_awake

    @property
    def sleeping_weights(self) -> float:
        """Bytes of CPU memory in which this GPU's engine keeps its weights while it sleeps."""
        kept = self._engine_sleeps and self._rollout.sleep_level == 1
        return self._engine(with_cache=False)["engine weights"] if kept else 0.0

    @property
    def _cache_per_token(self) -> float:
        sharers = min(self._rollout.tensor_model_parallel_size, self.shape.kv_heads)
        return self.shape.cache_per_token * self._engine_width / sharers

    def _engine(self, with_cache: bool) -> Components:
        rollout, width, ranks = self._rollout, self._engine_width, self._rollout.tensor_model_parallel_size
        weights = self.shape.parameters * width / ranks
        if not with_cache:
            return {"engine weights": weights}
        tokens = min(rollout.max_num_batched_tokens, rollout.max_num_seqs * self._longest)
        work = tokens * (3 * self.shape.mlp / ranks + 4 * self.shape.hidden) * width
        # Sampling: logits in float32, their log-probs, and a sorted copy.
        work = max(work, 3 * 4 * rollout.max_num_seqs * self.shape.vocabulary)
        if rollout.name == "hf":
            cache = self._cache_per_token * min(HF_CACHE_SLOTS, rollout.max_num_seqs * self._longest)
        elif self.on_gpu:
            graphs = sum(self._cuda_graphs().values())
            cache = max(0.0, rollout.gpu_memory_utilization * self.gpu_bytes - weights - work - graphs)
        else:
            cache = min(CPU_CACHE_BYTES, rollout.max_num_seqs * self._longest * self._cache_per_token)
        return {"engine weights": weights, "engine work space": work, "KV cache": cache} | self._cuda_graphs()

    def _cuda_graphs(self) -> Components:
        # They stay when the engine sleeps.
        has_graphs = self.on_gpu and self._rollout.name == "vllm" and not self._rollout.enforce_eager
        return {"CUDA graphs": CUDA_GRAPHS_BYTES} if has_graphs else {}


def changes_to_fit(memory: PhaseMemory) -> dict[str, Any] | None:
    """Overrides with which a configuration that does not fit would, mildest first; None where none help enough."""
    chosen: list[dict[str, Any]] = []
    excess = memory.excess
    for change in _remedies(memory):
        if (left := _excess(memory, [*chosen, change])) < excess:
            chosen, excess = [*chosen, change], left
        if excess <= 0:
            break
    else:
        return None
    for change in list(chosen):
        fewer = [other for other in chosen if other is not change]
        if _excess(memory, fewer) <= 0:
            chosen = fewer
    return {key: value for key, value in _together(chosen).items() if value_at(memory.config, key) != value}


def _excess(memory: PhaseMemory, changes: list[dict[str, Any]]) -> float:
    return replace(memory, config=with_values(memory.config, _together(changes))).excess


def _together(changes: list[dict[str, Any]]) -> dict[str, Any]:
    return reduce(or_, changes, {})


def _remedies(memory: PhaseMemory) -> Iterator[dict[str, Any]]:
    """Changes that save memory, those that cost least speed first."""
    rollout, longest = memory.config.actor_rollout_ref.rollout, memory.config.data.longest
    sp_size = memory.config.actor_rollout_ref.actor.ulysses_sequence_parallel_size
    if not memory.is_separate:
        yield {f"{ROOT}.rollout.free_cache_engine": True}
    yield {f"{ACTOR}.fsdp_config.fsdp_size": -1, f"{ROOT}.ref.fsdp_config.fsdp_size": -1}
    yield {f"{ROOT}.model.use_remove_padding": True}
    yield {f"{ROOT}.model.enable_gradient_checkpointing": True}
    yield {f"{ACTOR}.fsdp_config.reshard_after_forward": True}
    yield {f"{ROOT}.ref.fsdp_config.param_offload": True}
    yield _log_prob_budgets(-(-longest // sp_size))
    yield _update_budget(-(-longest // sp_size))
    for part in ("optimizer_offload", "param_offload"):
        if memory.config.has_critic:
            yield {f"critic.model.fsdp_config.{part}": True}
        yield {f"{ACTOR}.fsdp_config.{part}": True}
    if memory.adapter_parameters:
        # A base in CPU memory takes a sixth of what a model that is trained takes there.
        offloads = {"offload_policy": True, "param_offload": False, "optimizer_offload": False}
        yield {f"{ACTOR}.fsdp_config.{key}": value for key, value in offloads.items()}
    for share in (0.8, 0.7, 0.6, 0.5, 0.4):
        if share < rollout.gpu_memory_utilization:
            yield {f"{ROOT}.rollout.gpu_memory_utilization": share}
    trainer = memory.config.trainer
    sharers = trainer.rollout_gpus_per_node if memory.is_separate else trainer.n_gpus_per_node
    for size in _divisors(memory, rollout.tensor_model_parallel_size, sharers):
        yield {f"{ROOT}.rollout.tensor_model_parallel_size": size}
    for size in _divisors(memory, sp_size, trainer.n_gpus_per_node):
        yield {
            f"{ROOT}.model.use_remove_padding": True,
            f"{ACTOR}.ulysses_sequence_parallel_size": size,
            f"{ROOT}.ref.ulysses_sequence_parallel_size": size,
            **_log_prob_budgets(-(-longest // size)),
            **_update_budget(-(-longest // size)),
        }
    yield {f"{ACTOR}.optim.name": "AdamW8bit"}


def _log_prob_budgets(tokens: int) -> dict[str, Any]:
    return {
        f"{ROOT}.ref.log_prob_use_dynamic_bsz": True,
        f"{ROOT}.ref.log_prob_max_token_len_per_gpu": tokens,
        f"{ROOT}.rollout.log_prob_use_dynamic_bsz": True,
        f"{ROOT}.rollout.log_prob_max_token_len_per_gpu": tokens,
    }


def _update_budget(tokens: int) -> dict[str, Any]:
    return {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": tokens}


def _divisors(memory: PhaseMemory, at_present: int, gpus: int) -> list[int]:
    """Larger group sizes that divide a node's GPUs and the model's heads (fewer key heads than ranks are repeated)."""
    divided = (gpus, memory.shape.heads)
    return [size for size in (2, 4, 8) if size > at_present and not any(number % size for number in divided)]
