#!/usr/bin/env bash
# GRPO + SPRM of a 1.5B model on one machine with 8 GPUs, with the published settings of MetaStone-S1-1.5B.
#
#   python data/prepare.py deepscaler aime24
#   hf download agentica-org/DeepScaleR-1.5B-Preview --local-dir models/DeepScaleR-1.5B-Preview
#   bash scripts/run_single_node.sh [--dry-run] [any key of verl/verl/trainer/config/ppo_trainer.yaml ...]
#
# Runs from any folder. MODEL, TRAIN_FILES and VAL_FILES name another model (a local folder) and other data; settings
# that follow win. With --dry-run it prints the configuration, the micro-batches and a memory estimate, without GPUs,
# and ends as the run would where model or data are missing. Small, on CPU: trainer.device=cpu
# trainer.n_gpus_per_node=2 and a tiny model, as quickstart.sh does.
#
# Not as published: the data (theirs is data/train.parquet of MetaStone-S1, which TRAIN_FILES may name); the grading (by
# the answer after the thinking alone, where theirs also asks for exactly one <think> and one </think>); validation
# (AIME 2024 has 30 problems: 8 samples each and Best-of-8 say more than one greedy answer); CUDA graphs; the last three
# checkpoints stay.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# A module that the public project's `verl` has not, which would be imported in place of this one's editable install.
has_trainer() { python -c 'import verl.distribution' 2>/dev/null; }
has_trainer || export PATH=$root/.venv/bin:$PATH
has_trainer || {
    echo "error: the trainer is not installed; run: bash scripts/setup.sh (where the public project's verl is, first:" \
        "pip uninstall verl)" >&2
    exit 2
}

# A key that cannot act where it runs is an error, and these cannot on CPU.
gpu_settings=(actor_rollout_ref.rollout.gpu_memory_utilization=0.7)
# Nor can this one where the reference is the base of the policy's adapters.
[[ " $* " == *" actor_rollout_ref.model.lora_rank="* ]] ||
    gpu_settings+=(actor_rollout_ref.ref.fsdp_config.param_offload=true)
[[ " $* " == *" trainer.device=cpu "* ]] && gpu_settings=()

exec python -m verl.trainer.main_ppo \
    trainer.device=cuda \
    trainer.nnodes=1 \
    trainer.n_gpus_per_node=8 \
    actor_rollout_ref.model.path="${MODEL:-$root/models/DeepScaleR-1.5B-Preview}" \
    data.train_files="${TRAIN_FILES:-$root/data/deepscaler.parquet}" \
    data.val_files="${VAL_FILES:-$root/data/aime24.parquet}" \
    data.train_batch_size=32 \
    data.max_prompt_length=1024 \
    data.max_response_length=8192 \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.model.use_remove_padding=true \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    actor_rollout_ref.actor.use_dynamic_bsz=true \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=9216 \
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=2 \
    actor_rollout_ref.actor.entropy_coeff=0.001 \
    actor_rollout_ref.actor.use_kl_loss=true \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.use_score=true \
    actor_rollout_ref.score.optim.lr=1e-5 \
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=true \
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=9216 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.temperature=0.6 \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true \
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=9216 \
    actor_rollout_ref.rollout.val_kwargs.n=8 \
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6 \
    reward_model.reward_manager=prime \
    trainer.total_epochs=30 \
    trainer.val_before_train=false \
    trainer.save_freq=20 \
    trainer.test_freq=20 \
    trainer.max_actor_ckpt_to_keep=3 \
    trainer.project_name=xbai \
    trainer.experiment_name=grpo_sprm_1.5b \
    "${gpu_settings[@]}" \
    "$@"
