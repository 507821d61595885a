#!/usr/bin/env bash
# GRPO + SPRM on a Ray cluster (verl/examples/ray/run_worker_n.sh starts one); run it on the head node. The recipe is
# that of run_single_node.sh; model, data and checkpoints must lie at the same path on every node.
#
#   NNODES=8 bash scripts/run_multi_node.sh [--dry-run] [key=value ...]
set -euo pipefail
export RAY_ADDRESS=${RAY_ADDRESS:-auto}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_single_node.sh" trainer.nnodes="${NNODES:-8}" \
    trainer.experiment_name=grpo_sprm_multi_node "$@"
