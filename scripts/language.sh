#!/usr/bin/env bash
# The method on a real language model: a pretrained one learns to solve word problems in steps, then policy and score head
# train together, and the score chooses among 32 samples of questions that are new, also of kinds that are.
#
#   bash scripts/language.sh
#
# Sized for two CPU cores with 12 GB (RL takes 11) and at most three hours: the recommended setting took 78 minutes, beside
# other work. Needs no model hub: the model, SmolLM2-135M-Instruct, is in a wheel. Interrupted and run again it goes on from
# the last finished stage.
# Settings by environment variable:
#   OUT             where everything goes (outputs/language)
#   SETTING         of the score's loss: recommended (see below) or published; run again with the other one, both share the
#                   data, the fine-tuned model and its samples
#   LANGUAGE_MODEL  folder of another model to begin with       TASK       stories, or gsm8k with GSM8K=folder of its files
#   DEVICE          cpu or cuda (cuda where there is a GPU)     RANKS      training processes (2; on GPUs all of them)
#   QUESTIONS       of the test (200; half of held-out kinds)   SEED       of data, training and sampling (0)
#   JUDGE_QUESTIONS of the training, answered eight times by the fine-tuned model to give the recommended setting its first
#                   score head (480)
#   SFT_ARGS        further overrides of the supervised stage   RL_ARGS    further overrides of the RL stage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-outputs/language}
setting=${SETTING:-recommended}
task=${TASK:-stories}
model=${LANGUAGE_MODEL:-}
gsm8k=${GSM8K:-}
questions=${QUESTIONS:-200}
judge_questions=${JUDGE_QUESTIONS:-480}
seed=${SEED:-0}
read -ra sft_args <<<"${SFT_ARGS:-}"
read -ra rl_args <<<"${RL_ARGS:-}"
arm=$out/$setting # what depends on the setting
temperature=0.7   # of all evaluation; training samples at 1.0
context=1024
total_stages=12
[[ -z $model ]] || total_stages=$((total_stages - 1))
[[ $setting == published ]] || total_stages=$((total_stages + 1))
source scripts/stages.sh

# What each setting changes of ppo_trainer.yaml, whose values are the published ones. The recommended one begins with a head
# that has learnt by the same loss on responses of the base. A twentieth of the score's gradient is as large as the policy's.
score_loss=(score.loss=both score.aggregation=mean_logit score.agreement_weighting=false)
published_score=()
recommended_score=(
    actor_rollout_ref.score.backbone_grad_scale=0.05
    "${score_loss[@]/#/actor_rollout_ref.}"
    actor_rollout_ref.score.model_path="$arm/judge"
    actor_rollout_ref.score.standardized_updates=true
)
[[ $setting == recommended || $setting == published ]] ||
    fail "SETTING=$setting is unknown, use recommended or published"
declare -n score_setting=${setting}_score

case $task in
stories) prompt_length=128 response_length=160 ;;
gsm8k)
    prompt_length=384 response_length=400
    [[ -d $gsm8k ]] || fail "TASK=gsm8k needs GSM8K=folder with the files of GSM8K, train and test as .jsonl or .parquet"
    ;;
*) fail "TASK=$task is unknown, use stories or gsm8k" ;;
esac
[[ -z $model || -d $model ]] || fail "LANGUAGE_MODEL=$model: no such folder"

ranks=${RANKS:-2}
micro_batch_tokens=1024 # of two processes with 5 GB each
device_settings=(trainer.device=cpu actor_rollout_ref.model.enable_gradient_checkpointing=false)
if [[ $device == cuda ]]; then
    ranks=${RANKS:-$(nvidia-smi -L | wc -l)}
    micro_batch_tokens=8192
    device_settings=(trainer.device=cuda)
fi
device_settings+=(
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$micro_batch_tokens"
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=$((2 * micro_batch_tokens))
)
begin "$out" "SEED=$seed TASK=$task LANGUAGE_MODEL=$model GSM8K=$gsm8k QUESTIONS=$questions \
JUDGE_QUESTIONS=$judge_questions DEVICE=$device RANKS=$ranks SFT_ARGS=${SFT_ARGS:-}"

# serve_policies NAME MODEL: where there are two CPU cores or more, two policy services share the questions: each has one
# thread.
serve_policies() {
    local service services=(policy)
    # nproc would count what OMP_NUM_THREADS says.
    if [[ $device == cpu ]] && (($(env -u OMP_NUM_THREADS nproc) > 1)); then services+=(policy_2); fi
    for service in "${services[@]}"; do
        serve "$service" "$1" python test/policy_model_queue.py --model_path "$2" --max_model_len "$context"
    done
    wait_ready "${services[@]}"
}

# sample NAME FOLDER MODEL SCORES: 32 samples of every question, scored (fused) or not (none).
sample() {
    local name=$1 results=$2/results model=$3 scores=$4
    local heldout=$out/data/${task}_heldout.jsonl validation=$out/data/${task}_val.jsonl
    serve_policies "$name" "$model"
    infer "$out/data/${task}_test.jsonl" "$results/$name.jsonl" "$model" --task "$task" --score_source "$scores" \
        --max_questions "$questions"
    [[ ! -f $heldout ]] || infer "$heldout" "$results/${name}_heldout.jsonl" "$model" --task "$task" \
        --score_source "$scores" --max_questions $(((questions + 1) / 2))
    # What score and log-prob count together is learnt on questions that are reported nowhere.
    [[ $scores == none || ! -f $validation ]] || infer "$validation" "$results/${name}_val.jsonl" "$model" \
        --task "$task" --score_source "$scores" --max_questions "$questions" --branch 8 --response_num 8
    stop_services
}

stage_wheels() {
    rm -rf "$out/wheels"
    python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target "$out/wheels" \
        -r scripts/language_requirements.txt 2>"$out/logs/wheels.log" ||
        fail "the wheels of scripts/language_requirements.txt cannot be had here ($out/logs/wheels.log says why);" \
            "LANGUAGE_MODEL=folder begins with a model that is here, and needs none"
}

stage_convert() {
    rm -rf "$out/start"
    local source=(--wheels "$out/wheels")
    [[ -z $model ]] || source=(--model "$model")
    python -m xbai.benchmarks.language_model "${source[@]}" --out "$out/start"
}

stage_data() {
    local source=()
    [[ $task == stories ]] || source=(--source "$gsm8k")
    python -m "xbai.benchmarks.$task" "${source[@]}" --out "$out/data" --seed "$seed"
}

stage_sft() {
    torchrun --standalone --nproc_per_node "$ranks" -m verl.trainer.main_sft --config-name stories_sft \
        model.path="$out/start" data.train_files="$out/data/${task}_sft.parquet" \
        trainer.output_dir="$out/base" trainer.seed="$seed" "${sft_args[@]}"
}

# The base has no score head yet.
stage_sample_base() { sample base "$out" "$out/base" none; }

stage_judge() {
    rm -rf "$arm/judge"
    serve_policies judge "$out/base"
    infer "$out/data/${task}_judge.jsonl" "$out/results/base_judge.jsonl" "$out/base" --task "$task" \
        --score_source none --max_questions "$judge_questions" --branch 8 --response_num 8 --temperature 1.0
    stop_services
    python -m verl.trainer.main_score model.path="$out/base" data.task="$task" \
        data.train_files="$out/results/base_judge.jsonl" "${score_loss[@]}" \
        trainer.output_dir="$arm/judge" trainer.total_epochs=8 trainer.seed="$seed"
}

# The recipe of run_single_node.sh, in small.
stage_rl() {
    bash scripts/run_single_node.sh "${device_settings[@]}" \
        trainer.n_gpus_per_node="$ranks" trainer.seed="$seed" \
        trainer.default_local_dir="$arm/rl" trainer.rollout_data_dir="$arm/rl/rollouts" \
        trainer.project_name=language trainer.experiment_name="$task" \
        trainer.total_training_steps=30 trainer.save_freq=10 trainer.test_freq=10 trainer.max_actor_ckpt_to_keep=1 \
        actor_rollout_ref.model.path="$out/base" \
        data.train_files="$out/data/${task}_train.parquet" data.val_files="$out/data/${task}_val.parquet" \
        data.train_batch_size=16 data.max_prompt_length="$prompt_length" data.max_response_length="$response_length" \
        actor_rollout_ref.actor.ppo_mini_batch_size=8 \
        actor_rollout_ref.actor.ulysses_sequence_parallel_size=1 \
        actor_rollout_ref.actor.entropy_coeff=0 actor_rollout_ref.actor.use_kl_loss=false \
        actor_rollout_ref.actor.fsdp_config.compute_dtype=bfloat16 \
        actor_rollout_ref.actor.optim.lr=3e-5 \
        actor_rollout_ref.score.optim.lr=1e-3 \
        actor_rollout_ref.rollout.dtype=bfloat16 actor_rollout_ref.rollout.max_num_seqs=64 \
        actor_rollout_ref.rollout.temperature=1.0 \
        actor_rollout_ref.rollout.val_kwargs.n=1 actor_rollout_ref.rollout.val_kwargs.temperature="$temperature" \
        trainer.val_before_train=true "${score_setting[@]}" "${rl_args[@]}"
}

stage_merge() {
    local absolute_arm
    absolute_arm=$(cd "$arm" && pwd)
    rm -rf "$arm/model"
    (cd verl/scripts && bash model_merger.sh "$absolute_arm/rl" "$absolute_arm/model")
}

stage_sample_rl() { sample rl "$arm" "$arm/model" fused; }

stage_calibrate() {
    local validation=$arm/results/rl_val.jsonl
    [[ -f $validation ]] || return 0
    xbai calibrate "$validation" --task "$task" --model_path "$arm/model" ||
        say "There is nothing to learn from, see above: score and log-prob are not put together"
}

stage_metrics() {
    local results
    for results in "$arm"/results/rl{,_heldout}.jsonl; do
        [[ -f $results ]] || continue
        python test/compute_metric.py --task "$task" --result_paths "$results" --N 8
    done
}

stage_report() {
    local seconds held_out=() calibration=()
    seconds=$(seconds_of "$out" "$arm")
    [[ ! -f $arm/results/rl_heldout.jsonl ]] || held_out=(--held_out "$arm/results/rl_heldout.jsonl"
        --held_out_base "$out/results/base_heldout.jsonl")
    [[ ! -f $arm/model/sprm_calibration.json ]] || calibration=(--calibration "$arm/model")
    python -c 'import json, sys; print(json.dumps({"setting": sys.argv[1], "overrides": sys.argv[2:]}))' \
        "$setting" "${score_setting[@]}" "${rl_args[@]}" >"$arm/score_setting.json"
    python -m verl.trainer.plot --metrics_file "$arm/rl/metrics.jsonl" --output "$arm/training.png"
    xbai summary --task "$task" --base_results "$out/results/base.jsonl" --rl_results "$arm/results/rl.jsonl" \
        "${held_out[@]}" "${calibration[@]}" --score_setting "$arm/score_setting.json" \
        --output "$arm/summary.json" --plot "$arm/accuracy.png" --seconds_total "$seconds"
    xbai replay "$arm/results/rl.jsonl" --task "$task" --json "$arm/budget.json" --plot "$arm/budget.png" ||
        say "No budget can be tried on these samples, see above"
    say "Done in $seconds s. Tables: $arm/{summary,budget}.json; figures: $arm/{training,accuracy,budget}.png"
}

run setup "Set-up" "$venv"
[[ -n $model ]] || run wheels "A language model in a wheel" "$out/wheels"
run convert "The model to begin with, with tokens for its steps" "$out/start"
run data "Data: $task" "$out/data"
run sft "Supervised training on worked solutions" "$out/base"
run sample_base "Serving and sampling the base" "$out/results/base.jsonl"
begin "$arm" "SETTING=$setting RL_ARGS=${RL_ARGS:-}"
[[ $setting == published ]] || run judge "A score head to begin with" "$arm/judge"
run rl "Reinforcement learning: GRPO + SPRM, $setting setting" "$arm/rl"
run merge "Conversion to a Hugging Face folder" "$arm/model"
run sample_rl "Serving and sampling the trained model" "$arm/results/rl.jsonl"
run calibrate "Score and log-prob together" "$arm/model"
run metrics "Metrics" "the terminal"
run report "Table and figures" "$arm/summary.json"
