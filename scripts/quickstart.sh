#!/usr/bin/env bash
# The whole loop on one bare machine: set up, make the data, train, convert, serve, evaluate. No model hub, and no GPU:
# where there is one it stays idle.
#
#   bash scripts/quickstart.sh
#
# Interrupted and run again it goes on from the last finished stage. Settings by environment variable:
#   OUT       where everything goes (outputs/quickstart)     SEED      of data, training and sampling (0)
#   PROBLEMS  held-out problems to evaluate on (200)         SFT_ARGS  further overrides of the supervised stage
#   RANKS     training processes (2)                         RL_ARGS   further overrides of the RL stage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-outputs/quickstart}
seed=${SEED:-0}
problems=${PROBLEMS:-200}
read -ra sft_args <<<"${SFT_ARGS:-}"
read -ra rl_args <<<"${RL_ARGS:-}"
ranks=${RANKS:-2}
response_length=256
temperature=0.7 # of all evaluation; training samples at 1.0
export DEVICE=cpu
total_stages=9
source scripts/stages.sh
begin "$out" "SEED=$seed PROBLEMS=$problems RANKS=$ranks SFT_ARGS=${SFT_ARGS:-} RL_ARGS=${RL_ARGS:-}"
absolute_out=$(cd "$out" && pwd)

# evaluate NAME MODEL: both services, 32 samples of every held-out problem, and the services down again.
evaluate() {
    local name=$1 model=$2
    serve policy "$name" python test/policy_model_queue.py --model_path "$model"
    serve score "$name" python test/score_model_queue.py --model_path "$model" --score_model_dim 128 --lang en
    wait_ready score policy
    infer "$out/data/make10_test.jsonl" "$out/results/$name.jsonl" "$model" --task make10 \
        --score_api_url "${url[score]}/score" --max_questions "$problems"
    stop_services
}

stage_data() {
    python -m xbai.benchmarks.make10 --out "$out/data" --seed "$seed"
    rm -rf "$out/tiny"
    python -m xbai.benchmarks.tiny_model --out "$out/tiny" --seed "$seed"
}

stage_sft() {
    torchrun --standalone --nproc_per_node "$ranks" -m verl.trainer.main_sft --config-name make10_sft \
        model.path="$out/tiny" data.train_files="$out/data/make10_sft.parquet" \
        trainer.output_dir="$out/base" trainer.seed="$seed" "${sft_args[@]}"
}

# The recipe of run_single_node.sh, in small. Why two settings of the score loss are changed is in docs/results.md.
stage_rl() {
    bash scripts/run_single_node.sh \
        trainer.device=cpu trainer.n_gpus_per_node="$ranks" trainer.seed="$seed" \
        trainer.default_local_dir="$out/rl" trainer.project_name=quickstart trainer.experiment_name=make10 \
        trainer.total_training_steps=30 trainer.save_freq=10 trainer.test_freq=10 trainer.max_actor_ckpt_to_keep=1 \
        actor_rollout_ref.model.path="$out/base" \
        actor_rollout_ref.model.enable_gradient_checkpointing=false \
        data.train_files="$out/data/make10_train.parquet" data.val_files="$out/data/make10_val.parquet" \
        data.max_prompt_length=32 data.max_response_length="$response_length" \
        actor_rollout_ref.actor.ppo_mini_batch_size=32 \
        actor_rollout_ref.actor.ulysses_sequence_parallel_size=1 \
        actor_rollout_ref.actor.entropy_coeff=0 \
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
        actor_rollout_ref.actor.optim.lr=3e-4 actor_rollout_ref.actor.optim.warmup_style=cosine \
        actor_rollout_ref.actor.kl_loss_coef=0.1 \
        actor_rollout_ref.score.optim.lr=1e-3 \
        actor_rollout_ref.score.backbone_grad_scale=1.0 \
        actor_rollout_ref.score.agreement_weighting=false \
        actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=32768 \
        actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=32768 \
        actor_rollout_ref.rollout.dtype=float32 actor_rollout_ref.rollout.temperature=1.0 \
        actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
        trainer.val_before_train=true "${rl_args[@]}"
}

stage_merge() {
    rm -rf "$out/model"
    (cd verl/scripts && bash model_merger.sh "$absolute_out/rl" "$absolute_out/model")
}

stage_evaluate_base() { evaluate base "$out/base"; }
stage_evaluate_rl() { evaluate rl "$out/model"; }

stage_metrics() {
    local n
    for n in 2 8 32; do
        python test/compute_metric.py --task make10 --result_paths "$out/results/rl.jsonl" --N "$n"
    done
}

stage_report() {
    local seconds
    seconds=$(seconds_of "$out")
    python -m verl.trainer.plot --metrics_file "$out/rl/metrics.jsonl" --output "$out/training.png"
    xbai summary --task make10 --base_results "$out/results/base.jsonl" --rl_results "$out/results/rl.jsonl" \
        --output "$out/summary.json" --plot "$out/accuracy.png" --seconds_total "$seconds"
    say "Done in $seconds s. Table: $out/summary.json; figures: $out/training.png, $out/accuracy.png"
    say "Ask the model with any OpenAI client: $venv/bin/xbai serve --model_path $out/model"
}

run setup "Set-up" "$venv"
run data "Data: Make 10 puzzles and a tiny model from scratch" "$out/data"
run sft "Supervised training of the tiny base" "$out/base"
run rl "Reinforcement learning: GRPO + SPRM" "$out/rl"
run merge "Conversion to a Hugging Face folder" "$out/model"
run evaluate_base "Serving and sampling the base" "$out/results/base.jsonl"
run evaluate_rl "Serving and sampling the trained model" "$out/results/rl.jsonl"
run metrics "Metrics" "the terminal"
run report "Table and figures" "$out/summary.json"
