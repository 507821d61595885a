#!/usr/bin/env bash
# Start the Ray head on this machine: PORT=6379 bash run_head.sh [options of `ray start`]
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
ray get-auth-token --generate >/dev/null
exec ray start --head --port="${PORT:-6379}" --disable-usage-stats "$@"
