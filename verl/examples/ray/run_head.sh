#!/usr/bin/env bash
# Start the Ray head on this machine: PORT=6379 bash run_head.sh [options of `ray start`]
# On a machine with several networks, --node-ip-address says by which address the other nodes reach it.
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
# A node that falls silent (no power, no network) is given up after five of these in a row: within 30 s.
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-2000}
export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-4000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-5}
# Ray's sockets lie 68 characters below this folder, and their paths have at most 107.
folder=${RAY_TMPDIR-${TMPDIR-/tmp}}
if ((${#folder} > 39)) && [[ " $* " != *" --temp-dir"* ]]; then
    echo "error: $folder (RAY_TMPDIR, or else TMPDIR) is too long a name for Ray's sockets; set RAY_TMPDIR=/tmp" >&2
    exit 2
fi
ray get-auth-token --generate >/dev/null
exec ray start --head --port="${PORT:-6379}" --disable-usage-stats "$@"
