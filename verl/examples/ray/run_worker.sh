#!/usr/bin/env bash
# Join this machine to a Ray cluster: bash run_worker.sh HEAD_ADDRESS[:PORT] [options of `ray start`]
# Where the cluster asks for a token, RAY_AUTH_TOKEN or ~/.ray/auth_token must hold the head's (`ray get-auth-token`).
set -euo pipefail
if (($# == 0)); then
    echo "error: whom to join? usage: bash run_worker.sh HEAD_ADDRESS[:PORT] [options of 'ray start']" >&2
    exit 2
fi
head=$1
shift
[[ $head == *:* ]] || head=$head:${PORT:-6379}
exec ray start --address="$head" "$@"
