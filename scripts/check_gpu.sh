#!/usr/bin/env bash
# What a machine with new GPUs must show before it trains or serves: driver, attention, scores, FSDP2, training steps,
# engines, services, runs, speed. Each step runs in a process of its own and ends as PASS, FAIL (with what that means) or
# skipped (with what is missing); the report is outputs/check_gpu.json. The exit status is 1 when a step failed.
#
#   bash scripts/check_gpu.sh                everything that can run here
#   bash scripts/check_gpu.sh --quick        what torch and transformers alone show on one GPU, in minutes
#   bash scripts/check_gpu.sh --device cpu   a rehearsal with tiny models; also what happens where there is no GPU
#   bash scripts/check_gpu.sh --list         the steps;  --only NAME,NAME runs some of them
#
# It takes the environment that setup.sh made ($XBAI_VENV, .venv) or else the `python` at hand; nothing need be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ " $* " == *" --device cpu "* || " $* " == *" --device=cpu "* ]] && export DEVICE=cpu
source scripts/environment.sh
bin=$(realpath -m "$venv")/bin
[[ -x $bin/python ]] && export PATH=$bin:$PATH
python=$(type -P python3 || type -P python) || { echo "error: no python here; run: bash scripts/setup.sh" >&2; exit 2; }
found='import importlib.util as i, sys; sys.exit(not (i.find_spec("torch") and i.find_spec("transformers")))'
"$python" -c "$found" || { echo "error: $python lacks torch or transformers; run: bash scripts/setup.sh" >&2; exit 2; }
export PYTHONPATH=$PWD:$PWD/verl${PYTHONPATH:+:$PYTHONPATH}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} RAY_USAGE_STATS_ENABLED=0
# More than one thread a process slows tiny models down.
if [[ $device == cpu ]]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE; fi

exec "$python" -m verl.bringup --device "$device" "$@"
