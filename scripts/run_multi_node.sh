#!/usr/bin/env bash
# GRPO + SPRM of a 32B model with responses of 32k tokens on 16 machines of 8 GPUs (80 GB), joined by Ray
# (verl/examples/ray/run_worker_n.sh), with the published settings of MetaStone-S1-32B. Run it on the head node; model,
# data and checkpoints must lie at the same path on every node. Settings that follow win.
#
#   hf download Qwen/QwQ-32B --local-dir models/QwQ-32B
#   NNODES=16 bash scripts/run_multi_node.sh [--dry-run] [key=value ...]
#
# Not as published, besides what run_single_node.sh names:
# - It starts from QwQ-32B and shuffles; theirs went on from a checkpoint of MetaStone-L1-32B, with the data in its order.
# - The weights are stored in float32 and computed in bfloat16: steps of 1e-7 would round away in stored bfloat16.
# - A mini-batch has all 128 prompts; 256, as theirs says, is more than the batch.
# - Log-probs take as many tokens a pass as the update, theirs one response: the same numbers, the weights gathered less.
# - Validation every 20 steps, where theirs has none; vLLM 1 has no swap_space.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export RAY_ADDRESS=${RAY_ADDRESS-auto}

gpu_settings=(
    actor_rollout_ref.actor.fsdp_config.param_offload=true
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=true
    actor_rollout_ref.rollout.gpu_memory_utilization=0.8
)
[[ " $* " == *" trainer.device=cpu "* ]] && gpu_settings=()

exec bash "$root/scripts/run_single_node.sh" \
    trainer.nnodes="${NNODES:-16}" \
    trainer.experiment_name=grpo_sprm_32b \
    actor_rollout_ref.model.path="${MODEL:-$root/models/QwQ-32B}" \
    data.train_batch_size=128 \
    data.max_prompt_length=2048 \
    data.max_response_length=32768 \
    actor_rollout_ref.actor.optim.lr=1e-7 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=false \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=8 \
    actor_rollout_ref.score.optim.lr=3e-6 \
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=34816 \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=8 \
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=34816 \
    trainer.total_epochs=1 \
    trainer.save_freq=5 \
    "${gpu_settings[@]}" \
    "$@"
