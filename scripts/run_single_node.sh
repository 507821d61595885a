#!/usr/bin/env bash
# GRPO + SPRM of a 1.5B model on one machine with 8 GPUs. Runs from any folder; later settings win:
#
#   bash scripts/run_single_node.sh actor_rollout_ref.model.path=MODEL data.train_files=TRAIN.parquet \
#       data.val_files=VAL.parquet [any key of verl/verl/trainer/config/ppo_trainer.yaml ...]
#
# With --dry-run it prints the configuration, the micro-batches and a memory estimate, without GPUs, model or data.
# Small, on CPU: add trainer.device=cpu trainer.n_gpus_per_node=2 and a tiny model, as scripts/quickstart.sh does.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

has_verl() { python -c 'import importlib.metadata as m; m.version("verl")' 2>/dev/null; }
has_verl || export PATH=$root/.venv/bin:$PATH
has_verl || { echo "error: the trainer is not installed; run: bash scripts/setup.sh" >&2; exit 2; }

exec python -m verl.trainer.main_ppo \
    trainer.device=cuda \
    trainer.nnodes=1 \
    trainer.n_gpus_per_node=8 \
    actor_rollout_ref.model.path="${MODEL:-$root/models/DeepSeek-R1-Distill-Qwen-1.5B}" \
    data.train_files="${TRAIN_FILES:-$root/data/train.parquet}" \
    data.val_files="${VAL_FILES:-$root/data/aime.parquet}" \
    data.train_batch_size=128 \
    data.max_prompt_length=1024 \
    data.max_response_length=16384 \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.model.use_remove_padding=true \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_dynamic_bsz=true \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768 \
    actor_rollout_ref.actor.use_kl_loss=true \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.use_score=true \
    actor_rollout_ref.score.optim.lr=1e-4 \
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=true \
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=65536 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.max_num_batched_tokens=32768 \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true \
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=65536 \
    actor_rollout_ref.rollout.val_kwargs.n=4 \
    reward_model.reward_manager=prime \
    trainer.total_epochs=10 \
    trainer.save_freq=20 \
    trainer.test_freq=20 \
    trainer.max_actor_ckpt_to_keep=3 \
    trainer.project_name=xbai \
    trainer.experiment_name=grpo_sprm_1.5b \
    "$@"
