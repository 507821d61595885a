"""The memory that each phase of a training step takes of one GPU, and what to change where it is too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from verl.models.loading import torch_dtype
from verl.models.log_probs import LOGITS_PER_CHUNK
from verl.trainer.config.fields import value_at, with_values
from verl.trainer.config.policy import RefConfig
from verl.trainer.config.rollout import RolloutConfig
from verl.trainer.config.schema import PPOConfig
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
from verl.trainer.planning.model_shapes import MODEL_TYPES, ModelShape, config_of
from verl.workers.batching.micro_batches import MicroBatching

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
    """Every phase's memory on one GPU.

    Attributes:
        config: the whole configuration.
        shape: of policy and reference.
        critic_shape: of the critic; unused without one.
        gpu_bytes: memory of the GPU; for a run on CPU what a process may take.
    """

    config: PPOConfig
    shape: ModelShape
    critic_shape: ModelShape
    gpu_bytes: float

    @classmethod
    def from_config(cls, config: PPOConfig, gpu_bytes: float) -> PhaseMemory | None:
        """Of the models that a configuration names; None where a policy of its kind is not counted, or is not known."""
        model = config.actor_rollout_ref.model
        found = config_of(model.path, model.trust_remote_code)
        if found is None or found.model_type not in MODEL_TYPES:
            return None
        shape = critic_shape = ModelShape.from_config(found)
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
        changes = {f"actor_rollout_ref.{key}": False}
        if self.config.critic.model.enable_gradient_checkpointing == "auto":
            changes[f"critic.{key}"] = False
        peaks = replace(self, config=with_values(self.config, changes)).peaks
        return max(
            ((phase, peaks[phase]) for phase in ("update", "critic update") if phase in peaks), key=lambda one: one[1]
        )

    @property
    def world(self) -> int:
        """GPUs of the whole job."""
        return self.config.trainer.processes

    @property
    def on_gpu(self) -> bool:
        """Whether the run is one on GPUs."""
        return self.config.trainer.device != "cpu"

    @cached_property
    def policy(self) -> Placement:
        """The policy without its score head."""
        actor = self.config.actor_rollout_ref.actor
        return Placement.from_config(self.shape, actor.fsdp_config, actor.optim, self.world, self.on_gpu)

    @cached_property
    def reference(self) -> Placement | None:
        """The reference policy, where a KL divergence is asked for."""
        if not any(self.config.reference_use):
            return None
        fsdp_config = self.config.actor_rollout_ref.ref.fsdp_config
        return Placement.from_config(self.shape, fsdp_config, None, self.world, self.on_gpu)

    @cached_property
    def critic(self) -> Placement | None:
        """The critic, with gae."""
        if not self.config.has_critic:
            return None
        critic = self.config.critic
        return Placement.from_config(
            self.critic_shape, critic.model.fsdp_config, critic.optim, self.world, self.on_gpu, has_lm_head=False
        )

    @property
    def models(self) -> dict[str, Placement]:
        """Those that there are, by name."""
        found = {"policy": self.policy, "reference": self.reference, "critic": self.critic}
        return {name: model for name, model in found.items() if model is not None}

    @cached_property
    def phases(self) -> dict[str, Components]:
        """Bytes by phase and component, each phase at its highest moment."""
        root, use = self.config.actor_rollout_ref, self.config.reference_use
        found = {
            "rollout": self._resident() | self._engine(with_cache=True),
            "weight sync": self._resident("policy") | self._engine(with_cache=False) | self._whole_tensor(),
        }
        if self.config.needs_old_log_probs:
            found["log-prob"] = self._resident("policy") | self._log_prob(self.policy, root.rollout, self._sp_size)
        found["update"] = self._resident("policy", trains=True) | self._update()
        if (reference := self.reference) is not None:
            if use.full_kl_in_reward:
                tokens = self._log_prob_tokens(root.rollout, self._sp_size)
                found["log-prob"] |= self._full_kl(reference, tokens)
            if use.full_kl_in_loss:
                found["update"] |= self._full_kl(reference, self.update_tokens)
            if use.log_probs:
                sharers = root.ref.ulysses_sequence_parallel_size
                found["reference"] = self._resident("reference") | self._log_prob(reference, root.ref, sharers)
        if (critic := self.critic) is not None:
            found["values"] = self._resident("critic") | self._values(critic)
            found["critic update"] = self._resident("critic", trains=True) | self._critic_update(critic)
        kept = self._cuda_graphs() if self._engine_sleeps else self._engine(with_cache=True)
        return {phase: components | kept for phase, components in found.items()}

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes by phase, with what torch, CUDA and NCCL keep for themselves."""
        processes = 1 if self.critic is None else 2
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
                found["gradients"] = 0.0 if model.config.offload_policy else model.weights
        if self.config.actor_rollout_ref.use_score:
            found["score head"] = self._score_head(used == "policy" and trains)
        return found

    def _score_head(self, trains: bool) -> float:
        # Weights and two moments in float32 wherever the policy's are; in an update the gradients and the whole head.
        head, shards = self.shape.score_head_parameters, self.policy.shards
        weights, states = self.policy.resident(trains, trains)
        resident = 4 * head / shards * (bool(weights) + 2 * bool(states))
        return resident + (4 * head / shards + 4 * 3 * head if trains else 0)

    def _tokens(self, batching: MicroBatching, sp_size: int) -> int:
        """Of one GPU in the largest micro-batch, rows being as long as they can be."""
        return -(-batching.most_tokens(self._longest) // sp_size)

    def _log_prob_tokens(self, section: RolloutConfig | RefConfig, sp_size: int) -> int:
        batching = MicroBatching.for_log_prob(section, self._packed, sp_size)
        return self._tokens(batching, sp_size)

    def _log_prob(self, model: Placement, section: RolloutConfig | RefConfig, sp_size: int) -> Components:
        tokens = self._log_prob_tokens(section, sp_size)
        return forward_peak(model, tokens, self._longest, self._packed, self.chunk(tokens))

    def _update(self) -> Components:
        tokens = self.update_tokens
        return training_peak(self.policy, tokens, self._longest, self.checkpointing, self._packed, self.chunk(tokens))

    def _full_kl(self, reference: Placement, tokens: int) -> Components:
        """What the reference has on the GPU while the policy computes the same tokens."""
        return {
            "reference weights": reference.resident(in_use=True)[0],
            "reference's LM head": reference.kept_gathered(),
            "reference's states": 4 * tokens * self.shape.hidden,
        }

    @property
    def update_tokens(self) -> int:
        """Tokens of one GPU in the largest micro-batch of the policy's update."""
        actor = self.config.actor_rollout_ref.actor
        return self._tokens(MicroBatching.for_update(actor, self._packed, self._sp_size, self.world), self._sp_size)

    @property
    def log_prob_tokens(self) -> dict[str, int]:
        """Tokens of one GPU in the largest micro-batch of the log-probs of `policy` and `reference`."""
        root = self.config.actor_rollout_ref
        return {
            "policy": self._log_prob_tokens(root.rollout, self._sp_size),
            "reference": self._log_prob_tokens(root.ref, root.ref.ulysses_sequence_parallel_size),
        }

    def _values(self, model: Placement) -> Components:
        critic = self.config.critic
        packed, sp_size = critic.model.use_remove_padding, critic.ulysses_sequence_parallel_size
        tokens = self._tokens(MicroBatching.for_values(critic, packed, sp_size), sp_size)
        return forward_peak(model, tokens, self._longest, packed, logits=0)

    def _critic_update(self, model: Placement) -> Components:
        critic = self.config.critic
        packed, sp_size = critic.model.use_remove_padding, critic.ulysses_sequence_parallel_size
        tokens = self._tokens(MicroBatching.for_update(critic, packed, sp_size, self.world), sp_size)
        own = critic.model.enable_gradient_checkpointing
        checkpointing = self.checkpointing if own == "auto" else own
        return training_peak(model, tokens, self._longest, checkpointing, packed, logits=0)

    @property
    def _packed(self) -> bool:
        return self.config.actor_rollout_ref.model.use_remove_padding

    @property
    def _sp_size(self) -> int:
        return self.config.actor_rollout_ref.actor.ulysses_sequence_parallel_size

    def chunk(self, tokens: int) -> int:
        """Logits that exist at once where `tokens` go through the LM head."""
        return min(LOGITS_PER_CHUNK, tokens * self.shape.vocabulary)

    @property
    def _engine_width(self) -> int:
        dtype = self.config.actor_rollout_ref.rollout.dtype
        return CHECKPOINT_BYTES if dtype == "auto" else torch_dtype(dtype).itemsize

    @property
    def _tensor_parallel(self) -> int:
        return self.config.actor_rollout_ref.rollout.tensor_model_parallel_size

    @property
    def _engine_sleeps(self) -> bool:
        rollout = self.config.actor_rollout_ref.rollout
        return self.on_gpu and rollout.name == "vllm" and rollout.free_cache_engine

    @property
    def sleeping_weights(self) -> float:
        """Bytes of CPU memory in which this GPU's engine keeps its weights while it sleeps."""
        kept = self._engine_sleeps and self.config.actor_rollout_ref.rollout.sleep_level == 1
        return self._engine(with_cache=False)["engine weights"] if kept else 0.0

    @property
    def _cache_per_token(self) -> float:
        return self.shape.cache_per_token * self._engine_width / min(self._tensor_parallel, self.shape.kv_heads)

    def _engine(self, with_cache: bool) -> Components:
        rollout = self.config.actor_rollout_ref.rollout
        weights = self.shape.parameters * self._engine_width / self._tensor_parallel
        if not with_cache:
            return {"engine weights": weights}
        tokens = min(rollout.max_num_batched_tokens, rollout.max_num_seqs * self._longest)
        work = tokens * (3 * self.shape.mlp / self._tensor_parallel + 4 * self.shape.hidden) * self._engine_width
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
        rollout = self.config.actor_rollout_ref.rollout
        has_graphs = self.on_gpu and rollout.name == "vllm" and not rollout.enforce_eager
        return {"CUDA graphs": CUDA_GRAPHS_BYTES} if has_graphs else {}

    def _whole_tensor(self) -> Components:
        # The largest, gathered, beside the pieces that it is put together from.
        return {"tensor on its way": 2.0 * self.shape.embedding_parameters * self._engine_width}


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
    changes = {key: value for change in chosen for key, value in change.items()}
    return {key: value for key, value in changes.items() if value_at(memory.config, key) != value}


def _excess(memory: PhaseMemory, changes: list[dict[str, Any]]) -> float:
    together = {key: value for change in changes for key, value in change.items()}
    return replace(memory, config=with_values(memory.config, together)).excess


def _remedies(memory: PhaseMemory) -> Iterator[dict[str, Any]]:
    """Changes that save memory, those that cost least speed first."""
    root, longest = "actor_rollout_ref", memory.config.data.longest
    sp_size = memory.config.actor_rollout_ref.actor.ulysses_sequence_parallel_size
    yield {f"{root}.rollout.free_cache_engine": True}
    yield {f"{root}.actor.fsdp_config.fsdp_size": -1, f"{root}.ref.fsdp_config.fsdp_size": -1}
    yield {f"{root}.model.use_remove_padding": True}
    yield {f"{root}.model.enable_gradient_checkpointing": True}
    yield {f"{root}.actor.fsdp_config.reshard_after_forward": True}
    yield {f"{root}.ref.fsdp_config.param_offload": True}
    yield _log_prob_budgets(-(-longest // sp_size))
    yield _update_budget(-(-longest // sp_size))
    for part in ("optimizer_offload", "param_offload"):
        if memory.critic is not None:
            yield {f"critic.model.fsdp_config.{part}": True}
        yield {f"{root}.actor.fsdp_config.{part}": True}
    for share in (0.8, 0.7, 0.6, 0.5, 0.4):
        if share < memory.config.actor_rollout_ref.rollout.gpu_memory_utilization:
            yield {f"{root}.rollout.gpu_memory_utilization": share}
    for size in _divisors(memory, memory.config.actor_rollout_ref.rollout.tensor_model_parallel_size):
        yield {f"{root}.rollout.tensor_model_parallel_size": size}
    for size in _divisors(memory, sp_size):
        yield {
            f"{root}.model.use_remove_padding": True,
            f"{root}.actor.ulysses_sequence_parallel_size": size,
            f"{root}.ref.ulysses_sequence_parallel_size": size,
            **_log_prob_budgets(-(-longest // size)),
            **_update_budget(-(-longest // size)),
        }
    yield {f"{root}.actor.optim.name": "AdamW8bit"}


def _log_prob_budgets(tokens: int) -> dict[str, Any]:
    keys = (f"actor_rollout_ref.{section}.log_prob" for section in ("ref", "rollout"))
    return {
        name: value
        for key in keys
        for name, value in ((f"{key}_use_dynamic_bsz", True), (f"{key}_max_token_len_per_gpu", tokens))
    }


def _update_budget(tokens: int) -> dict[str, Any]:
    key = "actor_rollout_ref.actor"
    return {f"{key}.use_dynamic_bsz": True, f"{key}.ppo_max_token_len_per_gpu": tokens}


def _divisors(memory: PhaseMemory, at_present: int) -> list[int]:
    """Larger group sizes that divide a node's GPUs and the model's heads (fewer key heads than ranks are repeated)."""
    divided = (memory.config.trainer.n_gpus_per_node, memory.shape.heads)
    return [size for size in (2, 4, 8) if size > at_present and not any(number % size for number in divided)]
