"""The worker groups of a run: one process a GPU for the policy, one beside it for a critic, others for rollouts."""

from __future__ import annotations

import logging
from functools import partial

from transformers import PreTrainedTokenizerBase

from verl.models.loading import has_score_head
from verl.single_controller import RayResourcePool
from verl.trainer.config.schema import ActorRolloutRefConfig, PPOConfig
from verl.trainer.ppo.cluster import check_shared_folder, worker_env
from verl.workers.critic_worker import CriticWorker, CriticWorkers
from verl.workers.fsdp_workers import ActorRolloutRefWorker, PolicyWorkers, Role, group_sizes
from verl.workers.rollout_worker import RolloutWorker, RolloutWorkers
from xbai.engine.files import read_config
from xbai.engine.weight_files import check_weights
from xbai.sprm import load_score_head, load_sprm_config

logger = logging.getLogger(__name__)

_ROLES: dict[tuple[bool, bool], Role] = {
    (False, False): "actor",
    (False, True): "actor_ref",
    (True, False): "actor_rollout",
    (True, True): "actor_rollout_ref",
}
"""By whether there is an engine, and a reference."""


def check_loadable(policy: ActorRolloutRefConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `UserError` for what no worker could load: weights or a head that are damaged or of another model."""
    model, score = policy.model, policy.score
    check_weights(model.path, model_config := read_config(model.path, model.trust_remote_code))
    if policy.use_score:
        sprm_config = load_sprm_config(model.path, tokenizer, score.lang)
        if has_score_head(model.path, score.model_path):
            load_score_head(score.model_path or model.path, model_config.hidden_size, sprm_config)


def worker_pool(config: PPOConfig, groups: int) -> RayResourcePool:
    """Where the workers run, `groups` of them on each GPU.

    Raises:
        UserError: nodes that do not share the folder of the checkpoints.
    """
    trainer = config.trainer
    pool = RayResourcePool(
        [trainer.n_gpus_per_node] * trainer.nnodes,
        use_gpu=trainer.device == "cuda",
        max_colocate_count=groups,
        timeout_s=config.ray_init.timeout_s,
        processes_beside=trainer.rollout_gpus_per_node,
    )
    if trainer.nnodes > 1:
        check_shared_folder(trainer.default_local_dir, pool)
    logger.info("starting %d worker processes on %s", pool.world_size, trainer.device)
    return pool


def rollout_pool(config: PPOConfig) -> RayResourcePool:
    """Where `trainer.rollout_gpus` processes run."""
    trainer = config.trainer
    pool = RayResourcePool(
        [trainer.rollout_gpus_per_node] * trainer.nnodes,
        use_gpu=trainer.device == "cuda",
        timeout_s=config.ray_init.timeout_s,
        processes_beside=trainer.n_gpus_per_node,
    )
    logger.info("starting %d rollout processes on %s", pool.world_size, trainer.device)
    return pool


def policy_workers(config: PPOConfig, pool: RayResourcePool, total_steps: int) -> PolicyWorkers:
    """Start the processes of policy and, where they are needed, reference and rollout engine."""
    trainer, policy = config.trainer, config.actor_rollout_ref
    role: Role = _ROLES[trainer.rollout_gpus == 0, any(config.reference_use)]
    updates = max(1, total_steps - trainer.critic_warmup)
    init = partial(ActorRolloutRefWorker, policy, role, updates, trainer.seed)
    env, sizes = worker_env(trainer.device == "cuda"), group_sizes(policy)
    if trainer.rollout_gpus:
        del sizes["rollout"]
    return PolicyWorkers(pool, init, role, env, sizes, nccl_timeout_s=policy.nccl_timeout)


def rollout_workers(config: PPOConfig, pool: RayResourcePool) -> RolloutWorkers:
    """Start the processes of rollout engines alone."""
    policy = config.actor_rollout_ref
    init, env = partial(RolloutWorker, policy), worker_env(config.trainer.device == "cuda")
    sizes = {"rollout": policy.rollout.tensor_model_parallel_size}
    return RolloutWorkers(pool, init, "rollout", env, sizes, nccl_timeout_s=policy.nccl_timeout)


def critic_workers(config: PPOConfig, pool: RayResourcePool, total_steps: int) -> CriticWorkers:
    """Start the processes of the critic."""
    critic, trainer = config.critic, config.trainer
    init = partial(CriticWorker, critic, config.actor_rollout_ref.rollout.n, total_steps, trainer.seed)
    env, sizes = worker_env(trainer.device == "cuda"), {"train": critic.ulysses_sequence_parallel_size}
    return CriticWorkers(pool, init, "critic", env, sizes, nccl_timeout_s=critic.nccl_timeout)
