#!/usr/bin/env bash
# GRPO + SPRM of a 32B model with responses of 32k tokens on 8 machines of 8 GPUs (80 GB), joined by Ray
# (verl/examples/ray/run_worker_n.sh). Run it on the head node; model, data and checkpoints must lie at the same path on
# every node. What it does not set is as in run_single_node.sh; settings that follow win.
#
#   NNODES=8 bash scripts/run_multi_node.sh [--dry-run] [key=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export RAY_ADDRESS=${RAY_ADDRESS:-auto}
exec bash "$root/scripts/run_single_node.sh" \
    trainer.nnodes="${NNODES:-8}" \
    trainer.experiment_name=grpo_sprm_32b \
    actor_rollout_ref.model.path="${MODEL:-$root/models/QwQ-32B}" \
    data.max_response_length=32768 \
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=4 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=9216 \
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=18432 \
    actor_rollout_ref.ref.fsdp_config.param_offload=true \
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=18432 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=4 \
    "$@"
