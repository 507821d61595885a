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
# Ray itself would try for a minute, and then print a stack trace.
if ! timeout 10 bash -c '>"/dev/tcp/$1/$2"' _ "${head%:*}" "${head##*:}" 2>/dev/null; then
    echo "error: no Ray head answers at $head; start one there with run_head.sh" >&2
    exit 2
fi
# Ray asks the cluster before it looks for the token.
if [[ -n ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} || -r ${HOME:-}/.ray/auth_token ]]; then
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
fi
# A node that is cut off ends what it runs after so many seconds: nobody waits for its results any more.
export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-30}
exec ray start --address="$head" "$@"
