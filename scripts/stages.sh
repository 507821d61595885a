#!/usr/bin/env bash
# Sourced by quickstart.sh and language.sh, after they have chosen `out` and `total_stages`: stages that are skipped once
# they are finished, and services that end with the script.
set -euo pipefail
source scripts/environment.sh

bin=$(realpath -m "$venv")/bin
export PATH=$bin:$PATH
# Small models run faster on one thread a process, and a spinning second thread can cost a factor of ten.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
# Else glibc keeps what the activations of one update leave in holes: half as much again.
export MALLOC_MMAP_THRESHOLD_=4194304 MALLOC_TRIM_THRESHOLD_=268435456
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
mkdir -p "$out/logs"
[[ -f $out/commit ]] || git describe --always --dirty >"$out/commit" 2>/dev/null || rm -f "$out/commit"

say() { printf '\n\033[1m[%s] %s\033[0m\n' "$(date +%H:%M:%S)" "$*"; }
fail() { echo "error: $*" >&2; exit 2; }

# begin FOLDER SETTINGS: the stages that follow belong to FOLDER. A finished one is only worth skipping when it was made
# with the same settings.
begin() {
    stages=$1/stages
    mkdir -p "$stages"
    [[ -x $bin/python ]] || rm -f "$stages/setup"
    [[ -f $1/settings ]] || echo "$2" >"$1/settings"
    [[ $(cat "$1/settings") == "$2" ]] ||
        fail "$1 was begun with $(cat "$1/settings"); set OUT to another folder, or remove it"
}

# run NAME TITLE OUTPUT: call stage_NAME unless an earlier run finished it, and remember how long it took.
stage_number=0
run() {
    local name=$1 title=$2 output=$3 started
    stage_number=$((stage_number + 1))
    if [[ -f $stages/$name ]]; then
        say "$stage_number/$total_stages $title: finished earlier ($output)"
        return
    fi
    say "$stage_number/$total_stages $title → $output"
    started=$(date +%s)
    "stage_$name"
    echo $(($(date +%s) - started)) >"$stages/.$name"
    mv "$stages/.$name" "$stages/$name"
    say "$title took $(cat "$stages/$name") s"
}

# seconds_of FOLDER...: how long the finished stages of these folders took together.
seconds_of() {
    local seconds=0 folder stage
    for folder in "$@"; do
        for stage in "$folder"/stages/*; do seconds=$((seconds + $(cat "$stage"))); done
    done
    echo "$seconds"
}

stage_setup() { bash scripts/setup.sh; }

# Of each kind of service: where it answers, its process and its log.
declare -A url pid log
stop_services() {
    local service
    for service in "${pid[@]}"; do kill "$service" 2>/dev/null || true; done
    for service in "${pid[@]}"; do wait "$service" 2>/dev/null || true; done
    pid=() url=()
}
trap stop_services EXIT

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# serve KIND NAME COMMAND...: start a policy or score service of a model in the background, at ${url[KIND]}. Several policy
# services share the questions: they are of the kinds policy, policy_2, ...
serve() {
    local kind=$1 name=$2 port
    shift 2
    port=$(free_port)
    url[$kind]=http://127.0.0.1:$port log[$kind]=$out/logs/${kind}_$name.log
    "$@" --ip 127.0.0.1 --port "$port" >"${log[$kind]}" 2>&1 &
    pid[$kind]=$!
}

# wait_ready KIND...: until these services answer.
wait_ready() {
    local kind
    for kind in "$@"; do
        until python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=2)' "${url[$kind]}/ready" \
            2>/dev/null; do
            kill -0 "${pid[$kind]}" 2>/dev/null || {
                tail -n 20 "${log[$kind]}" >&2
                echo "error: the $kind service ended, see ${log[$kind]}" >&2
                exit 1
            }
            sleep 0.5
        done
    done
}

# infer INPUT OUTPUT MODEL OPTIONS...: 32 samples of each question from the policy services.
infer() {
    local input=$1 output=$2 model=$3 service policies=()
    shift 3
    for service in "${!url[@]}"; do [[ $service != policy* ]] || policies+=("${url[$service]}/generate"); done
    python test/inference.py --input_file "$input" --output_file "$output" --model_dir "$model" \
        --response_api_url "$(IFS=, && echo "${policies[*]}")" --n_samples 1 --branch 32 --response_num 32 \
        --temperature "$temperature" --top_p 1.0 --repetition_penalty 1.0 --max_tokens "$response_length" \
        --seed "$seed" "$@"
}
