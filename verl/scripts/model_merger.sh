#!/usr/bin/env bash
# Checkpoint to model folder: see model_merger.py. Folders are arguments or environment variables.
#
#   bash model_merger.sh LOCAL_DIR TARGET_DIR [--dtype bfloat16]
#   LOCAL_DIR=checkpoints/P/E TARGET_DIR=out bash model_merger.sh
#   bash model_merger.sh LOCAL_DIR TARGET_DIR --adapter_only     of a LoRA run: for peft
#   bash model_merger.sh [merge --backend fsdp --use_score] --local_dir LOCAL_DIR --target_dir TARGET_DIR
#
# LOCAL_DIR: a checkpoint (.../global_step_N/actor or .../global_step_N), or an experiment's folder, whose latest
# checkpoint is taken. Relative folders count from here, or else from the repository root.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$scripts/../.." && pwd)

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    [[ -z ${VIRTUAL_ENV:-} && -x ${XBAI_VENV:-$root/.venv}/bin/python ]] && PYTHON=${XBAI_VENV:-$root/.venv}/bin/python
fi

if [[ " $*" == *" --local_dir"* ]]; then
    exec "$PYTHON" "$scripts/model_merger.py" "$@"
fi
if (($# >= 2)) && [[ $1 != -* && $2 != -* ]]; then
    LOCAL_DIR=$1 TARGET_DIR=$2
    shift 2
fi

missing=()
[[ -n ${LOCAL_DIR:-} ]] || missing+=("LOCAL_DIR (the checkpoint)")
[[ -n ${TARGET_DIR:-} ]] || missing+=("TARGET_DIR (the folder to write)")
if ((${#missing[@]})); then
    printf -v list '%s and ' "${missing[@]}"
    echo "error: ${list% and } missing; run: bash model_merger.sh LOCAL_DIR TARGET_DIR" >&2
    for latest in "$root"/checkpoints/*/*/latest_checkpointed_iteration.txt; do
        [[ -f $latest ]] && echo "a checkpoint is in ${latest%/*}" >&2
    done
    exit 2
fi

if [[ $LOCAL_DIR != /* && ! -e $LOCAL_DIR && -e $root/$LOCAL_DIR ]]; then
    LOCAL_DIR=$root/$LOCAL_DIR
    [[ $TARGET_DIR == /* ]] || TARGET_DIR=$root/$TARGET_DIR
fi

exec "$PYTHON" "$scripts/model_merger.py" --local_dir "$LOCAL_DIR" --target_dir "$TARGET_DIR" "$@"
